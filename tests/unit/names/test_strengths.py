"""Weights by pattern: order, multiplication, binding, and what modules are called."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from samples import lora

from loratool.adapter.model import Adapter
from loratool.errors import OptionError
from loratool.names.strengths import Weights, strengths, with_strengths
from loratool.schemes.opening import open_adapter

SDXL = (
    "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
    "lora_unet_input_blocks_8_1_transformer_blocks_0_attn1_to_q",
    "lora_unet_output_blocks_0_0_in_layers_2",
    "lora_te1_text_model_encoder_layers_0_self_attn_q_proj",
    "lora_te2_text_model_encoder_layers_31_mlp_fc1",
)
FLUX = (
    "lora_unet_double_blocks_3_img_attn_qkv",
    "lora_unet_double_blocks_8_img_mlp_0",
    "lora_unet_single_blocks_0_linear2",
    "lora_te1_text_model_encoder_layers_0_self_attn_q_proj",
    "lora_te3_encoder_block_0_layer_0_SelfAttention_q",
)
LLAMA = tuple(
    f"model.layers.{layer}.{name}"
    for layer in (0, 1, 11, 12)
    for name in ("self_attn.q_proj", "mlp.up_proj")
)


def opened(folder: Path, name: str, modules: tuple[str, ...]) -> Adapter:
    """Return an adapter of these modules, under kohya's names or as dotted paths."""
    tensors = {}
    for module in modules:
        if module.startswith("lora_"):
            tensors[f"{module}.lora_down.weight"] = torch.ones(1, 4)
            tensors[f"{module}.lora_up.weight"] = torch.ones(4, 1)
            tensors[f"{module}.alpha"] = torch.tensor(1.0)
        else:
            tensors |= lora(module, 4, 4, 1)
    save_file(tensors, folder / f"{name}.safetensors")
    return open_adapter(folder / f"{name}.safetensors")


def weighed(adapter: Adapter, *weights: str | float) -> dict[str, float]:
    """Return the weight of each module of one adapter, by what its file calls it."""
    (found,) = strengths([adapter], weights)
    return {site.spelled or site.module: found.of(site) for site in adapter.sites}


def meant(adapter: Adapter, pattern: str) -> set[str]:
    """Return what a pattern means in one adapter."""
    return {name for name, weight in weighed(adapter, f"{pattern}=7").items() if weight == 7}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def sdxl(folder: Path) -> Adapter:
    return opened(folder, "style", SDXL)


@pytest.fixture(scope="module")
def llama(folder: Path) -> Adapter:
    return opened(folder, "llama", LLAMA)


@pytest.mark.parametrize(
    ("pattern", "places"),
    [
        ("unet", {0, 1, 2}),
        ("diffusion_model", {0, 1, 2}),
        ("te", {3, 4}),
        ("te1", {3}),
        ("text_encoder", {3}),
        ("clip_l", {3}),
        ("te2", {4}),
        ("text_encoder_2", {4}),
        ("clip_g", {4}),
        ("input_blocks.0-7", {0}),
        ("down_blocks.1-2", {0, 1}),
        ("down_blocks.2", {1}),
        ("up_blocks", {2}),
        ("te2.encoder.layers.24-31", {4}),
        ("layers.0-11", {3}),
        ("lora_te1_*", {3}),
        ("attn1", {0, 1}),
        ("*.mlp", {4}),
        ("re:to_q$", {0, 1}),
        ("re:^lora_unet_(in|out)put", {0, 1, 2}),
    ],
)
def test_components_blocks_and_names_of_sdxl(sdxl: Adapter, pattern: str, places: set[int]) -> None:
    assert meant(sdxl, pattern) == {SDXL[place] for place in places}


@pytest.mark.parametrize(
    ("pattern", "places"),
    [
        ("double_blocks.3-7", {0}),
        ("transformer_blocks.0-18", {0, 1}),
        ("unet", {0, 1, 2}),
        ("transformer", {0, 1, 2}),
        ("te1", {3}),
        ("te3", {4}),
        ("t5xxl", {4}),
        ("text_encoder_2", {4}),
        ("te", {3, 4}),
        ("img_attn", {0}),
        ("single_transformer_blocks", {2}),
    ],
)
def test_components_blocks_and_names_of_flux(folder: Path, pattern: str, places: set[int]) -> None:
    assert meant(opened(folder, "flux", FLUX), pattern) == {FLUX[place] for place in places}


def test_a_part_of_a_fused_projection_has_no_weight_of_its_own(folder: Path) -> None:
    adapter = opened(folder, "flux", FLUX)
    with pytest.raises(OptionError, match=r"'to_q' means a part of .*one module") as error:
        weighed(adapter, "to_q=0.5")
    followed = (error.value.hint or "").removeprefix("weigh all of it: ")
    assert meant(adapter, followed) == {FLUX[0]}


def test_a_part_of_a_fused_projection_is_in_its_native_block(folder: Path) -> None:
    names = ("attn.to_q", "attn.to_k", "attn.add_q_proj")
    hub = tuple(f"transformer.transformer_blocks.4.{name}" for name in names)
    adapter = opened(folder, "hub", hub)
    assert meant(adapter, "double_blocks.3-7") == set(hub)
    assert meant(adapter, "img_attn") == set(hub[:2])


def test_a_model_of_a_pipeline_alone_is_called_as_in_the_pipeline(folder: Path) -> None:
    """PEFT's own files begin inside the model that they are for."""
    flux = ("transformer_blocks.4.attn.to_q", "transformer_blocks.9.ff.net.2")
    adapter = opened(folder, "alone", flux)
    assert meant(adapter, "double_blocks.3-7") == {flux[0]}
    assert meant(adapter, "transformer") == meant(adapter, "unet") == set(flux)
    text = opened(folder, "text", ("text_model.encoder.layers.7.mlp.fc1",))
    assert (
        meant(text, "te") == meant(text, "text_encoder") == {"text_model.encoder.layers.7.mlp.fc1"}
    )


def test_names_that_are_not_known_are_meant_by_what_the_file_says(folder: Path) -> None:
    odd = ("lora_unet_strange_thing_3_wobble", "lora_te1_strange_thing_3_wobble")
    adapter = opened(folder, "odd", odd)
    assert set(adapter.unresolved) == set(odd)
    assert meant(adapter, "unet") == {odd[0]}
    assert meant(adapter, "te1") == meant(adapter, "te") == {odd[1]}
    assert meant(adapter, "strange_thing_*") == set(odd)


def test_layers_of_language_models(llama: Adapter) -> None:
    assert meant(llama, "layers.0-11") == set(LLAMA[:6])
    assert meant(llama, "layers.1-1") == set(LLAMA[2:4])
    assert meant(llama, "layers.12.mlp") == {LLAMA[7]}
    assert meant(llama, "layers.*.q_proj") == set(LLAMA[::2])


PATTERNS = ("self_attn", "mlp", "layers.0-1", "layers.11-12", "re:proj", "up_proj", "1:mlp")
NUMBERS = st.sampled_from([0.0, 0.25, -0.5, 1.0, 2.0, 3.5])
ENTRIES = st.lists(st.tuples(st.sampled_from(PATTERNS), NUMBERS), max_size=5)


@given(number=NUMBERS, entries=ENTRIES)
def test_the_last_match_counts_and_multiplies_the_number(
    llama: Adapter, number: float, entries: list[tuple[str, float]]
) -> None:
    expected = dict.fromkeys(LLAMA, number)
    for pattern, factor in entries:
        for name in meant(llama, pattern):
            expected[name] = number * factor
    assert weighed(llama, number, *(f"{p}={n!r}" for p, n in entries)) == expected


@given(number=NUMBERS, entries=ENTRIES, place=st.integers(0, 5))
def test_numbers_may_stand_anywhere_between_the_patterns(
    llama: Adapter, number: float, entries: list[tuple[str, float]], place: int
) -> None:
    texts: list[str | float] = [f"{pattern}={factor!r}" for pattern, factor in entries]
    mixed = [*texts[:place], number, *texts[place:]]
    assert weighed(llama, *mixed) == weighed(llama, number, *texts)
    assert weighed(llama, *map(str, mixed)) == weighed(llama, number, *texts)


@given(entries=st.dictionaries(st.sampled_from(PATTERNS[:-1]), NUMBERS, max_size=4))
def test_a_mapping_is_its_patterns_in_order(llama: Adapter, entries: dict[str, float]) -> None:
    texts = [f"{pattern}={factor!r}" for pattern, factor in entries.items()]
    assert strengths([llama], entries) == strengths([llama], texts)


@given(
    numbers=st.lists(NUMBERS, max_size=2),
    entries=st.lists(
        st.tuples(st.sampled_from([None, "1", "2"]), st.sampled_from(PATTERNS[:-1])),
        max_size=4,
    ),
)
def test_an_unbound_pattern_is_one_that_is_bound_to_each(
    llama: Adapter, numbers: list[float], entries: list[tuple[str | None, str]]
) -> None:
    adapters = [llama, llama]
    one: list[str | float] = list(numbers)
    other: list[str | float] = list(numbers)
    for place, (bound, pattern) in enumerate(entries):
        one.append(f"{f'{bound}:' if bound else ''}{pattern}={place}")
        other += [f"{index}:{pattern}={place}" for index in ([bound] if bound else ["1", "2"])]
    assert strengths(adapters, one) == strengths(adapters, other)


def test_a_pattern_is_bound_by_place_or_by_the_name_of_the_file(
    llama: Adapter, sdxl: Adapter
) -> None:
    both = [llama, sdxl]
    for bound in ("2:te1=0.5", "style:te1=0.5"):
        first, second = strengths(both, [0.5, 0.5, bound])
        assert set(map(first.of, llama.sites)) == {0.5}
        assert sorted(map(second.of, sdxl.sites)) == [0.25, 0.5, 0.5, 0.5, 0.5]


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        (["te1"], "neither a number nor PATTERN=NUMBER"),
        (["te1=half"], "neither a number nor PATTERN=NUMBER"),
        (["te1=nan"], "no finite number"),
        (["inf"], "no finite number"),
        (["3:te1=1"], "is for adapter 3, and there are 2"),
        ([1, 2, 3], "3 weights for 2 adapters"),
        (["=1"], "has no pattern"),
        (["layers.5-2=1"], "the range 5-2 is empty"),
        (["re:(=1"], "is not a regular expression"),
        (["1:te1=1"], "'te1' means no module of"),
        (["stile:te1=1"], "'stile:te1' means no module of"),
    ],
)
def test_what_is_no_weight_is_refused(
    llama: Adapter, sdxl: Adapter, weights: Weights, words: str
) -> None:
    with pytest.raises(OptionError, match=re.escape(words)):
        strengths([llama, sdxl], weights)


def test_two_adapters_of_one_name_are_told_apart_by_place(folder: Path) -> None:
    twins = []
    for name in ("one", "other"):
        (folder / name).mkdir()
        twins.append(opened(folder / name, "lora", LLAMA[:1]))
    with pytest.raises(OptionError, match="2 adapters are called so") as error:
        strengths(twins, ["lora:q_proj=2"])
    assert "1:" in (error.value.hint or "")


@pytest.mark.parametrize("modules", [SDXL, FLUX, LLAMA])
def test_what_would_match_does(folder: Path, modules: tuple[str, ...]) -> None:
    adapter = opened(folder, "any", modules)
    with pytest.raises(OptionError, match="means no module") as error:
        weighed(adapter, "nothing_of_the_kind=1")
    suggested = (error.value.hint or "").removeprefix("what would: ").partition(" and ")[0]
    for pattern in suggested.split(", "):
        assert meant(adapter, pattern), pattern


def test_a_weight_of_zero_leaves_a_module_out_and_says_so(sdxl: Adapter) -> None:
    (kept,), (found,), (note,) = with_strengths([sdxl], ["te=0", 0.5])
    assert {site.spelled for site in kept.sites} == set(SDXL[:3])
    assert all(key.startswith("lora_te") for key in kept.skipped)
    assert len(kept.skipped) == 6
    assert kept.tensors.keys() | set(kept.skipped) == sdxl.tensors.keys()
    assert "2 modules were left out, for their weight is 0" in note
    assert set(map(found.of, kept.sites)) == {0.5}
