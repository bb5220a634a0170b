"""Stable Diffusion XL in one file, as Stability's code names its parts: base and refiner."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from loratool.base.layout import Headers
from loratool.base.single_file import Section, SingleFile
from loratool.names.pipelines import AVERAGES, VAE

__all__ = ["LAYOUT"]

ENCODERS: Final = "conditioner.embedders."


class StableDiffusionXL(SingleFile):
    """Two text encoders in a list; the refiner has the larger one alone, which is first there."""

    name = "stable-diffusion-xl"
    usual = ("sdxl", "sdxl-refiner")

    def claims(self, headers: Headers) -> int:
        return 4 if any(module.startswith(ENCODERS) for module in headers.modules) else 0

    def sections(self, headers: Headers) -> Sequence[Section]:
        return (
            Section(f"{ENCODERS}0.transformer.", "text_encoder"),
            Section(f"{ENCODERS}1.model.", "text_encoder_2", is_open_clip=True),
            Section(f"{ENCODERS}0.model.", "text_encoder_2", is_open_clip=True),
            Section("first_stage_model.", VAE),
            Section("model_ema", AVERAGES),
        )


LAYOUT = StableDiffusionXL()
