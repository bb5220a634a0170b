"""What every key scheme promises, whoever wrote it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fakes.finding import FAKES, find_fakes
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from samples import NARROW

import loratool
from loratool.adapter.scheme import Context, Scheme
from loratool.adapter.slots import AdapterKey, Slot
from loratool.base.told import open_told
from loratool.errors import AdapterError
from loratool.files.containers import open_weights
from loratool.schemes import builtin_schemes, claims, scheme_named, scheme_names, weights_names
from loratool.schemes.detection import detect_scheme
from loratool.schemes.opening import open_adapter, open_as_spelled
from loratool.values.arrays import decode

NAMES = (*scheme_names(), "turned")

dotted = st.lists(
    st.text(
        st.characters(codec="utf-8", exclude_characters=".{}:", exclude_categories=["C"]),
        min_size=1,
    ),
    min_size=1,
    max_size=6,
).map(".".join)


@pytest.fixture(params=NAMES)
def scheme(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Scheme:
    """Every scheme, beside one in a single file that no list has."""
    find_fakes(monkeypatch)
    return scheme_named(request.param)


def spell(scheme: Scheme, dotted: str) -> str:
    """Return a module path as the keys of ``scheme`` have it."""
    if scheme.paths.is_whole:
        return f"unet:{len(dotted)}"
    if scheme.follows is not None or not scheme.is_written:  # whose names are those of one model
        example = scheme.keys.parse(scheme.example)
        assert example is not None
        return re.sub(r"\d+", str(len(dotted)), example.module, count=1)
    context = Context(scheme.name, scheme.keys.accepts, known=frozenset({"unet"}))
    if scheme.name in NARROW and not scheme.keys.accepts(f"unet.{dotted}"):
        example = scheme.keys.parse(scheme.example)
        assert example is not None
        return example.module.replace("0", str(len(dotted)))
    path = f"unet.{dotted}" if scheme.paths.has_components else dotted
    (name,) = scheme.paths.spell([path], context)
    return name


class TestKeySchemeContract:
    """What every key scheme promises, whoever wrote it."""

    def test_its_file_has_its_name_and_its_claim_what_it_writes(self, scheme: Scheme) -> None:
        (claim,) = [claim for claim in claims() if claim.name == scheme.name]
        assert claim.sidecar == scheme.settings.file
        if scheme.home.weights_name:
            assert scheme.home.weights_name in claim.weights
            assert scheme.home.weights_name in weights_names()

    def test_its_example_is_its_own(self, scheme: Scheme) -> None:
        parsed = scheme.keys.parse(scheme.example)
        assert parsed is not None
        assert scheme.keys.format(parsed) == scheme.example

    def test_a_file_of_its_keys_is_told_from_all_others(
        self, scheme: Scheme, tmp_path: Path
    ) -> None:
        if not scheme.keys.has_name_for(Slot.DOWN):
            pytest.skip("has factors under roles of its own")
        example = scheme.keys.parse(scheme.example)
        assert example is not None
        sides = {Slot.DOWN: (2, 7), Slot.UP: (5, 2)}
        tensors = {
            scheme.keys.format(replace(example, slot=slot)): torch.ones(
                tuple(reversed(shape)) if scheme.roles.is_transposed else shape
            )
            for slot, shape in sides.items()
        }
        save_file(tensors, tmp_path / "a.safetensors")
        assert detect_scheme(open_weights(tmp_path / "a.safetensors")) is scheme
        if scheme.name == "turned":
            (tmp_path / "turned.json").write_text(f'{{"strengths": {{"{example.module}": 2.0}}}}')
        adapter = open_as_spelled(tmp_path / "a.safetensors")
        assert adapter.scheme == scheme.name
        (site,) = adapter.sites
        assert (site.rank, site.in_features, site.out_features) == (2, 7, 5)

    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(path=dotted)
    @example(path="lora_A")
    @example(path="model.lora_down")
    def test_parse_inverts_format_and_the_claim_matches(self, scheme: Scheme, path: str) -> None:
        module = spell(scheme, path)
        adapter = "style" if scheme.keys.names_adapter else None
        (claim,) = [claim for claim in claims() if claim.name == scheme.name]
        for slot in {template.slot for template in scheme.keys.templates}:
            key = AdapterKey(module, slot, adapter)
            try:
                text = scheme.keys.format(key)
            except KeyError:
                continue
            if not re.fullmatch(scheme.keys.modules, module, re.DOTALL):
                assert scheme.keys.parse(text) != key, "its keys say that this is no module"
            elif not text.startswith(scheme.keys.foreign or "\0"):
                assert scheme.keys.parse(text) == key
                is_factor = slot in (Slot.DOWN, Slot.UP)
                assert not is_factor or claim.pattern.search(text)

    def test_every_key_that_it_reads_is_claimed(self, scheme: Scheme) -> None:
        (claim,) = [claim for claim in claims() if claim.name == scheme.name]
        module = spell(scheme, "blocks.0.attn.to_q")
        for template in scheme.keys.templates:
            text = template.text.format(module=module, adapter="style")
            parsed = scheme.keys.parse(text)
            if parsed is not None and parsed.slot in (Slot.DOWN, Slot.UP):
                assert claim.pattern.search(f"other.weight\n{text}\nanother"), text

    def test_slots_without_a_name_are_an_error(self, scheme: Scheme) -> None:
        named = {template.slot for template in scheme.keys.templates}
        known = {t.slot for other in builtin_schemes() for t in other.keys.templates}
        for slot in (known | {Slot("of no scheme")}) - named:
            with pytest.raises(KeyError):
                scheme.keys.format(AdapterKey("m", slot))
            assert not scheme.keys.has_name_for(slot)

    def test_what_is_written_again_is_the_same(self, scheme: Scheme, tmp_path: Path) -> None:
        if not scheme.is_written:
            pytest.skip("is read only")
        if scheme.paths.is_whole:
            pytest.skip("has a place for all modules of a model, or for none")
        module = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
        name = module if scheme.paths.has_components else "model.layers.0.self_attn.q_proj"
        name = NARROW.get(scheme.name, name).format(0)
        source = tmp_path / "source.safetensors"
        save_file(
            {f"{name}.lora_A.weight": torch.randn(4, 8), f"{name}.lora_B.weight": torch.ones(8, 4)},
            source,
        )
        suffix = "" if scheme.settings.file else scheme.home.suffix
        one, other = (tmp_path / number / f"a{suffix}" for number in ("1", "2"))
        for folder in (one.parent, other.parent):
            folder.mkdir()
        base = a_base(tmp_path / "base", name) if scheme.follows is not None else None
        loratool.convert(source, scheme.name, one, base=base)
        loratool.convert(one, scheme.name, other, base=base)
        told = open_told(base, needs_weights=False)[1] if base is not None else None
        (module_of_one,) = open_adapter(one, base=told).sites
        (module_of_other,) = open_adapter(other, base=told).sites
        assert module_of_one.module == module_of_other.module == name
        assert _tensors(one) == _tensors(other)


def a_base(folder: Path, module: str) -> Path:
    """Return the folder of a model that tells its architecture and its heads."""
    folder.mkdir()
    save_file({f"{module}.weight": torch.zeros(8, 8)}, folder / "model.safetensors")
    config = {"architectures": ["LlamaForCausalLM"], "num_attention_heads": 2}
    config |= {"hidden_size": 8, "intermediate_size": 8}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _tensors(path: Path) -> dict[str, list[float]]:
    weights = path if path.is_file() else open_adapter(path).weights
    tensors = open_weights(weights).tensors
    return {key: decode(stored).flatten().tolist() for key, stored in tensors.items()}


def test_only_what_is_claimed_is_imported(tmp_path: Path) -> None:
    name = "base_model.model.model.layers.0.q_proj"
    save_file(
        {f"{name}.lora_A.weight": torch.ones(2, 4), f"{name}.lora_B.weight": torch.ones(4, 2)},
        tmp_path / "a.safetensors",
    )
    code = (
        "import sys, loratool; loratool.open_adapter(sys.argv[1]);"
        "print(*sorted(m for m in sys.modules if m.startswith('loratool.schemes.')))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a.safetensors")],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    assert "loratool.schemes.peft" in found
    assert "loratool.schemes.kohya" not in found


@pytest.mark.slow
def test_plugins_are_found_only_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, "-m", "loratool", "schemes"]
    assert "turned" not in subprocess.run(command, capture_output=True, text=True).stdout
    monkeypatch.setenv("LORATOOL_PLUGINS", str(FAKES))
    assert "turned" in subprocess.run(command, capture_output=True, text=True).stdout


def test_two_schemes_that_claim_the_same_keys_are_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    find_fakes(monkeypatch)
    turned = scheme_named("turned")
    name = "model:layers:0:q_proj"
    save_file(
        {f"{name}.turned_in": torch.ones(4, 2), f"{name}.turned_out": torch.ones(2, 4)},
        tmp_path / "a.safetensors",
    )
    file = open_weights(tmp_path / "a.safetensors")
    twin = replace(turned, name="twin")
    with pytest.raises(AdapterError, match=r"may be 'turned' or 'twin'"):
        detect_scheme(file, [turned, twin])
    assert detect_scheme(file, [turned, replace(twin, priority=1)]).name == "twin"
    assert len(builtin_schemes()) == len(NAMES)
