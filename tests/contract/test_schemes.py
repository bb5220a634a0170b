"""What every key scheme promises, whoever wrote it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from loratool.adapter.scheme import KeyScheme, Spelling
from loratool.adapter.slots import AdapterKey, Slot
from loratool.ops.opening import open_adapter
from loratool.schemes import builtin_schemes

dotted = st.lists(
    st.text(
        st.characters(codec="utf-8", exclude_characters=".{}", exclude_categories=["C"]), min_size=1
    ),
    min_size=1,
    max_size=6,
).map(".".join)


def spell(scheme: KeyScheme, dotted: str) -> str:
    """Return a module path as the keys of ``scheme`` have it."""
    match scheme.spelling:
        case Spelling.FLAT:
            return f"lora_{dotted.replace('.', '_')}"
        case Spelling.BARE_FLAT:
            return dotted.replace(".", "_")
        case Spelling.NATIVE:
            return f"diffusion_model.{dotted}"
        case Spelling.PIPELINE:
            return f"unet.{dotted}"
        case Spelling.POSITION:
            return f"unet:{len(dotted)}"
    return dotted


@pytest.mark.parametrize("scheme", builtin_schemes(), ids=lambda scheme: scheme.name)
class TestKeySchemeContract:
    """What every key scheme promises, whoever wrote it."""

    def test_its_example_is_its_own(self, scheme: KeyScheme) -> None:
        parsed = scheme.parse(scheme.example)
        assert parsed is not None
        assert scheme.format(parsed) == scheme.example

    def test_a_file_of_its_keys_is_told_from_all_others(
        self, scheme: KeyScheme, tmp_path: Path
    ) -> None:
        example = scheme.parse(scheme.example)
        assert example is not None
        sides = {Slot.DOWN: (2, 7), Slot.UP: (5, 2)}
        tensors = {
            scheme.format(replace(example, slot=slot)): torch.ones(
                tuple(reversed(shape)) if scheme.is_transposed else shape
            )
            for slot, shape in sides.items()
        }
        save_file(tensors, tmp_path / "a.safetensors")
        adapter = open_adapter(tmp_path / "a.safetensors")
        assert adapter.scheme == scheme.name
        (site,) = adapter.sites
        assert (site.rank, site.in_features, site.out_features) == (2, 7, 5)

    @given(path=dotted)
    def test_parse_inverts_format(self, scheme: KeyScheme, path: str) -> None:
        module = spell(scheme, path)
        adapter = "style" if scheme.spelling is Spelling.BARE_FLAT else None
        for slot in {template.slot for template in scheme.templates}:
            key = AdapterKey(module, slot, adapter)
            try:
                text = scheme.format(key)
            except KeyError:
                continue
            if not text.startswith(scheme.foreign or "\0"):
                assert scheme.parse(text) == key

    def test_slots_without_a_name_are_an_error(self, scheme: KeyScheme) -> None:
        named = {template.slot for template in scheme.templates}
        known = {template.slot for other in builtin_schemes() for template in other.templates}
        for slot in (known | {Slot("of no scheme")}) - named:
            with pytest.raises(KeyError):
                scheme.format(AdapterKey("m", slot))
            assert not scheme.has_name_for(slot)
