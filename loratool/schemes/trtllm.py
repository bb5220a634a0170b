"""TensorRT-LLM's own form: rows of numbers in NumPy arrays, the scale in B."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from loratool.adapter.keys import KeyTable, Template
from loratool.adapter.model import Site
from loratool.adapter.part import Part
from loratool.adapter.scaling import Scaling
from loratool.adapter.scheme import Home, NoPlaceError, Scheme, Told, Written
from loratool.adapter.slots import AdapterKey, Slot
from loratool.errors import AdapterError, UnsupportedError
from loratool.files.dtypes import DTYPES
from loratool.files.npy import SHAPES, format_npy_header
from loratool.files.spec import StoredTensor
from loratool.names.gguf import architecture_of, attention_in_config
from loratool.names.paths.trtllm import LONGEST, MODULE, NUMBERS, TrtllmPaths
from loratool.schemes.parts.model import described
from loratool.schemes.parts.roles import Roles
from loratool.schemes.parts.scales import FoldedScale
from loratool.schemes.parts.settings import Settings

__all__ = ["CLAIM", "SCHEME"]

CLAIM: Final = {
    "keys": r"^layer\.\d+\.module\.\d+(\.rank\.\d+)?(\.dora|\.in|\.out)?$",
    "weights": ("model.lora_weights.npy",),
    "sidecar": "model.lora_config.npy",
}

BOTH: Final = Slot("both factors")
SIDES: Final = {"in": Slot.DOWN, "out": Slot.UP}
HALF: Final = re.compile(
    r"(?P<module>layer\.[0-9]{1,9}\.module\.[0-9]{1,9}(\.rank\.[0-9]{1,9})?)\.(?P<side>in|out)",
    re.ASCII,
)
LIKE_LLAMA: Final = frozenset(
    ("llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "olmo", "olmo2", "mistral3", "phi3")
)
"""llama.cpp's names of kinds of model whose modules are those of Llama's."""


class RowKeys(KeyTable):
    """Names that the container gives to rows, and takes for their halves."""

    def _parse(self, key: str) -> AdapterKey | None:
        match = HALF.fullmatch(key)
        if match is not None:
            return AdapterKey(match["module"], SIDES[match["side"]])
        return AdapterKey(key, BOTH) if MODULE.fullmatch(key) else None

    def format(self, key: AdapterKey) -> str:
        if key.slot is BOTH:
            return key.module
        return super().format(key)


@dataclass(frozen=True, slots=True)
class Sizes:
    """How wide the layers of a model are.

    Attributes:
        hidden: Inputs of a block.
        query: Rows of queries.
        key: Rows of keys, and of values.
        inner: Inside the MLP.
        is_fused: Whether the model has gate and up in one: the converter exchanges the two.
    """

    hidden: int
    query: int
    key: int
    inner: int
    is_fused: bool = False

    def of(self, module: int) -> tuple[int, dict[str, int]]:
        """Return the inputs of a module, and the outputs of its parts in their order."""
        both = {"up": self.inner, "gate": self.inner}
        return {
            0: (self.hidden, {"q": self.query, "k": self.key, "v": self.key}),
            1: (self.hidden, {"": self.query}),
            2: (self.hidden, {"": self.key}),
            3: (self.hidden, {"": self.key}),
            4: (self.query, {"": self.hidden}),
            5: (self.hidden, both if self.is_fused else {"": self.inner}),
            6: (self.inner, {"": self.hidden}),
            7: (self.hidden, {"": self.inner}),
            18: (self.hidden, both),
        }.get(module, (0, {}))


@dataclass(frozen=True)
class RowRoles(Roles):
    """A and B one after the other.

    Attributes:
        sizes: How wide the layers are, where something tells.
    """

    sizes: Sizes | None = None

    def stored(self, part: Part) -> Part:
        """Return ``part`` as both halves of its row.

        Raises:
            NoPlaceError: It has more than A and B.
        """
        if Slot.MAGNITUDE in part.values:
            # The converter that is known takes A and B alone, and passes over magnitudes.
            raise NoPlaceError("magnitudes", Slot.MAGNITUDE)
        return super().stored(part)

    def apart(self, site: Site) -> list[Site]:
        """Return the projections that a row is, where that is known.

        Raises:
            AdapterError: The row is too short for them.
            UnsupportedError: It has magnitudes too.
        """
        row, match = site.slots.get(BOTH), MODULE.fullmatch(site.module)
        if row is None or match is None:
            return [site]
        if match["dora"]:
            raise UnsupportedError(
                site.module,
                "has magnitudes (DoRA) behind its factors, which is not read",
                hint="take the PEFT adapter that it was converted from",
            )
        if self.sizes is None:
            return [site]
        rank = int(match["rank"])
        into, parts = self.sizes.of(int(match["module"]))
        outputs = sum(parts.values())
        if not parts or not rank:
            return [site]
        if rank * (into + outputs) > row.spec.elements:
            raise AdapterError(
                site.module,
                f"has {row.spec.elements} numbers; factors of rank {rank} for {into} inputs and "
                f"{outputs} outputs have {rank * (into + outputs)}",
                hint="is this the base that it was trained on?",
                code="LT022",
            )
        return list(_apart(site, row, rank, into, parts))


def _apart(
    site: Site, row: StoredTensor, rank: int, into: int, parts: Mapping[str, int]
) -> Iterator[Site]:
    down, first = _view(row, 0, (rank, into)), rank * into
    for name, out in parts.items():
        yield replace(
            site,
            module=f"{site.module}.{name}" if name else site.module,
            slots={Slot.DOWN: down, Slot.UP: _view(row, first, (out, rank))},
            scaling=Scaling(float(rank), rank),
            settings={LONGEST: row.spec.elements},
        )
        first += out * rank


def _view(row: StoredTensor, first: int, shape: tuple[int, ...]) -> StoredTensor:
    offset = row.offset + DTYPES[row.spec.dtype].size(first)
    return replace(row, spec=replace(row.spec, shape=shape), offset=offset)


@dataclass(frozen=True)
class RowSettings(Settings):
    """The table of what each row is; the scale is in B."""

    file: str = "model.lora_config.npy"

    def load(self, path: Path) -> dict[str, Any]:
        """Return nothing: the container has read the table."""
        return {}

    def config(self, written: Written) -> dict[str, Any] | None:
        """Return the module, the layer and the rank of each row, and the widths of its halves."""
        rows, shapes = [], {}
        for item in written.modules:
            match = NUMBERS.fullmatch(item.name)
            if match is not None:
                part = item.part
                rows.append((int(match["layer"]), int(match["module"]), part.rank))
                shapes[item.name] = [part.down.shape[1], part.up.shape[0]]
        ordered = [(module, layer, rank) for layer, module, rank in sorted(rows)]
        return {"rows": ordered, "shapes": shapes}

    def dump(self, config: Mapping[str, Any]) -> Mapping[str, bytes]:
        """Return the array, and the widths, which are loratool's own and nowhere else."""
        rows = config["rows"]
        header = format_npy_header("I32", (1, len(rows), 3))
        table = header + b"".join(struct.pack("<3i", *row) for row in rows)
        widths = (json.dumps(config["shapes"]) + "\n").encode()
        return {self.file: table, SHAPES: widths}

    def read(
        self,
        sites: tuple[Site, ...],
        metadata: Mapping[str, str],
        sidecar: Mapping[str, Any] | None,
        where: Path,
    ) -> tuple[Site, ...]:
        """Return ``sites`` with the scale of 1 that the format means."""
        found = []
        for site in sites:
            match = MODULE.fullmatch(site.module)
            rank = int(match["rank"]) if match is not None else site.rank
            found.append(replace(site, scaling=Scaling(float(rank or 1), rank or 1)))
        return tuple(found)


def _following(told: Told) -> Scheme:
    """Return the scheme for the widths of one model."""
    config = described(told)
    architecture = architecture_of(config)
    attention = attention_in_config(config)
    heads = attention.at(None) if attention is not None else None
    hidden, inner = (_count(config, key) for key in ("hidden_size", "intermediate_size"))
    if heads is None or not hidden or not inner:
        return SCHEME
    if architecture is None or architecture.name not in LIKE_LLAMA:
        return SCHEME
    size = _count(config, "head_dim") or hidden // heads.query
    is_fused = architecture.name == "phi3"
    sizes = Sizes(hidden, heads.query * size, heads.key * size, inner, is_fused)
    return replace(SCHEME, roles=RowRoles(has_convolutions=False, sizes=sizes))


def _count(fields: Mapping[str, Any], key: str) -> int:
    value = fields.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


SCHEME = Scheme(
    name="trtllm",
    summary="TensorRT-LLM: model.lora_weights.npy, rows of numbers",
    example="layer.0.module.1.rank.8",
    keys=RowKeys(
        templates=(
            Template("{module}", BOTH, is_factor=True),
            Template("{module}.in", Slot.DOWN),
            Template("{module}.out", Slot.UP),
        ),
    ),
    paths=TrtllmPaths(),
    scale=FoldedScale(),
    roles=RowRoles(has_convolutions=False),
    settings=RowSettings(),
    home=Home(weights_name="model.lora_weights.npy", suffix=".npy"),
    priority=4,
    follows=_following,
)
