"""Stable Diffusion 1 and 2 in one file, as the code of latent diffusion names their parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from loratool.base.layout import Headers
from loratool.base.single_file import Section, SingleFile
from loratool.names.pipelines import AVERAGES, VAE

__all__ = ["LAYOUT"]

ENCODER: Final = "cond_stage_model."


class StableDiffusion(SingleFile):
    """One text encoder: CLIP in transformers' names, or OpenCLIP's larger one in its own."""

    name = "stable-diffusion"
    usual = ("sd1",)

    def claims(self, headers: Headers) -> int:
        return 4 if any(module.startswith(ENCODER) for module in headers.modules) else 0

    def sections(self, headers: Headers) -> Sequence[Section]:
        return (
            Section(f"{ENCODER}transformer.", "text_encoder"),
            Section(f"{ENCODER}model.", "text_encoder", is_open_clip=True),
            Section("first_stage_model.", VAE),
            Section("model_ema", AVERAGES),
        )


LAYOUT = StableDiffusion()
