"""Modules that are alike go into one row."""

from __future__ import annotations

from loratool.display.grouping import group_modules, kind_of


def test_what_a_module_is_in() -> None:
    assert kind_of("model.layers.3.self_attn.q_proj") == "model.layers.*.self_attn"
    assert kind_of("block.0.attn1.to_out.0") == kind_of("block.1.attn1.to_q") == "block.*.attn1"
    assert kind_of("block.0.ff.net.0.proj") == kind_of("block.1.ff.net.2") == "block.*.ff"
    assert kind_of("lm_head") == "lm_head"


def test_names_that_do_not_fold_into_one_have_stars() -> None:
    names = ["down.0.layers.0.q", "down.0.layers.1.q", "down.1.layers.7.k"]
    assert group_modules(range(3), names, lambda name: "all") == [
        (("down.*.layers.*.{q,k}",), [0, 1, 2])
    ]
    assert group_modules(range(2), names[:2]) == [(("down.0.layers.{0,1}.q",), [0, 1])]
