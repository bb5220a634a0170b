"""Parts of a pipeline, and tables of its modules by them."""

from __future__ import annotations

import pytest

from loratool.display.document import Group
from loratool.names.sections import module_groups, section_of, shared_path

DOWN = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
TEXT = "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("module", "section"),
    [
        (DOWN, "unet down"),
        ("unet.mid_block.attentions.0.proj_in", "unet mid"),
        ("unet.up_blocks.0.attentions.0.proj_in", "unet up"),
        ("unet.time_embedding.linear_1", "unet"),
        (TEXT.replace("_2", ""), "te1"),
        (TEXT, "te2"),
        ("transformer.single_transformer_blocks.0.attn.to_q", "transformer"),
        ("model.layers.0.self_attn.q_proj", ""),
    ],
)
def test_sections(module: str, section: str) -> None:
    assert section_of(module) == section


def test_what_paths_share() -> None:
    assert shared_path(["unet.down.0.q", "unet.down.1.q"]) == "unet.down"
    assert shared_path(["a.b.c.0.q", "a.b.c.1.q"]) == "a.b"
    assert shared_path(["a.b"]) == "a"
    assert shared_path(["a"]) == ""


def test_rows_are_grouped_by_sections_and_have_the_rest_of_the_path() -> None:
    names = [DOWN, DOWN.replace("to_q", "to_k"), TEXT]
    found = module_groups(names, names, lambda folded, members: (folded, len(members)))
    block = "1.attentions.0.transformer_blocks.0.attn1"
    assert found == [
        Group(
            "unet down (unet.down_blocks)",
            (((f"{block}.to_q",), 1), ((f"{block}.to_k",), 1)),
        ),
        Group("te2 (text_encoder_2.text_model)", ((("encoder.layers.0.self_attn.q_proj",), 1),)),
    ]


def test_many_kinds_of_modules_are_rows_by_what_they_are_in() -> None:
    names = [f"model.layers.{n}.mlp.w{i}" for n in range(2) for i in range(30)]
    (group,) = module_groups(names, names, lambda folded, members: (folded, len(members)))
    assert [row[1] for row in group.rows] == [60]
    (group,) = module_groups(names, names, lambda folded, members: (folded,), unfolded=True)
    assert len(group.rows) == 60
