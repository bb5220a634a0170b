"""What ComfyUI's files say of each layer: in a tensor beside it, or in the header's metadata."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from loratool.codecs.codec import Description
from loratool.errors import FileFormatError, UnsupportedError
from loratool.files.container import read_view
from loratool.files.json import parse_json
from loratool.files.spec import StoredTensor

__all__ = ["LEAF", "METADATA", "Marks", "logical_rows"]

LEAF: Final = "comfy_quant"
"""The tensor of JSON beside a weight."""
METADATA: Final = "_quantization_metadata"
"""The key of a header's metadata with the same JSON for all layers."""
PREFIXES: Final = ("model.diffusion_model.", "diffusion_model.", "model.", "transformer.")
"""What the metadata may leave out before the names of layers."""
FORMATS: Final = frozenset(
    ("float8_e4m3fn", "float8_e5m2", "fp8", "nvfp4", "mxfp8", "int8_tensorwise")
)
LONGEST: Final = 1 << 16
"""Bytes of the JSON of one layer; real ones have a hundred."""
HINT: Final = "merge on the 16-bit original"


class Marks:
    """The formats of layers, by their modules.

    Args:
        tensors: All of a model.
        said: What it says of itself.

    Raises:
        FileFormatError: The metadata is not what it should be.
    """

    def __init__(self, tensors: Mapping[str, StoredTensor], said: Description) -> None:
        self._tensors = tensors
        text = said.metadata.get(METADATA)
        whole = parse_json(text.encode(), where=METADATA) if text is not None else {}
        layers = whole.get("layers") if isinstance(whole, dict) else None
        if text is not None and not isinstance(layers, dict):
            raise FileFormatError(METADATA, "has no object 'layers' of formats by layer")
        self._layers: dict[str, Any] = layers or {}

    def format_of(self, module: str) -> str | None:
        """Return the format that a module is marked with; ``None`` where it has no mark.

        Raises:
            FileFormatError: The mark is damaged.
            UnsupportedError: The format is none of those that are read.
        """
        where, mark = self._mark(module)
        if mark is None:
            return None
        kind = mark.get("format") if isinstance(mark, dict) else None
        if not isinstance(kind, str):
            raise FileFormatError(where, "has no 'format', which tells how its layer is stored")
        if kind not in FORMATS:
            raise UnsupportedError(module, f"is stored in ComfyUI's format {kind!r:.60}", hint=HINT)
        if mark.get("convrot"):
            raise UnsupportedError(
                module, f"is stored in ComfyUI's format {kind!r}, rotated (convrot)", hint=HINT
            )
        return kind

    def has(self, module: str) -> bool:
        """Whether something is said of a module's layer."""
        return f"{module}.{LEAF}" in self._tensors or self._layer(module) is not None

    def _mark(self, module: str) -> tuple[str, Any]:
        name = f"{module}.{LEAF}"
        stored = self._tensors.get(name)
        if stored is not None:
            if stored.spec.dtype != "U8" or stored.spec.nbytes > LONGEST:
                raise FileFormatError(
                    name, f"is {stored.spec.dtype} {list(stored.spec.shape)}, not bytes of JSON"
                )
            return name, parse_json(bytes(read_view(stored)), where=name)
        layer = self._layer(module)
        return METADATA, self._layers[layer] if layer is not None else None

    def _layer(self, module: str) -> str | None:
        """Return what the metadata call a module."""
        if module in self._layers:
            return module
        for prefix in PREFIXES:
            rest = module.removeprefix(prefix)
            is_other = f"{rest}.weight" in self._tensors
            if rest != module and rest in self._layers and not is_other:
                return rest
        return None


def logical_rows(
    tensors: Mapping[str, StoredTensor], module: str, stored: int, multiple: int
) -> int:
    """Return how many rows a weight has whose rows were padded: as many as its bias, if that fits.

    Args:
        tensors: All of a model.
        module: Whose weight it is.
        stored: Rows that are stored.
        multiple: What they were padded to.
    """
    bias = tensors.get(f"{module}.bias")
    if bias is None or len(bias.spec.shape) != 1:
        return stored
    (rows,) = bias.spec.shape
    return rows if 0 < rows <= stored < rows + multiple else stored
