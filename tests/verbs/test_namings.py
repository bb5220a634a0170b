"""Adapters of diffusion models in one naming, bases in the other: every family, however cut."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from samples import lora

import loratool
from loratool.errors import BaseModelError, UnsupportedError
from loratool.names.embeddings import is_embedding
from loratool.names.families import families, family_named
from loratool.names.family import Family, Fusion
from loratool.names.vocabulary import NUMBER

Tensors = dict[str, torch.Tensor]
WIDTH, RATIO, GROUPS = 12, 4, 3
BEFORE = "model.diffusion_model."
BASES = ("native.safetensors", "hub")

each_family = pytest.mark.parametrize(
    "family", [family for family in families() if family.rows], ids=lambda family: family.name
)


def modules(family: Family) -> dict[str, Fusion]:
    """Native modules of the first and the last blocks, and what they are for diffusers."""
    names = [
        row.native.replace(NUMBER, number)
        for row in family.rows
        for number in map(str, sorted({*range(row.count)[:1], *range(row.count)[-1:]}))
        if "norm" not in row.native.rpartition(".")[2] and not is_embedding(row.native)
    ]
    found = {name: family.from_native(name) for name in names}
    return {name: fusion for name, fusion in found.items() if fusion is not None}


def heights(fusion: Fusion) -> list[int]:
    others = len(fusion.modules) - 1
    if fusion.sizes == "input":
        return [*[WIDTH] * others, RATIO * WIDTH]
    if fusion.sizes == "grouped":
        return [WIDTH, *[WIDTH // GROUPS] * others]
    return [WIDTH] * (others + 1)


def hub_parts(fusion: Fusion, whole: torch.Tensor) -> Tensors:
    """What diffusers has in its modules where a native one has ``whole``."""
    if fusion.swapped:
        whole = torch.cat(whole.chunk(2)[::-1])
    return dict(zip(fusion.modules, whole.split(heights(fusion)), strict=True))


def native_whole(fusion: Fusion, parts: Tensors) -> torch.Tensor:
    """What a native module has where diffusers has ``parts``."""
    whole = torch.cat([parts[name] for name in fusion.modules])
    return torch.cat(whole.chunk(2)[::-1]) if fusion.swapped else whole


def save(folder: Path, weights: Tensors, family: Family) -> None:
    """Write the same model in both namings; ``weights`` are by native modules."""
    natives = {f"{BEFORE}{native}.weight": whole for native, whole in weights.items()}
    save_file(natives, folder / BASES[0])
    (folder / BASES[1]).mkdir()
    hubs = {}
    for native, whole in weights.items():
        fusion = family.from_native(native)
        assert fusion is not None
        for name, part in hub_parts(fusion, whole).items():
            hubs[f"{name}.weight"] = part.clone()
    save_file(hubs, folder / BASES[1] / "diffusion_pytorch_model.safetensors")


def merged(folder: Path, base: str) -> Tensors:
    """Merge the adapter into the base; return what came out by module."""
    out = folder / f"out-{base}"
    loratool.merge(folder / base, [folder / "adapter.safetensors"], out)
    file = out / "diffusion_pytorch_model.safetensors" if out.is_dir() else out
    found = load_file(file)
    return {name.removesuffix(".weight").removeprefix(BEFORE): t for name, t in found.items()}


def near(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((actual - expected).norm() <= 1e-6 * expected.norm())


def check(family: Family, weights: Tensors, deltas: Tensors, folder: Path) -> None:
    """Merge into the model in both namings, and compare with the sums by native modules."""
    save(folder, weights, family)
    native, hub = (merged(folder, base) for base in BASES)
    assert set(native) == set(weights)
    for name, whole in weights.items():
        fusion = family.from_native(name)
        assert fusion is not None
        truth = whole.double() + deltas[name]
        assert near(native[name].double(), truth), name
        for module, part in hub_parts(fusion, truth).items():
            assert near(hub.pop(module).double(), part), module
    assert not hub


@each_family
def test_an_adapter_in_the_names_of_diffusers(family: Family, tmp_path: Path) -> None:
    weights: Tensors = {}
    deltas: Tensors = {}
    factors: Tensors = {}
    for native, fusion in modules(family).items():
        parts: Tensors = {}
        for hub, height in zip(fusion.modules, heights(fusion), strict=True):
            one = lora(f"{family.backbone}.{hub}", height, WIDTH)
            down, up = (factor.double() for factor in one.values())
            parts[hub] = up @ down
            factors |= one
        deltas[native] = native_whole(fusion, parts)
        weights[native] = torch.randn(deltas[native].shape)
    save_file(factors, tmp_path / "adapter.safetensors")
    check(family, weights, deltas, tmp_path)


@each_family
def test_an_adapter_in_native_names(family: Family, tmp_path: Path) -> None:
    weights: Tensors = {}
    deltas: Tensors = {}
    factors: Tensors = {}
    for native, fusion in modules(family).items():
        one = lora(f"diffusion_model.{native}", sum(heights(fusion)), WIDTH)
        down, up = (factor.double() for factor in one.values())
        factors |= one
        deltas[native] = up @ down
        weights[native] = torch.randn(deltas[native].shape)
    save_file(factors, tmp_path / "adapter.safetensors")
    check(family, weights, deltas, tmp_path)


def cuts(family: Family) -> list[dict[str, Fusion]]:
    """The further namings of a family, first blocks only, as few times each module as may be."""
    found: list[dict[str, Fusion]] = []
    for row in family.others:
        native = row.native.replace(NUMBER, "0")
        fusion = family.from_native(native)
        assert fusion is not None
        if "norm" in native.rpartition(".")[2] or is_embedding(native):
            continue
        free = [
            cut
            for cut in found
            if not {m for f in cut.values() for m in f.modules} & {*fusion.modules}
        ]
        if not free:
            free = [{}]
            found += free
        free[0][native] = fusion
    return found


each_other_naming = pytest.mark.parametrize(
    ("family", "cut"),
    [(family, cut) for family in families() for cut in cuts(family)],
    ids=lambda value: value.name if isinstance(value, Family) else f"{len(value)} modules",
)


def test_the_flat_names_of_hunyuan_videos_own_trainer(tmp_path: Path) -> None:
    flat = ("double_blocks_19_img_attn_qkv", "single_blocks_39_linear2", "img_in_proj")
    factors: Tensors = {}
    for name in flat:
        rows = 3 * WIDTH if name.endswith("qkv") else WIDTH
        down, up = lora("x", rows, WIDTH).values()
        key = f"Hunyuan_video_I2V_lora_{name}"
        factors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        factors |= {f"{key}.alpha": torch.tensor(4.0)}
    save_file(factors, tmp_path / "a.safetensors")
    report = loratool.convert(tmp_path / "a.safetensors", "comfy", tmp_path / "b.safetensors")
    assert report.plan.family == "hunyuan-video"
    found = load_file(tmp_path / "b.safetensors")
    for name, native in zip(
        flat,
        ("double_blocks.19.img_attn_qkv", "single_blocks.39.linear2", "img_in.proj"),
        strict=True,
    ):
        up = found[f"diffusion_model.{native}.lora_up.weight"]
        assert torch.equal(up, factors[f"Hunyuan_video_I2V_lora_{name}.lora_up.weight"])


@each_other_naming
def test_an_adapter_in_a_further_naming(
    family: Family, cut: dict[str, Fusion], tmp_path: Path
) -> None:
    natives = modules(family)
    weights = {
        native: torch.randn(sum(heights(fusion)), WIDTH) for native, fusion in natives.items()
    }
    parts: Tensors = {
        name: torch.zeros(part.shape, dtype=torch.float64)
        for native, fusion in natives.items()
        for name, part in hub_parts(fusion, weights[native]).items()
    }
    factors: Tensors = {}
    for name, fusion in cut.items():
        one = lora(f"diffusion_model.{name}", sum(heights(fusion)), WIDTH)
        down, up = (factor.double() for factor in one.values())
        factors |= one
        parts |= hub_parts(fusion, up @ down)
    deltas = {native: native_whole(fusion, parts) for native, fusion in natives.items()}
    save_file(factors, tmp_path / "adapter.safetensors")
    check(family, weights, deltas, tmp_path)


@each_other_naming
@pytest.mark.parametrize("naming", ["native", "hub"])
def test_a_base_in_a_further_naming(
    naming: str, family: Family, cut: dict[str, Fusion], tmp_path: Path
) -> None:
    weights: Tensors = {}
    parts: Tensors = {}
    factors: Tensors = {}
    for name, fusion in cut.items():
        weights[name] = torch.randn(sum(heights(fusion)), WIDTH)
        made = {f"transformer.{module}": Fusion((module,)) for module in fusion.modules}
        sizes = dict(zip(made, heights(fusion), strict=True))
        if naming == "native":
            wholes = [family.wholes(module)[0] for module in fusion.modules]
            named = {module for other in cut.values() for module in other.modules}
            if any(not named.issuperset(whole.modules) for _, whole in wholes):
                pytest.skip("adapters name a part so of what every checkpoint has in one")
            made = {f"diffusion_model.{native}": whole for native, whole in wholes}
        for key, whole in made.items():
            if f"{key}.lora_A.weight" not in factors:
                one = lora(key, sizes.get(key, sum(heights(whole))), WIDTH)
                down, up = (factor.double() for factor in one.values())
                factors |= one
                is_part = key in sizes
                parts |= {whole.modules[0]: up @ down} if is_part else hub_parts(whole, up @ down)
    save_file({f"{BEFORE}{name}.weight": w for name, w in weights.items()}, tmp_path / BASES[0])
    save_file(factors, tmp_path / "adapter.safetensors")
    found = merged(tmp_path, BASES[0])
    for name, fusion in cut.items():
        assert near(found[name].double(), weights[name].double() + native_whole(fusion, parts)), (
            name
        )


def in_hub_names(file: Path) -> Tensors:
    """The deltas of an adapter of diffusers, by module."""
    found = load_file(file)
    keys = {key.rsplit(".", 2)[0] for key in found}
    return {
        key.partition(".")[2]: found[f"{key}.lora_B.weight"].double()
        @ found[f"{key}.lora_A.weight"].double()
        for key in keys
    }


@pytest.mark.parametrize("through", ["comfy", "kohya"])
@each_family
def test_a_conversion_from_one_naming_to_the_other_and_back(
    family: Family, through: str, tmp_path: Path
) -> None:
    """The names of all modules tell the family, but for one whose names are another's too."""
    told = None if family.name != "cosmos" else family.name
    factors: Tensors = {}
    expected: Tensors = {}
    for native, fusion in modules(family).items():
        one = lora(f"diffusion_model.{native}", sum(heights(fusion)), WIDTH)
        down, up = (factor.double() for factor in one.values())
        factors |= one
        expected |= hub_parts(fusion, up @ down)
    save_file(factors, tmp_path / "0.safetensors")
    for index, to in enumerate((through, "diffusers", through, "diffusers")):
        source, target = (tmp_path / f"{i}.safetensors" for i in (index, index + 1))
        report = loratool.convert(source, to, target, family=told)
        assert report.plan.family == family.name
        if to == "diffusers":
            deltas = in_hub_names(target)
            assert set(deltas) == set(expected)
            for name, delta in expected.items():
                assert near(deltas[name], delta), name


@pytest.mark.parametrize(
    ("keys", "scheme"),
    [
        (("lora_unet_layers_0_attention_to_q", "lora_unet_layers_29_adaLN_modulation_0"), "kohya"),
        (
            ("lora_unet_double_blocks_0_img_attn_q", "lora_unet_double_blocks_53_txt_attn_v"),
            "kohya",
        ),
        (("lora_unet_double_blocks_0_img_attn_qkv", "lora_unet_single_blocks_0_linear2"), "kohya"),
        (
            (
                "lora_unet_transformer_blocks_0_attn_to_q",
                "lora_unet_single_transformer_blocks_37_proj_out",
            ),
            "kohya",
        ),
        (
            (
                "diffusion_model.double_blocks.0.img_attn.qkv",
                "diffusion_model.single_blocks.39.linear2",
            ),
            "comfy",
        ),
        (
            ("transformer.layers.0.attention.to_q", "transformer.layers.29.adaLN_modulation.0"),
            "diffusers",
        ),
    ],
)
def test_a_verb_that_keeps_the_scheme_keeps_the_names(
    keys: tuple[str, ...], scheme: str, tmp_path: Path
) -> None:
    factors: Tensors = {}
    for key in keys:
        down, up = lora("x", WIDTH, WIDTH).values()
        names = ("lora_A", "lora_B") if scheme == "diffusers" else ("lora_down", "lora_up")
        factors |= {f"{key}.{names[0]}.weight": down, f"{key}.{names[1]}.weight": up}
        factors |= {f"{key}.alpha": torch.tensor(4.0)} if scheme != "diffusers" else {}
    save_file(factors, tmp_path / "a.safetensors")
    loratool.rescale(tmp_path / "a.safetensors", tmp_path / "r.safetensors", scale=2.0)
    assert set(load_file(tmp_path / "r.safetensors")) == set(factors)
    loratool.truncate(tmp_path / "a.safetensors", tmp_path / "t.safetensors", rank=1)
    assert set(load_file(tmp_path / "t.safetensors")) == set(factors)


FINAL = "final_layer.adaLN_modulation.1"
QKV = "double_blocks.0.img_attn.qkv"
ATTENTION = "transformer_blocks.0.attn.to_"


def flux_base(folder: Path) -> tuple[Tensors, Tensors]:
    """Write a small Flux in both namings; return its tensors in each."""
    native = {
        f"{name}.{leaf}": torch.randn(rows, *inputs)
        for name, rows in ((FINAL, 2 * WIDTH), (QKV, 3 * WIDTH))
        for leaf, inputs in (("weight", (WIDTH,)), ("bias", ()))
    }
    hub = {}
    for name, value in native.items():
        module, _, leaf = name.rpartition(".")
        fusion = family_named("flux").from_native(module)
        assert fusion is not None
        parts = (
            hub_parts(fusion, value)
            if module == QKV
            else {"norm_out.linear": torch.cat(value.chunk(2)[::-1])}
        )
        hub |= {f"{part}.{leaf}": rows.clone() for part, rows in parts.items()}
    save_file(native, folder / "native.safetensors")
    (folder / "hub").mkdir()
    save_file(hub, folder / "hub" / "diffusion_pytorch_model.safetensors")
    return native, hub


@pytest.mark.parametrize("variant", ["lora", "dora", "bias", "lokr", "diff"])
@pytest.mark.parametrize("naming", ["native", "hub"])
def test_every_variant_fits_both_namings(naming: str, variant: str, tmp_path: Path) -> None:
    """Halves that are exchanged, rows of a fused projection, and the parts that it is made of."""
    native, hub = flux_base(tmp_path)
    held = native if naming == "native" else hub
    modules = (
        [FINAL, QKV]
        if naming == "native"
        else ["norm_out.linear", f"{ATTENTION}q", f"{ATTENTION}v"]
    )
    tensors: Tensors = {}
    expected = {name: value.double() for name, value in held.items()}
    for module in modules:
        weight, bias = (held[f"{module}.{leaf}"].double() for leaf in ("weight", "bias"))
        key = f"diffusion_model.{module}" if naming == "native" else f"transformer.{module}"
        down, up = (factor for factor in lora(key, len(weight), WIDTH).values())
        delta = up.double() @ down.double()
        made = {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
        if variant == "dora":
            made[f"{key}.dora_scale"] = torch.rand(len(weight), 1) + 0.5
            changed = weight + delta
            norms = changed.norm(dim=1, keepdim=True)
            delta = made[f"{key}.dora_scale"].double() / norms * changed - weight
        elif variant == "bias":
            made[f"{key}.lora_B.bias"] = torch.randn(len(weight))
            expected[f"{module}.bias"] = bias + made[f"{key}.lora_B.bias"].double()
        elif variant == "lokr":
            one, other = torch.randn(4, 4), torch.randn(len(weight) // 4, WIDTH // 4)
            made = {f"{key}.lokr_w1": one, f"{key}.lokr_w2": other}
            delta = torch.kron(one.double(), other.double())
        elif variant == "diff":
            made = {f"{key}.diff": torch.randn(weight.shape)}
            delta = made[f"{key}.diff"].double()
        tensors |= made
        expected[f"{module}.weight"] = weight + delta
    save_file(tensors, tmp_path / "adapter.safetensors")
    loratool.merge(
        tmp_path / "native.safetensors",
        [tmp_path / "adapter.safetensors"],
        tmp_path / "n.safetensors",
    )
    loratool.merge(tmp_path / "hub", [tmp_path / "adapter.safetensors"], tmp_path / "h")
    in_native = load_file(tmp_path / "n.safetensors")
    in_hub = load_file(tmp_path / "h" / "diffusion_pytorch_model.safetensors")
    for leaf in ("weight", "bias"):
        swapped = torch.cat(in_native[f"{FINAL}.{leaf}"].chunk(2)[::-1])
        assert torch.equal(swapped, in_hub[f"norm_out.linear.{leaf}"])
        parts = [in_hub[f"{ATTENTION}{each}.{leaf}"] for each in "qkv"]
        assert torch.equal(in_native[f"{QKV}.{leaf}"], torch.cat(parts))
    found = in_native if naming == "native" else in_hub
    for name, value in expected.items():
        assert (found[name].double() - value).norm() <= 1e-6 * value.norm(), name


def test_the_base_tells_a_family_that_names_leave_open(tmp_path: Path) -> None:
    flux_base(tmp_path)
    save_file(lora("transformer.norm_out.linear", 2 * WIDTH, WIDTH), tmp_path / "a.safetensors")
    arguments = tmp_path / "a.safetensors", "comfy", tmp_path / "c.safetensors"
    with pytest.raises(UnsupportedError, match="different counterparts"):
        loratool.convert(*arguments)
    loratool.convert(*arguments, base=tmp_path / "native.safetensors")
    assert f"diffusion_model.{FINAL}.alpha" in load_file(tmp_path / "c.safetensors")


def test_a_part_beside_the_whole_is_refused(tmp_path: Path) -> None:
    """Either of them would be added a second time."""
    module = "transformer.transformer_blocks.0.attn.to_k"
    whole = "transformer.double_blocks.0.img_attn.qkv"
    factors = lora(module, WIDTH, WIDTH) | lora(whole, 3 * WIDTH, WIDTH)
    save_file(factors, tmp_path / "adapter.safetensors")
    weights = {"double_blocks.0.img_attn.qkv.weight": torch.randn(3 * WIDTH, WIDTH)}
    save_file(weights, tmp_path / "base.safetensors")
    paths = tmp_path / "base.safetensors", [tmp_path / "adapter.safetensors"]
    with pytest.raises(BaseModelError, match="means rows of") as error:
        loratool.merge(*paths, tmp_path / "out.safetensors")
    *_, option = shlex.split(str(error.value.hint))
    loratool.merge(*paths, tmp_path / "out.safetensors", skip=[option])


@pytest.mark.parametrize(
    ("shape", "family"), [((48, 16), "z-image"), ((40, 24), "lumina2"), ((40, 16), None)]
)
def test_shapes_tell_families_with_the_same_names(
    shape: tuple[int, int], family: str | None, tmp_path: Path
) -> None:
    save_file(lora("diffusion_model.layers.0.attention.qkv", *shape), tmp_path / "a.safetensors")
    if family is None:
        with pytest.raises(UnsupportedError, match="different counterparts"):
            loratool.convert(tmp_path / "a.safetensors", "diffusers", tmp_path / "b.safetensors")
        return
    loratool.convert(tmp_path / "a.safetensors", "diffusers", tmp_path / "b.safetensors")
    fusion = family_named(family).from_native("layers.0.attention.qkv")
    assert fusion is not None
    heights = fusion.heights(shape[1], shape[0])
    found = load_file(tmp_path / "b.safetensors")
    for name, height in zip(fusion.modules, heights or (), strict=True):
        assert len(found[f"transformer.{name}.lora_B.weight"]) == height


LLM = "model.layers.3.self_attn.q_proj"


@pytest.mark.parametrize(
    ("family", "backbone", "encoder", "component"),
    [
        ("qwen-image", "transformer_blocks.0.img_mlp.net.2", "qwen25_7b", "text_encoder"),
        ("z-image", "layers.0.feed_forward.w1", "qwen3_4b", "text_encoder"),
        ("lumina2", "layers.0.feed_forward.w1", "gemma2_2b", "text_encoder"),
        ("hunyuan-video", "double_blocks.0.img_mod.linear", "llama", "text_encoder"),
        ("hidream", "double_stream_blocks.0.block.ff_t.w1", "llama", "text_encoder_4"),
    ],
)
@pytest.mark.parametrize("scheme", ["comfy", "kohya", "diffusers"])
def test_encoders_that_are_language_models(
    family: str, backbone: str, encoder: str, component: str, scheme: str, tmp_path: Path
) -> None:
    source = tmp_path / "source.safetensors"
    names = (f"diffusion_model.{backbone}", f"text_encoders.{encoder}.transformer.{LLM}")
    save_file({k: v for name in names for k, v in lora(name, 6, 5).items()}, source)
    out = tmp_path / f"{scheme}.safetensors"
    loratool.convert(source, scheme, out, family=family)
    modules = {module.module for module in loratool.inspect(out).modules}
    assert any(module.startswith("transformer.") for module in modules)
    assert f"{component}.{LLM}" in modules
    back = tmp_path / "back.safetensors"
    loratool.convert(out, "comfy", back, family=family)
    assert any(key.startswith(names[1]) for key in load_file(back))
    weights = (f"model.{names[0]}.weight", f"{names[1]}.weight")
    save_file({name: torch.randn(6, 5) for name in weights}, tmp_path / "base.safetensors")
    loratool.merge(tmp_path / "base.safetensors", [out], tmp_path / "merged.safetensors")
    before, after, factors = map(
        load_file, (tmp_path / "base.safetensors", tmp_path / "merged.safetensors", source)
    )
    for name, weight in zip(names, weights, strict=True):
        delta = factors[f"{name}.lora_B.weight"] @ factors[f"{name}.lora_A.weight"]
        assert torch.allclose(after[weight] - before[weight], delta, atol=1e-6)
