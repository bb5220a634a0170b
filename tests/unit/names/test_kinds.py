"""Where in a model a module is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loratool.names.kinds import Position, positions_of


@pytest.mark.parametrize(
    ("module", "section", "kind", "layer"),
    [
        ("unet.down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q", "unet down",
         "attn1.to_q", "1.0.1"),
        ("unet.mid_block.attentions.0.transformer_blocks.3.ff.net.0.proj", "unet mid",
         "ff.net.0.proj", "0.3"),
        ("unet.up_blocks.0.attentions.1.transformer_blocks.1.attn2.to_out.0", "unet up",
         "attn2.to_out.0", "0.1.1"),
        ("unet.down_blocks.0.resnets.1.conv1", "unet down", "conv1", "0.1"),
        ("unet.conv_in", "unet", "conv_in", "-"),
        ("text_encoder.text_model.encoder.layers.3.self_attn.q_proj", "te1",
         "self_attn.q_proj", "3"),
        ("text_encoder_2.text_model.encoder.layers.31.mlp.fc1", "te2", "mlp.fc1", "31"),
    ],
)  # fmt: skip
def test_a_pipeline_has_sections(module: str, section: str, kind: str, layer: str) -> None:
    others = ["unet.conv_out", "text_encoder.text_model.encoder.layers.0.mlp.fc1"]
    found = positions_of([module, *others])[0]
    assert (found.section, found.kind, found.layer) == (section, kind, layer)


def test_a_language_model_is_one_section() -> None:
    names = [
        "model.layers.0.self_attn.q_proj",
        "model.layers.11.mlp.experts.3.gate_proj",
        "lm_head",
    ]
    assert positions_of(names) == (
        Position("", "self_attn.q_proj", (0,)),
        Position("", "mlp.experts.gate_proj", (11,), (3,)),
        Position("", "lm_head", ()),
    )


def test_lists_of_blocks_are_sections() -> None:
    names = ["transformer.transformer_blocks.3.attn.to_q",
             "transformer.single_transformer_blocks.3.attn.to_q"]  # fmt: skip
    assert [p.row for p in positions_of(names)] == [
        "transformer_blocks attn.to_q",
        "single_transformer_blocks attn.to_q",
    ]
    sides = ["model.encoder.layers.0.fc1", "model.decoder.layers.0.fc1"]
    assert [p.section for p in positions_of(sides)] == [
        "model.encoder.layers",
        "model.decoder.layers",
    ]


@given(st.lists(st.text(alphabet="ab.019_", max_size=30), max_size=4))
def test_any_name_has_a_position(names: list[str]) -> None:
    for name, position in zip(names, positions_of(names), strict=True):
        assert position.kind or not name
        assert all(number >= 0 for number in position.numbers)
    assert positions_of(["a." + "9" * 6000 + ".b"])[0].numbers == ()
