"""kohya-ss/sd-scripts and LyCORIS: flattened module paths, alpha beside the factors."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from loratool.adapter.keys import KeyTable, Template
from loratool.adapter.model import Kind
from loratool.adapter.part import Part
from loratool.adapter.scheme import Home, Scheme, Written
from loratool.adapter.slots import Slot
from loratool.files.json import as_text
from loratool.files.safetensors import format_header
from loratool.files.spec import TensorSpec
from loratool.names.families import family_named
from loratool.names.family import Release
from loratool.names.paths.flat import FlatPaths
from loratool.schemes.parts.roles import LycorisRoles
from loratool.schemes.parts.scales import AlphaScale
from loratool.schemes.parts.settings import Settings
from loratool.schemes.parts.tokens import BundledTokens
from loratool.variants import variant_templates

__all__ = ["CLAIM", "SCHEME"]

CLAIM: Final = {"keys": r"^(lora|lycoris|oft|boft|Hunyuan_video_I2V_lora)_[^.]+\.\w"}

HASH_KEY: Final = "sshs_model_hash"
LEGACY_HASH_KEY: Final = "sshs_legacy_hash"
LEGACY_SPAN: Final = (0x100000, 0x110000)
BLOCK: Final = 4 << 20


class KohyaSettings(Settings):
    """The keys that sd-scripts, A1111 and their like read (``ss_*``, ``modelspec.*``)."""

    def metadata(self, written: Written) -> dict[str, str]:
        """Return them, as far as they are true of what is written."""
        parts = [item.part for item in written.modules]
        linear = [part for part in parts if part.kind is not Kind.CONV] or list(parts)
        convolutions = [part for part in parts if part.kind is Kind.CONV and part.is_plain]
        kernels = [part for part in convolutions if set(part.down.shape[2:]) != {1}]
        is_lycoris = not all(part.variant.is_plain for part in parts)
        arguments = {}
        if kernels:
            arguments = {
                "conv_dim": _common([str(part.rank) for part in kernels]),
                "conv_alpha": _common([_number(part.written_alpha) for part in kernels]),
            }
        release = _release(parts, written.family)
        found = {
            "ss_v2": str(release is not None and release.is_v2),
            "ss_network_module": "lycoris.kohya" if is_lycoris else "networks.lora",
            "ss_network_dim": _common([str(part.rank) for part in linear]),
            "ss_network_alpha": _common([_number(part.written_alpha) for part in linear]),
            "ss_network_args": json.dumps(arguments) if arguments else "null",
            "ss_output_name": as_text(written.title),
        }
        if release is not None:
            if "ss_base_model_version" not in written.metadata:
                found["ss_base_model_version"] = release.base_version
            found |= {
                "modelspec.sai_model_spec": "1.0.1",
                "modelspec.architecture": f"{release.architecture}/lora",
                "modelspec.implementation": release.implementation,
            }
        has_spec = any(key.startswith("modelspec.") for key in (*found, *written.metadata))
        if has_spec and written.metadata.get("modelspec.title", written.stem) == written.stem:
            found["modelspec.title"] = as_text(written.title)
        return found


def _release(parts: Sequence[Part], name: str | None) -> Release | None:
    """Return what metadata call the model that the modules are of."""
    if name is None:
        return None
    family = family_named(name)
    widths = {
        part.down.shape[1]
        for part in parts
        if part.is_plain and part.module.endswith(family.told_by)
    }
    return family.release(widths)


def _common(values: Sequence[str]) -> str:
    unique = set(values)
    return unique.pop() if len(unique) == 1 else "Dynamic"


def _number(value: float) -> str:
    """Return an alpha as its tensor holds it, in float32."""
    (value,) = struct.unpack("<f", struct.pack("<f", value))
    return f"{value:.12g}"


@dataclass(frozen=True, slots=True)
class KohyaSeal:
    """sd-scripts' hashes: of all data, and of 64 kB at a fixed place with training metadata."""

    @property
    def room(self) -> Mapping[str, str]:
        """The keys, with zeros for their values."""
        return {HASH_KEY: "0" * 64, LEGACY_HASH_KEY: "0" * 8}

    def close(
        self,
        read: Callable[[int, memoryview], None],
        size: int,
        specs: Sequence[TensorSpec],
        metadata: Mapping[str, str],
    ) -> Mapping[str, str]:
        """Return the hashes; the older one is of a file whose header has training metadata only."""
        whole = hashlib.sha256()
        buffer = memoryview(bytearray(BLOCK))
        for offset in range(0, size, BLOCK):
            view = buffer[: min(BLOCK, size - offset)]
            read(offset, view)
            whole.update(view)
        kept = {key: text for key, text in metadata.items() if key.startswith("ss_")}
        header = format_header(specs, kept)
        first, last = LEGACY_SPAN
        piece = header[first:last]
        begin = max(first, len(header)) - len(header)
        end = min(last - len(header), size)
        if begin < end:
            view = memoryview(bytearray(end - begin))
            read(begin, view)
            piece += bytes(view)
        return {
            HASH_KEY: whole.hexdigest(),
            LEGACY_HASH_KEY: hashlib.sha256(piece).hexdigest()[:8],
        }


SCHEME = Scheme(
    name="kohya",
    summary="sd-scripts, LyCORIS, A1111: flattened paths and alphas",
    example="lora_unet_mid_block_attentions_0_proj_in.lora_down.weight",
    keys=KeyTable(
        modules=r"(lora|lycoris|oft|boft|Hunyuan_video_I2V_lora)_[^.]+",
        templates=(
            Template("{module}.lora_down.weight", Slot.DOWN),
            Template("{module}.lora_up.weight", Slot.UP),
            Template("{module}.lora_mid.weight", Slot.MID),
            Template("{module}.alpha", Slot.ALPHA),
            Template("{module}.dora_scale", Slot.MAGNITUDE),
            *variant_templates("{module}"),
            Template("{module}.weight", Slot.IA3, is_factor=True),
            # Also read.
            Template("{module}.lora_A.weight", Slot.DOWN),
            Template("{module}.lora_B.weight", Slot.UP),
            Template("{module}.lora_B.bias", Slot.UP_BIAS),
            Template("{module}.lora_magnitude_vector", Slot.MAGNITUDE),
        ),
    ),
    paths=FlatPaths(),
    scale=AlphaScale(),
    roles=LycorisRoles(),
    settings=KohyaSettings(
        stale=r"sshs_.*|ss_network_.*|ss_output_name|modelspec\.hash_sha256",
        naming=r"modelspec\.(implementation|sai_model_spec|architecture)",
    ),
    home=Home(tokens=BundledTokens(are_stacks=True)),
    seal=KohyaSeal(),
    resembles=((r"lora_unet_|lora_te\d?_|lora_transformer_", "flattened names without factors"),),
)
