"""A pipeline in one file as ComfyUI saves it: of any family, with or without text encoders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from loratool.base.layout import Headers
from loratool.base.single_file import BACKBONES, Section, SingleFile, backbone_prefix
from loratool.names.paths import plausible_families
from loratool.names.pipelines import COMFY_ENCODERS, VAE, encoder_component

__all__ = ["LAYOUT"]

ENCODERS: Final = "text_encoders."
AUTOENCODERS: Final = ("vae.", "first_stage_model.")
MARKS: Final = (*BACKBONES[:2], ENCODERS)


class Comfy(SingleFile):
    """Text encoders behind their names, each a model of transformers."""

    name = "comfy"

    def claims(self, headers: Headers) -> int:
        return 3 if any(module.startswith(MARKS) for module in headers.modules) else 0

    def sections(self, headers: Headers) -> Sequence[Section]:
        inside = (m.removeprefix(ENCODERS) for m in headers.modules if m.startswith(ENCODERS))
        names = dict.fromkeys(local.partition(".")[0] for local in inside)
        prefix = backbone_prefix(headers.modules)
        families = plausible_families(
            [m.removeprefix(prefix) for m in headers.modules if prefix and m.startswith(prefix)]
        )
        family = families[0].name if len(families) == 1 else None
        family = family or COMFY_ENCODERS.family(tuple(names), families)
        found = [Section(prefix, VAE) for prefix in AUTOENCODERS]
        for name in names:
            component = encoder_component(name, family, COMFY_ENCODERS)
            if component is not None:
                found += [
                    Section(f"{ENCODERS}{name}.transformer.", component),
                    Section(f"{ENCODERS}{name}.", component),
                ]
        return found


LAYOUT = Comfy()
