"""Names whose numbers are none, or longer than any: every verb says what it says of any name."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import loratool
from loratool.errors import LoratoolError

OTHER_HALF = {
    "lora_down": "lora_up",
    "lora_A": "lora_B",
    "lora_a": "lora_b",
    "linear_in": "linear_out",
    "down": "up",
    "w_a": "w_b",
    ".in": ".out",
}
EXAMPLES = {scheme.name: scheme.example for scheme in loratool.schemes()} | {
    "trtllm": "layer.0.module.1.rank.8.in",
    "experts": "base_model.model.model.layers.0.mlp.experts.3.down_proj.lora_A.weight",
    "blocks": "diffusion_model.joint_blocks.0.context_block.adaLN_modulation.1.lora_A.weight",
}


@pytest.mark.parametrize("word", ["9" * 5000, "9" * 19, "²", "٣", "00"], ids=len)
@pytest.mark.parametrize("example", EXAMPLES.values(), ids=EXAMPLES)
def test_names_with_odd_numbers(example: str, word: str, tmp_path: Path) -> None:
    number = re.search(r"\d+", example)
    if number is None:
        return
    down = f"{example[: number.start()]}{word}{example[number.end() :]}"
    up = next(down.replace(a, b, 1) for a, b in OTHER_HALF.items() if a in down)
    path = tmp_path / "odd.safetensors"
    pair = {down: np.ones((2, 4), np.float32), up: np.ones((4, 2), np.float32)}
    plain = {key.replace(word, "1", 1): value for key, value in pair.items()}
    save_file(plain | pair, path)
    for ask in (
        lambda: str(loratool.inspect(path)),
        lambda: loratool.write_page(loratool.inspect(path, spectrum=True), tmp_path / "page.html"),
        lambda: str(loratool.validate(path, deep=True, target="mlx")),
        lambda: str(loratool.compare([path, path])),
        lambda: str(loratool.compare_layers(path)),
        *(
            lambda to=to: loratool.convert(path, to, tmp_path / "out", alpha=2, dry_run=True)
            for to in ("peft", "mlx", "trtllm", "comfy")
        ),
    ):
        with suppress(LoratoolError):
            ask()
