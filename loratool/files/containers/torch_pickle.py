"""What ``torch.save`` writes: a pickle that describes tensors, and their data beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from loratool.files.container import Container, WeightsFile
from loratool.files.pickles import other_contents, read_pickle
from loratool.files.spec import TensorSpec
from loratool.files.torch_zip import TorchLayout, archive_stem, lay_out, seal

__all__ = ["CLAIM", "CONTAINER"]

CLAIM: Final = {
    "suffixes": [".bin", ".pt", ".pth", ".lora", ".ckpt"],
    "models": [".bin"],
    "preference": 1,
}


@dataclass(frozen=True)
class _Layout:
    archive: TorchLayout
    header: bytes = b""

    @property
    def offsets(self) -> Mapping[str, int]:
        return self.archive.offsets

    @property
    def size(self) -> int:
        return self.archive.size

    def seal(self, descriptor: int, metadata: Mapping[str, str], *, path: Path) -> None:
        """See :class:`Layout`."""
        seal(descriptor, self.archive, path=path)


class _TorchPickle:
    name: Final = "torch pickle"
    keeps_codes: Final = False
    has_metadata: Final = False

    def open(self, path: Path) -> WeightsFile:
        """See :class:`Container`; nothing in the pickle is executed."""
        file = read_pickle(path)
        notes = other_contents(file)
        return WeightsFile(
            file.path,
            file.tensors,
            {},
            file.size,
            file.stamp,
            notes=notes,
            groups=file.groups,
        )

    def lay_out(
        self,
        specs: Sequence[TensorSpec],
        metadata: Mapping[str, str],
        name: str,
        like: WeightsFile | None = None,
    ) -> _Layout:
        """See :class:`Container`."""
        return _Layout(lay_out(specs, archive_stem(Path(name))))


CONTAINER: Final[Container] = _TorchPickle()
