"""An adapter of each family through all schemes of pipelines: every delta, and whose it is."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from samples import lora

import loratool
from loratool.errors import UnsupportedError
from loratool.names.embeddings import is_embedding
from loratool.names.families import families, family_named
from loratool.names.family import Family, Fusion
from loratool.names.vocabulary import NUMBER, flatten
from loratool.schemes.opening import open_adapter

Deltas = dict[str, torch.Tensor]
WIDTH, RATIO, RANK = 8, 4, 2
KOHYA_PREFIX = {"prior": "lora_prior_unet_"}

each_family = pytest.mark.parametrize(
    "family", [family for family in families() if family.rows], ids=lambda family: family.name
)
SHARED = {"cosmos": None}
"""What names of diffusers tell, where they do not tell the family."""


def table(family: Family) -> Iterator[tuple[str, Fusion]]:
    """The first and the last native layer of each kind, and what they are for diffusers."""
    kinds: dict[str, list[str]] = {}
    for row in family.rows:
        for number in range(row.count):
            native = row.native.replace(NUMBER, str(number))
            if "norm" not in native.rpartition(".")[2] and not is_embedding(native):
                kinds.setdefault(re.sub(r"\d+", NUMBER, native), []).append(native)
    for found in kinds.values():
        for native in dict.fromkeys((found[0], found[-1])):
            fusion = family.from_native(native)
            assert fusion is not None
            yield native, fusion


def factors(heights: list[int]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """One A, and the Bs of parts, of numbers that no arithmetic rounds."""
    down = torch.randint(-8, 9, (RANK, WIDTH)).float()
    return down, [torch.randint(-8, 9, (height, RANK)).float() for height in heights]


def adapters(family: Family) -> tuple[Deltas, Deltas]:
    """The same adapter in the names of diffusers and in the native ones."""
    hub, native = {}, {}
    for name, fusion in table(family):
        heights = [WIDTH] * len(fusion.modules)
        if fusion.sizes == "input":
            heights[-1] = RATIO * WIDTH
        down, ups = factors(heights)
        for module, up in zip(fusion.modules, ups, strict=True):
            hub[f"{module}.lora_A.weight"] = down
            hub[f"{module}.lora_B.weight"] = up
        up = torch.cat(ups)
        native[f"{name}.lora_A.weight"] = down
        native[f"{name}.lora_B.weight"] = torch.cat(up.chunk(2)[::-1]) if fusion.swapped else up
    return hub, native


def written(path: Path, tensors: Mapping[str, torch.Tensor], prefix: str, scheme: str) -> Path:
    """Write an adapter's file as somebody else writes it."""
    leaves = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}
    found = {}
    for name, tensor in tensors.items():
        module = name[: -len(".lora_A.weight")]
        leaf = name[len(module) + 1 :]
        if scheme == "kohya":
            found[f"{prefix}{flatten(module)}.{leaves[leaf]}"] = tensor.clone()
        else:
            found[f"{prefix}{module}.{leaf}"] = tensor.clone()
    save_file(found, path)
    return path


def deltas(path: Path) -> Deltas:
    """What a file adds to each module that it names; both kinds of factors, alpha or not."""
    tensors = load_file(path)
    found = {}
    for name, up in tensors.items():
        for ending, other in (("lora_B", "lora_A"), ("lora_up", "lora_down")):
            if name.endswith(f".{ending}.weight"):
                module = name.removesuffix(f".{ending}.weight")
                down = tensors[f"{module}.{other}.weight"].double()
                alpha = tensors.get(f"{module}.alpha", torch.tensor(float(len(down)))).double()
                found[module] = alpha / len(down) * (up.double() @ down)
    return found


def assert_same(found: Deltas, expected: Deltas) -> None:
    assert found.keys() == expected.keys()
    for name, delta in found.items():
        assert torch.equal(delta, expected[name]), name


def expected(family: Family, tmp_path: Path) -> dict[str, tuple[Path, Deltas]]:
    """The adapter in each scheme, and what it adds."""
    hub, native = adapters(family)
    unet = KOHYA_PREFIX.get(family.backbone, "lora_unet_")
    is_native = family.is_trained_native
    files = {
        "diffusers": (hub, f"{family.backbone}."),
        "comfy": (native, "diffusion_model."),
        "kohya": (native if is_native else hub, unet),
    }
    found = {}
    for scheme, (tensors, prefix) in files.items():
        path = written(tmp_path / f"{scheme}.safetensors", tensors, prefix, scheme)
        found[scheme] = path, deltas(path)
    return found


@each_family
def test_its_adapters_are_known_in_every_scheme(family: Family, tmp_path: Path) -> None:
    for scheme, (path, _) in expected(family, tmp_path).items():
        adapter = open_adapter(path)
        assert not adapter.unresolved and adapter.scheme == scheme
        assert adapter.components == {family.backbone}
        is_hub = scheme == "diffusers"
        assert adapter.family == (SHARED.get(family.name, family.name) if is_hub else family.name)


@each_family
def test_its_adapters_keep_their_deltas_through_all_schemes(family: Family, tmp_path: Path) -> None:
    truth = expected(family, tmp_path)
    for source, (path, _) in truth.items():
        for scheme, (_, wanted) in truth.items():
            out = tmp_path / f"{source}-{scheme}.safetensors"
            named = family.name if family.name in SHARED else None
            loratool.convert(path, scheme, out, family=named)
            assert_same(deltas(out), wanted)


def attention(
    path: Path, depth: int, width: int, text: int | None, *, block: str, prefix: str
) -> Path:
    """Write an adapter of nothing but attentions, as most of diffusers' trainers do."""
    tensors = {}
    for number in range(depth):
        for name, into in {"attn1": width, "attn2": text}.items():
            for part in ("to_q", "to_k", "to_v", "to_out.0") if into is not None else ():
                module = f"{prefix}{block}.{number}.{name}.{part}"
                inputs = into if part in ("to_k", "to_v") else width
                tensors[f"{module}.lora_A.weight"] = torch.zeros(1, inputs)
                tensors[f"{module}.lora_B.weight"] = torch.ones(width, 1)
    save_file(tensors, path)
    return path


@pytest.mark.parametrize(
    ("depth", "width", "text", "family"),
    [
        (28, 2048, 2048, "ltx-video"),
        (48, 4096, 4096, "ltx-video"),
        (28, 2048, 1024, "cosmos2"),
        (28, 4096, 1024, "cosmos"),
        (36, 5120, 1024, None),  # either generation of Cosmos
        (20, 2240, 2240, "sana"),
        (28, 1152, 1152, None),  # PixArt, or the smaller Sana
        (48, 3072, None, "mochi"),
        (42, 3072, None, None),  # Mochi, or the larger CogVideoX
        (30, 1920, None, "cogvideox"),
        (28, 1920, 1920, None),
        (21, 2048, 2048, "ltx-video"),
        (20, 2048, 2048, "ltx-video"),  # as many blocks as Sana has
    ],
)
def test_widths_tell_families_of_the_same_names(
    depth: int, width: int, text: int | None, family: str | None, tmp_path: Path
) -> None:
    path = attention(
        tmp_path / "a.safetensors",
        depth,
        width,
        text,
        block="transformer_blocks",
        prefix="transformer.",
    )
    assert open_adapter(path).family == family


@pytest.mark.parametrize(
    ("width", "text", "family"),
    [(1408, 1024, "hunyuan-dit"), (1536, 1536, "wan"), (1408, 1408, "wan"), (640, 640, "wan")],
)
def test_widths_tell_a_rarer_family_from_a_common_one(
    width: int, text: int, family: str, tmp_path: Path
) -> None:
    path = attention(
        tmp_path / "a.safetensors", 3, width, text, block="blocks", prefix="transformer."
    )
    assert open_adapter(path).family == family


def test_original_names_are_of_families_that_have_them(tmp_path: Path) -> None:
    """In ComfyUI's files, only those of LTX-Video are called so; in diffusers', many are."""
    path = attention(
        tmp_path / "a.safetensors",
        3,
        WIDTH,
        WIDTH,
        block="transformer_blocks",
        prefix="diffusion_model.",
    )
    assert open_adapter(path).family == "ltx-video"
    out = tmp_path / "o.safetensors"
    loratool.convert(path, "diffusers", out)
    assert open_adapter(out).family is None
    with pytest.raises(UnsupportedError, match="nothing tells which model"):
        loratool.convert(out, "comfy", tmp_path / "back.safetensors")
    back = tmp_path / "back.safetensors"
    loratool.convert(out, "comfy", back, family="ltx-video")
    assert_same(deltas(back), deltas(path))


EXPERTS = ("transformer", "transformer_2")


def experts(path: Path, *components: str) -> Path:
    """Write an adapter of Wan 2.2 for these of its experts."""
    tensors = {}
    for component in components:
        for layer in ("attn1.to_q", "attn2.to_out.0", "ffn.net.2"):
            tensors |= lora(f"{component}.blocks.3.{layer}", WIDTH, WIDTH, RANK)
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("scheme", ["comfy", "kohya"])
def test_two_experts_are_two_files(scheme: str, tmp_path: Path) -> None:
    both = experts(tmp_path / "both.safetensors", *EXPERTS)
    assert open_adapter(both).family == "wan"
    assert open_adapter(both).components == set(EXPERTS)
    with pytest.raises(UnsupportedError) as raised:
        loratool.convert(both, scheme, tmp_path / "x.safetensors")
    truth = deltas(both)
    for expert in EXPERTS:
        assert f"--component {expert}" in str(raised.value.hint)
        out, back = tmp_path / f"{expert}.safetensors", tmp_path / f"{expert}-back.safetensors"
        loratool.convert(both, scheme, out, component=expert)
        loratool.convert(out, "diffusers", back, component=expert)
        assert_same(
            deltas(back), {name: d for name, d in truth.items() if name.startswith(f"{expert}.")}
        )


@pytest.mark.parametrize(("scheme", "expert"), [("comfy", "transformer"), ("kohya", EXPERTS[1])])
def test_one_expert_is_a_model(scheme: str, expert: str, tmp_path: Path) -> None:
    """Only what kohya's files record of names tells that it was the second of two."""
    one = experts(tmp_path / "one.safetensors", EXPERTS[1])
    out, back = tmp_path / "o.safetensors", tmp_path / "back.safetensors"
    loratool.convert(one, scheme, out)
    loratool.convert(out, "diffusers", back)
    assert_same(
        deltas(back), {name.replace(EXPERTS[1], expert): d for name, d in deltas(one).items()}
    )


@pytest.mark.parametrize(
    ("name", "component", "kohya"),
    [
        ("sdxl-refiner", "text_encoder_2", "lora_te_"),
        ("stable-cascade", "text_encoder", "lora_prior_te_"),
    ],
)
def test_the_only_text_encoder_of_a_family(
    name: str, component: str, kohya: str, tmp_path: Path
) -> None:
    family = family_named(name)
    layer = "text_model.encoder.layers.0.self_attn.q_proj"
    tensors = lora(f"{component}.{layer}", WIDTH, WIDTH, RANK)
    for _, fusion in table(family):
        tensors |= lora(f"{family.backbone}.{fusion.modules[0]}", WIDTH, WIDTH, RANK)
    save_file(tensors, tmp_path / "a.safetensors")
    truth = deltas(tmp_path / "a.safetensors")
    names = {
        "kohya": kohya + flatten(layer),
        "comfy": f"text_encoders.clip_g.transformer.{layer}",
    }
    for scheme, expected_name in names.items():
        out, back = tmp_path / f"{scheme}.safetensors", tmp_path / f"{scheme}-back.safetensors"
        loratool.convert(tmp_path / "a.safetensors", scheme, out)
        assert [module for module in deltas(out) if "text_model" in module] == [expected_name]
        loratool.convert(out, "diffusers", back)
        assert_same(deltas(back), truth)


@pytest.mark.parametrize(
    ("known", "other"),
    [
        ("blocks.0.self_attn.q_proj", "llm_adapter.blocks.0.self_attn.q_proj"),
        (
            "transformer_blocks.0.audio_attn1.to_q",
            "video_embeddings_connector.transformer_1d_blocks.0.attn1.to_q",
        ),
        ("blocks.0.self_attn.q", "control_adapter.conv"),
        ("blocks.0.self_attn.q", "audio_injector.injector.0.q"),
    ],
)
@pytest.mark.parametrize("scheme", ["comfy", "kohya"])
def test_what_diffusers_does_not_have(known: str, other: str, scheme: str, tmp_path: Path) -> None:
    """Its names are restored, and written where there are such; elsewhere it may be left out."""
    tensors = lora(known, WIDTH, WIDTH, RANK) | lora(other, WIDTH, WIDTH, RANK)
    prefix = {"comfy": "diffusion_model.", "kohya": "lora_unet_"}[scheme]
    path = written(tmp_path / "a.safetensors", tensors, prefix, scheme)
    for into, before in (("comfy", "diffusion_model."), ("kohya", "lora_unet_")):
        loratool.convert(path, into, tmp_path / f"{into}.safetensors")
        names = [flatten(name) if into == "kohya" else name for name in (known, other)]
        assert set(deltas(tmp_path / f"{into}.safetensors")) == {before + name for name in names}
    with pytest.raises(UnsupportedError, match="what diffusers calls it") as raised:
        loratool.convert(path, "diffusers", tmp_path / "d.safetensors")
    drop = str(raised.value.hint).partition("--drop '")[2].rstrip("'")
    loratool.convert(path, "diffusers", tmp_path / "d.safetensors", drop=[drop])
    assert len(deltas(tmp_path / "d.safetensors")) == 1


@pytest.mark.parametrize(
    ("prefix", "parts", "out"),
    [
        ("diffusion_model.down_blocks.0.2.attention.attn", ("to_q", "to_v"), "out_proj"),
        ("prior.down_blocks.0.2.attention", ("to_q", "to_v"), "to_out.0"),
    ],
)
def test_attention_of_one_parameter(
    prefix: str, parts: tuple[str, ...], out: str, tmp_path: Path
) -> None:
    """Stable Cascade's checkpoints have queries, keys and values in one, behind no ``weight``."""
    attention = "down_blocks.0.2.attention.attn"
    base = {
        f"{attention}.in_proj_weight": torch.randn(3 * WIDTH, WIDTH),
        f"{attention}.in_proj_bias": torch.randn(3 * WIDTH),
        f"{attention}.out_proj.weight": torch.randn(WIDTH, WIDTH),
        "down_blocks.0.0.channelwise.0.weight": torch.randn(WIDTH, WIDTH),
        "clip_txt_mapper.weight": torch.randn(WIDTH, WIDTH),
    }
    tensors = {}
    for part in (*parts, out):
        tensors |= lora(f"{prefix}.{part}", WIDTH, WIDTH, RANK)
    save_file(base, tmp_path / "base.safetensors")
    save_file(tensors, tmp_path / "adapter.safetensors")
    found = deltas(tmp_path / "adapter.safetensors")
    first, third, last = (found[f"{prefix}.{part}"] for part in (*parts, out))
    merged = tmp_path / "merged.safetensors"
    loratool.merge(tmp_path / "base.safetensors", [tmp_path / "adapter.safetensors"], merged)
    changes = {
        f"{attention}.in_proj_weight": torch.cat([first, torch.zeros_like(first), third]),
        f"{attention}.out_proj.weight": last,
    }
    for name, value in load_file(merged).items():
        truth = base[name].double() + changes.get(name, torch.zeros(1))
        torch.testing.assert_close(value.double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("encoder", "layer", "family", "component"),
    [
        ("clip_g", "text_model.encoder.layers.0.mlp.fc1", "sdxl", "text_encoder_2"),
        ("t5xxl", "encoder.block.0.layer.0.SelfAttention.q", "flux", "text_encoder_2"),
    ],
)
def test_a_text_encoder_alone_is_of_a_family_with_several(
    encoder: str, layer: str, family: str, component: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.safetensors"
    save_file(lora(f"text_encoders.{encoder}.transformer.{layer}", WIDTH, WIDTH), path)
    adapter = open_adapter(path)
    assert adapter.family == family
    assert [site.module for site in adapter.sites] == [f"{component}.{layer}"]


def pipeline_of_experts(folder: Path) -> Deltas:
    """Write the folder of Wan 2.2; return its weights."""
    weights = {}
    for component in EXPERTS:
        (folder / component).mkdir(parents=True)
        held = {
            f"blocks.3.{layer}.weight": torch.randn(WIDTH, WIDTH)
            for layer in ("attn1.to_q", "attn2.to_out.0", "ffn.net.2")
        }
        save_file(held, folder / component / "diffusion_pytorch_model.safetensors")
        (folder / component / "config.json").write_text("{}")
        weights |= {f"{component}.{name}": weight for name, weight in held.items()}
    index = {component: ["diffusers", "WanTransformer3DModel"] for component in EXPERTS}
    (folder / "model_index.json").write_text(json.dumps(index))
    return weights


@pytest.mark.parametrize("scheme", ["diffusers", "comfy"])
def test_experts_are_merged_into_their_own(scheme: str, tmp_path: Path) -> None:
    """Only the first one can be meant where names do not tell, and that is said."""
    weights = pipeline_of_experts(tmp_path / "base")
    second = experts(tmp_path / "second.safetensors", EXPERTS[1])
    adapter = tmp_path / "a.safetensors"
    loratool.convert(second, scheme, adapter)
    report = loratool.merge(tmp_path / "base", [adapter], tmp_path / "out")
    is_told = scheme == "diffusers"
    said = [note for note in report.notes if "--component transformer_2" in note]
    assert len(said) == (0 if is_told else 1)
    changes = deltas(second)
    for component in EXPERTS:
        path = tmp_path / "out" / component / "diffusion_pytorch_model.safetensors"
        for name, value in load_file(path).items():
            module = f"{component}.{name.removesuffix('.weight')}"
            own = module if is_told else module.replace("transformer.", f"{EXPERTS[1]}.")
            is_changed = component == (EXPERTS[1] if is_told else EXPERTS[0])
            truth = weights[f"{module}.weight"].double() + (changes[own] if is_changed else 0)
            torch.testing.assert_close(value.double(), truth, rtol=1e-5, atol=1e-5)
