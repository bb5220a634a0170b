"""Conversions: every pair of schemes, names, scales, variants, metadata and what is refused."""

from __future__ import annotations

import hashlib
import itertools
import json
import struct
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from deltas import dense_deltas, relative_error
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from samples import SCHEMES, lora, place, stable_diffusion

import loratool
from loratool import convert
from loratool.cli.main import cli
from loratool.errors import AdapterError, LoratoolError, OptionError, OutputError, UnsupportedError
from loratool.schemes import scheme_named

Make = Callable[..., Path]
PIPELINES = [name for name in SCHEMES if scheme_named(name).follows is None]
"""Schemes that diffusion models have names in."""
Q = "model.layers.0.self_attn.q_proj"


def kohya_deltas(path: Path) -> dict[str, torch.Tensor]:
    """Return ``alpha / r · up @ down`` of a kohya file, kernels flattened, in float64."""
    tensors = load_file(path)
    found = {}
    for key in tensors:
        if key.endswith(".lora_down.weight"):
            name = key.removesuffix(".lora_down.weight")
            down = tensors[key].double().flatten(1)
            up = tensors[f"{name}.lora_up.weight"].double().flatten(1)
            alpha = tensors.get(f"{name}.alpha")
            scale = 1.0 if alpha is None else float(alpha) / down.shape[0]
            found[name] = scale * (up @ down)
    return found


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


class TestEveryPair:
    """Any scheme to any other and back to PEFT: the same modules, the same deltas."""

    @pytest.fixture
    def llama(self, make_adapter: Make) -> Path:
        tensors = lora(Q, 16, 8) | lora("model.layers.1.mlp.down_proj", 8, 24)
        return make_adapter(
            tensors, lora_alpha=3, target_modules=["q_proj", "down_proj"], alpha_pattern={Q: 5}
        )

    @pytest.mark.slow
    def test_a_language_model(self, llama: Path, tmp_path: Path) -> None:
        truth = dense_deltas(llama)
        schemes = [name for name in SCHEMES if name not in ("cloneofsimo", "onetrainer", "xlabs")]
        # Behind the prefix of a transformer it is of a family of which nobody knows two namings.
        pairs = [("comfy", name) for name in ("diffusers", "diffusers-legacy")]
        refused = {*pairs, *((other, one) for one, other in pairs)}
        self._check(llama, truth, schemes, tmp_path, refused)

    @pytest.mark.slow
    def test_stable_diffusion(self, tmp_path: Path) -> None:
        whole = stable_diffusion(tmp_path / "sd.safetensors", alpha=1.5)
        convert(whole, "peft", tmp_path / "whole")
        convert(whole, "cloneofsimo", tmp_path / "numbers.safetensors")
        convert(tmp_path / "numbers.safetensors", "peft", tmp_path / "numbers")
        truth = dense_deltas(tmp_path / "whole")
        assert relative_error(dense_deltas(tmp_path / "numbers"), truth) < 2e-7
        names = {f"lora_{kohya_name(module)}" for module in truth}
        assert names == set(kohya_deltas(whole))
        for module, delta in truth.items():
            expected = kohya_deltas(whole)[f"lora_{kohya_name(module)}"]
            assert torch.allclose(delta, expected, rtol=1e-6)
        first = one_of_each_kind(whole, tmp_path / "few.safetensors")
        convert(first, "peft", tmp_path / "truth")
        self._check(first, dense_deltas(tmp_path / "truth"), self._of_pipelines(), tmp_path)

    @pytest.mark.slow
    def test_the_attention_of_flux(self, tmp_path: Path) -> None:
        tensors: dict[str, torch.Tensor] = {}
        for leaf in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"):
            tensors |= lora(f"transformer.transformer_blocks.0.attn.{leaf}", 8, 8)
        tensors |= lora("transformer.single_transformer_blocks.1.proj_out", 8, 40)
        save_file(tensors, tmp_path / "flux.safetensors")
        convert(tmp_path / "flux.safetensors", "peft", tmp_path / "truth")
        truth = dense_deltas(tmp_path / "truth")
        schemes = [*self._of_pipelines(), "onetrainer", "xlabs"]
        schemes.remove("diffusers-legacy")
        self._check(tmp_path / "flux.safetensors", truth, schemes, tmp_path)

    @staticmethod
    def _of_pipelines() -> list[str]:
        narrow = ("adapterhub", "cloneofsimo", "onetrainer", "xlabs")
        return [name for name in PIPELINES if name not in narrow]

    @staticmethod
    def _check(
        first: Path,
        truth: dict[str, torch.Tensor],
        schemes: list[str],
        folder: Path,
        refused: Collection[tuple[str, str]] = (),
    ) -> None:
        made = {}
        told = folder / "told"
        told.mkdir()
        said = {"architectures": ["LlamaForCausalLM"], "num_attention_heads": 4}
        said |= {"hidden_size": 8, "intermediate_size": 24, "head_dim": 4}
        (told / "config.json").write_text(json.dumps(said))
        bases = {name: told for name in schemes if name not in PIPELINES}
        for name in schemes:
            made[name] = place(folder, name, f"one-{name}")
            convert(first, name, made[name], base=bases.get(name))
        for number, (one, other) in enumerate(itertools.product(schemes, schemes)):
            target = place(folder, other, f"{number}")
            base = bases.get(other) or bases.get(one)
            if (one, other) in refused:
                with pytest.raises(UnsupportedError, match="no module of a family"):
                    convert(made[one], other, target, base=base)
                continue
            convert(made[one], other, target, base=base)
            convert(target, "peft", folder / f"{number}-back", base=bases.get(other))
            found = dense_deltas(folder / f"{number}-back")
            assert found.keys() == truth.keys(), (one, other)
            assert relative_error(found, truth) < 2e-7, (one, other)

    @pytest.mark.slow
    def test_bytes_stay_where_no_scale_moves(self, tmp_path: Path) -> None:
        whole = stable_diffusion(tmp_path / "sd.safetensors", alpha=None)
        few = one_of_each_kind(whole, tmp_path / "few.safetensors")
        schemes = self._of_pipelines()
        pairs = [(few, pair) for pair in itertools.product(schemes, schemes)]
        pairs += [(whole, ("cloneofsimo", "kohya")), (whole, ("kohya", "cloneofsimo"))]
        for number, (first, (one, other)) in enumerate(pairs):
            before = load_file(first)
            middle = place(tmp_path, one, f"a{number}")
            last = place(tmp_path, other, f"b{number}")
            convert(first, one, middle)
            report = convert(middle, other, last)
            assert report.relative_error == 0 and report.is_exact
            convert(last, "kohya", tmp_path / f"{number}.safetensors")
            after = load_file(tmp_path / f"{number}.safetensors")
            assert all(torch.equal(after[key], value) for key, value in before.items())


def one_of_each_kind(path: Path, target: Path) -> Path:
    """Write the modules of the first block and the last of each model in a kohya file."""
    blocks = ("unet_down_blocks_0_attentions_0", "unet_up_blocks_3_attentions_2")
    blocks += ("te_text_model_encoder_layers_0", "te_text_model_encoder_layers_7")
    tensors = load_file(path)
    chosen = {k: v for k, v in tensors.items() if k.startswith(tuple(f"lora_{b}" for b in blocks))}
    save_file(chosen, target)
    return target


def kohya_name(module: str) -> str:
    component, _, local = module.partition(".")
    return f"{'te' if component == 'text_encoder' else component}_{local.replace('.', '_')}"


segment = st.text("abcdefgh_0123", min_size=1, max_size=6)
paths = st.lists(
    st.lists(segment, min_size=1, max_size=4).map(".".join), min_size=1, max_size=4, unique=True
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(modules=paths, to=st.sampled_from([n for n in SCHEMES if n not in ("cloneofsimo",)]))
def test_random_names_come_back_or_are_refused(
    modules: list[str], to: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("names")
    tensors = {}
    for module in modules:
        tensors |= lora(module, 6, 5, rank=2)
    (folder / "in").mkdir()
    save_file(
        {f"base_model.model.{key}": value for key, value in tensors.items()},
        folder / "in" / "adapter_model.safetensors",
    )
    (folder / "in" / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 2, "lora_alpha": 3}'
    )
    output = place(folder, to, "out")
    try:
        convert(folder / "in", to, output)
        convert(output, "peft", folder / "back")
    except LoratoolError:
        # Two paths that flatten alike, a name that only a base could restore, …
        return
    before = load_file(folder / "in" / "adapter_model.safetensors")
    after = load_file(folder / "back" / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    assert relative_error(dense_deltas(folder / "back"), dense_deltas(folder / "in")) < 1e-6


class TestScales:
    """Where alpha is kept, missing, odd, or folded."""

    @pytest.mark.parametrize(
        ("alpha", "scale"),
        [
            (torch.tensor(1.0), 0.25),
            (torch.tensor(2), 0.5),
            (torch.tensor([6.0], dtype=torch.float16), 1.5),
            (torch.tensor(-4.0, dtype=torch.bfloat16), -1.0),
            (None, 1.0),
        ],
    )
    def test_alpha_as_files_have_it(
        self, alpha: torch.Tensor | None, scale: float, tmp_path: Path
    ) -> None:
        name = "lora_unet_mid_block_attentions_0_proj_in"
        tensors = {
            f"{name}.lora_down.weight": torch.randn(4, 8),
            f"{name}.lora_up.weight": torch.randn(8, 4),
        }
        if alpha is not None:
            tensors[f"{name}.alpha"] = alpha
        save_file(tensors, tmp_path / "a.safetensors")
        report = convert(tmp_path / "a.safetensors", "diffusers", tmp_path / "b.safetensors")
        made = load_file(tmp_path / "b.safetensors")
        prefix = "unet.mid_block.attentions.0.proj_in"
        assert made.keys() == {f"{prefix}.lora_A.weight", f"{prefix}.lora_B.weight"}
        assert torch.equal(made[f"{prefix}.lora_A.weight"], tensors[f"{name}.lora_down.weight"])
        expected = (tensors[f"{name}.lora_up.weight"].double() * scale).float()
        assert torch.equal(made[f"{prefix}.lora_B.weight"], expected)
        assert report.plan.parts[0].part.scale == 1

    def test_alpha_of_zero_is_kept_and_said(self, tmp_path: Path) -> None:
        stable_diffusion(tmp_path / "a.safetensors", alpha=0.0)
        report = convert(tmp_path / "a.safetensors", "peft", tmp_path / "b")
        assert any("alpha is 0" in note for note in report.notes)
        assert all(not delta.any() for delta in dense_deltas(tmp_path / "b").values())
        convert(tmp_path / "a.safetensors", "peft", tmp_path / "c", alpha=2)
        config = json.loads((tmp_path / "c" / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"]) == (2, 2)

    def test_one_alpha_missing_means_scale_1_for_that_module_only(self, tmp_path: Path) -> None:
        first = stable_diffusion(tmp_path / "a.safetensors", alpha=1.0)
        tensors = load_file(first)
        odd = next(key for key in tensors if key.endswith(".alpha"))
        del tensors[odd]
        save_file(tensors, tmp_path / "b.safetensors")
        convert(tmp_path / "b.safetensors", "comfy", tmp_path / "c.safetensors")
        convert(tmp_path / "c.safetensors", "kohya", tmp_path / "d.safetensors")
        found, truth = (kohya_deltas(tmp_path / f"{n}.safetensors") for n in ("d", "b"))
        assert relative_error(found, truth) < 1e-7

    def test_rslora_and_patterns_become_alphas(self, make_adapter: Make, tmp_path: Path) -> None:
        adapter = make_adapter(
            lora(Q, 8, 8) | lora("model.layers.1.self_attn.q_proj", 8, 8, rank=2),
            use_rslora=True,
            rank_pattern={"layers.1.self_attn.q_proj": 2},
            alpha_pattern={"^model.layers.0.self_attn.q_proj": 3.0},
            target_modules=["q_proj"],
        )
        convert(adapter, "kohya", tmp_path / "k.safetensors")
        found = kohya_deltas(tmp_path / "k.safetensors")
        truth = {f"lora_{m.replace('.', '_')}": d for m, d in dense_deltas(adapter).items()}
        assert relative_error(found, truth) < 1e-7
        before = load_file(adapter / "adapter_model.safetensors")
        after = load_file(tmp_path / "k.safetensors")
        key = f"lora_{Q.replace('.', '_')}.lora_up.weight"
        assert torch.equal(after[key], before[f"base_model.model.{Q}.lora_B.weight"])

    def test_what_folding_costs_is_reported(self, make_adapter: Make, tmp_path: Path) -> None:
        tensors = {key: value.half() for key, value in lora(Q, 8, 8).items()}
        adapter = make_adapter(tensors, lora_alpha=3, target_modules=["q_proj"])
        report = convert(adapter, "module-path", tmp_path / "m.safetensors")
        made = load_file(tmp_path / "m.safetensors")
        delta = made[f"{Q}.lora_B.weight"].double() @ made[f"{Q}.lora_A.weight"].double()
        error = relative_error({Q: delta}, dense_deltas(adapter))
        assert 0 < error < 1e-3
        assert report.relative_error == pytest.approx(error, rel=1e-6)
        assert not report.is_exact

    @pytest.mark.parametrize("size", [3e4, 1e-6])
    def test_the_range_of_float16_is_shared(
        self, size: float, make_adapter: Make, tmp_path: Path
    ) -> None:
        up = (torch.randn(8, 4) * size / 3).half()
        tensors = {f"{Q}.lora_A.weight": torch.randn(4, 8).half(), f"{Q}.lora_B.weight": up}
        alpha = 64 if size > 1 else 0.05
        adapter = make_adapter(tensors, lora_alpha=alpha, target_modules=["q_proj"])
        report = convert(adapter, "module-path", tmp_path / "m.safetensors")
        made = load_file(tmp_path / "m.safetensors")
        delta = made[f"{Q}.lora_B.weight"].double() @ made[f"{Q}.lora_A.weight"].double()
        assert relative_error({Q: delta}, dense_deltas(adapter)) < 1e-3
        assert report.outcome.shifted == [Q]

    def test_mlx_has_one_scale_and_one_rank(self, make_adapter: Make, tmp_path: Path) -> None:
        adapter = make_adapter(
            lora(Q, 8, 8) | lora("model.layers.1.self_attn.q_proj", 8, 8, rank=2),
            rank_pattern={"layers.1.self_attn.q_proj": 2},
            target_modules=["q_proj"],
        )
        convert(adapter, "mlx", tmp_path / "m")
        config = json.loads((tmp_path / "m" / "adapter_config.json").read_text())
        assert config["lora_parameters"] == {
            "rank": 4,
            "scale": 1.0,
            "dropout": 0.0,
            "keys": ["self_attn.q_proj"],
        }
        assert (config["fine_tune_type"], config["num_layers"]) == ("lora", -1)
        made = load_file(tmp_path / "m" / "adapters.safetensors")
        found = {
            module: (made[f"{module}.lora_a"].double() @ made[f"{module}.lora_b"].double()).T
            for module in dense_deltas(adapter)
        }
        assert {tuple(made[f"{m}.lora_a"].shape) for m in found} == {(8, 4)}
        assert relative_error(found, dense_deltas(adapter)) < 1e-7

    def test_fold_and_pad(self, make_adapter: Make, tmp_path: Path) -> None:
        adapter = make_adapter(lora(Q, 8, 8), use_rslora=True, target_modules=["q_proj"])
        convert(adapter, "peft", tmp_path / "p", fold=True, pad=8)
        config = json.loads((tmp_path / "p" / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (8, 8, False)
        assert relative_error(dense_deltas(tmp_path / "p"), dense_deltas(adapter)) < 1e-7
        with pytest.raises(OptionError, match="has rank 4"):
            convert(adapter, "peft", tmp_path / "q", pad=2)


class TestDiffusersMetadata:
    """``lora_adapter_metadata`` says what PEFT's configuration would."""

    def test_it_is_honoured_and_does_not_survive(self, tmp_path: Path) -> None:
        key = "unet.mid_block.attentions.0.proj_in"
        tensors = {
            f"{key}.lora_A.weight": torch.randn(4, 8),
            f"{key}.lora_B.weight": torch.randn(8, 4),
        }
        fields = {"unet.r": 4, "unet.lora_alpha": 4, "unet.alpha_pattern": {"proj_in": 2}}
        save_file(
            tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(fields)}
        )
        (module,) = loratool.inspect(tmp_path / "a.safetensors").modules
        assert module.scale == 0.5
        convert(tmp_path / "a.safetensors", "diffusers", tmp_path / "b.safetensors")
        assert "lora_adapter_metadata" not in metadata_of(tmp_path / "b.safetensors")
        made = load_file(tmp_path / "b.safetensors")
        assert torch.equal(made[f"{key}.lora_B.weight"], tensors[f"{key}.lora_B.weight"] / 2)

    @pytest.mark.parametrize("text", ["{", "[]", '{"unet.r": "x"}'])
    def test_nonsense_is_an_error(self, text: str, tmp_path: Path) -> None:
        key = "unet.mid_block.attentions.0.proj_in"
        tensors = {
            f"{key}.lora_A.weight": torch.ones(4, 8),
            f"{key}.lora_B.weight": torch.ones(8, 4),
        }
        save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": text})
        with pytest.raises(LoratoolError, match="metadata"):
            convert(tmp_path / "a.safetensors", "peft", tmp_path / "b")


class TestFlux:
    """Fused projections: split and joined exactly."""

    WIDTH = 12

    def _file(self, path: Path, *, diagonal: bool, alpha: float = 2.0) -> Path:
        tensors = {}
        sizes = {
            "double_blocks_0_img_attn_qkv": (3, 1),
            "double_blocks_0_txt_mlp_0": (4, 1),
            "single_blocks_0_linear1": (7, 1),
            "single_blocks_0_linear2": (1, 5),
            "final_layer_adaLN_modulation_1": (2, 1),
        }
        for name, (out, into) in sizes.items():
            up = torch.randn(out * self.WIDTH, 6)
            if diagonal and name.endswith("qkv"):
                up = up * torch.block_diag(*[torch.ones(self.WIDTH, 2)] * 3)
            tensors |= {
                f"lora_unet_{name}.lora_down.weight": torch.randn(6, into * self.WIDTH),
                f"lora_unet_{name}.lora_up.weight": up,
                f"lora_unet_{name}.alpha": torch.tensor(alpha),
            }
        save_file(tensors, path)
        return path

    @pytest.mark.parametrize("diagonal", [False, True])
    def test_round_trip(self, diagonal: bool, tmp_path: Path) -> None:
        first = self._file(tmp_path / "a.safetensors", diagonal=diagonal)
        convert(first, "diffusers", tmp_path / "b.safetensors")
        made = load_file(tmp_path / "b.safetensors")
        truth = kohya_deltas(first)
        block = "transformer.transformer_blocks.0.attn"
        whole = truth["lora_unet_double_blocks_0_img_attn_qkv"]
        for index, leaf in enumerate(("to_q", "to_k", "to_v")):
            down = made[f"{block}.{leaf}.lora_A.weight"].double()
            assert down.shape[0] == (2 if diagonal else 6)
            delta = made[f"{block}.{leaf}.lora_B.weight"].double() @ down
            part = whole[index * self.WIDTH : (index + 1) * self.WIDTH]
            assert torch.allclose(delta, part, atol=1e-6)
        final = "transformer.norm_out.linear"
        delta = made[f"{final}.lora_B.weight"].double() @ made[f"{final}.lora_A.weight"].double()
        expected = truth["lora_unet_final_layer_adaLN_modulation_1"].roll(self.WIDTH, dims=0)
        assert torch.allclose(delta, expected, atol=1e-6)
        convert(tmp_path / "b.safetensors", "kohya", tmp_path / "c.safetensors")
        assert relative_error(kohya_deltas(tmp_path / "c.safetensors"), truth) < 1e-6
        back = load_file(tmp_path / "c.safetensors")
        ranks = {name: tensor.shape[0] for name, tensor in back.items() if "lora_down" in name}
        assert set(ranks.values()) == {6}

    def test_parts_that_are_absent_are_rows_of_zeros(self, tmp_path: Path) -> None:
        key = "transformer.single_transformer_blocks.0.attn.to_v"
        save_file(
            {
                f"{key}.lora_A.weight": torch.randn(2, 12),
                f"{key}.lora_B.weight": torch.randn(12, 2),
            },
            tmp_path / "a.safetensors",
        )
        convert(tmp_path / "a.safetensors", "comfy", tmp_path / "b.safetensors", family="flux")
        made = load_file(tmp_path / "b.safetensors")
        up = made["diffusion_model.single_blocks.0.linear1.lora_up.weight"]
        assert up.shape == (84, 2)
        assert not up[:24].any() and up[24:36].all() and not up[36:].any()

    def test_an_untrained_fusion_stays_dense(self, tmp_path: Path) -> None:
        name = "lora_unet_double_blocks_9_img_attn_qkv"
        tensors = {
            f"{name}.lora_down.weight": torch.randn(6, 12),
            f"{name}.lora_up.weight": torch.zeros(36, 6),
        }
        save_file(tensors, tmp_path / "a.safetensors")
        report = convert(tmp_path / "a.safetensors", "peft", tmp_path / "b")
        assert [item.part.rank for item in report.plan.parts] == [6, 6, 6]


class TestVariants:
    """What is no plain A and B."""

    def _loha(self, path: Path, extra: dict[str, torch.Tensor] | None = None) -> Path:
        name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
        tensors = {
            f"{name}.hada_w1_a": torch.randn(8, 2),
            f"{name}.hada_w1_b": torch.randn(2, 8),
            f"{name}.hada_w2_a": torch.randn(8, 2),
            f"{name}.hada_w2_b": torch.randn(2, 8),
            f"{name}.alpha": torch.tensor(1.0),
        }
        save_file(tensors | (extra or {}), path)
        return path

    def test_loha_is_named_and_becomes_lora(self, tmp_path: Path) -> None:
        first = self._loha(tmp_path / "a.safetensors")
        (module,) = loratool.inspect(first).modules
        assert (module.variant, module.rank, module.scale) == ("loha", 2, 0.5)
        with pytest.raises(UnsupportedError, match="LoHa") as caught:
            convert(first, "peft", tmp_path / "b")
        assert caught.value.hint and "--to-lora" in caught.value.hint
        report = convert(first, "peft", tmp_path / "b", to_lora=True)
        assert report.relative_error < 1e-6
        tensors = list(load_file(first).values())
        names = sorted(load_file(first))
        by_name = dict(zip(names, (load_file(first)[n].double() for n in names), strict=True))
        w = [value for key, value in by_name.items() if "hada" in key]
        expected = 0.5 * (w[0] @ w[1]) * (w[2] @ w[3])
        (found,) = dense_deltas(tmp_path / "b").values()
        assert torch.allclose(found, expected, atol=1e-5)
        assert len(tensors) == 5

    def test_loha_travels_between_schemes_that_have_it(self, tmp_path: Path) -> None:
        first = self._loha(tmp_path / "a.safetensors")
        convert(first, "comfy", tmp_path / "b.safetensors")
        convert(tmp_path / "b.safetensors", "kohya", tmp_path / "c.safetensors")
        before, after = load_file(first), load_file(tmp_path / "c.safetensors")
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)

    @pytest.mark.parametrize("verb", ["compose", "truncate", "rescale", "spectrum"])
    def test_other_verbs_say_what_to_do(self, verb: str, tmp_path: Path) -> None:
        first = self._loha(tmp_path / "a.safetensors")
        run = {
            "compose": lambda: loratool.compose([first], tmp_path / "o"),
            "truncate": lambda: loratool.truncate(first, tmp_path / "o", energy=0.9),
            "rescale": lambda: loratool.rescale(first, tmp_path / "o", fold=True),
            "spectrum": lambda: loratool.inspect(first, spectrum=True),
        }
        with pytest.raises(UnsupportedError, match="LoHa"):
            run[verb]()

    def test_a_norm_is_refused_and_can_be_dropped(self, tmp_path: Path) -> None:
        name = "lora_unet_mid_block_attentions_0_norm"
        first = self._loha(tmp_path / "a.safetensors", {f"{name}.w_norm": torch.ones(8)})
        with pytest.raises(UnsupportedError, match="norm"):
            convert(first, "peft", tmp_path / "b", to_lora=True)
        report = convert(first, "peft", tmp_path / "b", to_lora=True, drop=["norm$"])
        assert [why for _, why in report.plan.dropped] == ["dropped as asked"]

    def test_a_whole_difference_needs_a_rank(self, tmp_path: Path) -> None:
        name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
        diff = torch.randn(8, 3) @ torch.randn(3, 6)
        save_file({f"{name}.diff": diff}, tmp_path / "a.safetensors")
        with pytest.raises(UnsupportedError, match="only come near") as caught:
            convert(tmp_path / "a.safetensors", "peft", tmp_path / "b", to_lora=True)
        assert caught.value.hint == "give --rank R"
        report = convert(tmp_path / "a.safetensors", "peft", tmp_path / "b", to_lora=True, rank=3)
        assert report.relative_error < 1e-6
        rough = convert(tmp_path / "a.safetensors", "peft", tmp_path / "c", to_lora=True, rank=1)
        values = torch.linalg.svdvals(diff.double())
        expected = float(values[1:].square().sum().sqrt() / values.norm())
        assert rough.relative_error == pytest.approx(expected, rel=1e-5)
        (found,) = dense_deltas(tmp_path / "c").values()
        assert relative_error({"x": found}, {"x": diff.double()}) == pytest.approx(expected)

    def test_dora_needs_its_base(self, make_adapter: Make, make_base: Make, tmp_path: Path) -> None:
        weight = torch.randn(8, 6)
        base = make_base({f"{Q}.weight": weight})
        magnitude = torch.rand(8) + 0.5
        tensors = lora(Q, 8, 6) | {f"{Q}.lora_magnitude_vector": magnitude}
        adapter = make_adapter(tensors, use_dora=True, target_modules=["q_proj"])
        with pytest.raises(UnsupportedError, match="base's weight"):
            convert(adapter, "peft", tmp_path / "x", to_lora=True)
        report = convert(adapter, "peft", tmp_path / "x", to_lora=True, base=base, rank=6)
        w = weight.double()
        v = w + dense_deltas(adapter)[Q]
        expected = magnitude.double()[:, None] / v.norm(dim=1, keepdim=True) * v - w
        assert relative_error(dense_deltas(tmp_path / "x"), {Q: expected}) < 1e-6
        assert report.relative_error < 1e-6
        config = json.loads((tmp_path / "x" / "adapter_config.json").read_text())
        assert config["use_dora"] is False

    def test_dora_keeps_its_magnitudes_between_schemes(
        self, make_adapter: Make, tmp_path: Path
    ) -> None:
        tensors = lora(Q, 8, 6) | {f"{Q}.lora_magnitude_vector": torch.rand(8)}
        adapter = make_adapter(tensors, use_dora=True, target_modules=["q_proj"])
        convert(adapter, "kohya", tmp_path / "k.safetensors")
        made = load_file(tmp_path / "k.safetensors")
        name = f"lora_{Q.replace('.', '_')}"
        assert made[f"{name}.dora_scale"].shape == (8, 1)
        convert(tmp_path / "k.safetensors", "peft", tmp_path / "p")
        before = load_file(adapter / "adapter_model.safetensors")
        after = load_file(tmp_path / "p" / "adapter_model.safetensors")
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
        config = json.loads((tmp_path / "p" / "adapter_config.json").read_text())
        assert config["use_dora"] is True

    def test_pissa_from_its_initial_state(self, make_adapter: Make, tmp_path: Path) -> None:
        start = lora(Q, 8, 6)
        trained = {key: value + 0.1 * torch.randn_like(value) for key, value in start.items()}
        settings = {"init_lora_weights": "pissa", "target_modules": ["q_proj"]}
        initial = make_adapter(start, "initial", **settings)
        adapter = make_adapter(trained, "trained", **settings)
        with pytest.raises(UnsupportedError, match="pissa") as caught:
            convert(adapter, "peft", tmp_path / "x")
        assert "--initial" in str(caught.value.hint)
        convert(adapter, "peft", tmp_path / "x", initial=initial)
        truth = dense_deltas(adapter)[Q] - dense_deltas(initial)[Q]
        assert relative_error(dense_deltas(tmp_path / "x"), {Q: truth}) < 1e-6
        config = json.loads((tmp_path / "x" / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (8, 16, True)

    def test_stacked_factors_of_a_merged_projection(self, tmp_path: Path) -> None:
        module = "transformer.h.0.attn.c_attn"
        a, b = torch.randn(8, 6), torch.randn(12, 4)
        save_file({f"{module}.lora_A": a, f"{module}.lora_B": b}, tmp_path / "a.safetensors")
        with pytest.raises(AdapterError, match="stacked for 2 parts"):
            convert(tmp_path / "a.safetensors", "peft", tmp_path / "x")
        convert(
            tmp_path / "a.safetensors",
            "peft",
            tmp_path / "x",
            enable_lora=[True, False, True],
            alpha=8,
        )
        expected = torch.zeros(18, 6).double()
        expected[:6] = 2 * b[:6].double() @ a[:4].double()
        expected[12:] = 2 * b[6:].double() @ a[4:].double()
        assert relative_error(dense_deltas(tmp_path / "x"), {module: expected}) < 1e-6


def test_a_convolution_of_loralib(make_base: Make, tmp_path: Path) -> None:
    """loralib: ``(B @ A).view(W.shape)`` with kernels folded into both factors."""
    out, into, kernel, rank = 5, 3, 3, 2
    a, b = torch.randn(rank * kernel, into * kernel), torch.randn(out * kernel, rank * kernel)
    save_file({"conv.lora_A": a, "conv.lora_B": b}, tmp_path / "a.safetensors")
    base = make_base({"conv.weight": torch.ones(out, into, kernel, kernel)})
    convert(tmp_path / "a.safetensors", "peft", tmp_path / "p", base=base, alpha=3)
    expected = 1.5 * (b.double() @ a.double()).view(out, into, kernel, kernel).flatten(1)
    assert relative_error(dense_deltas(tmp_path / "p"), {"conv": expected}) < 1e-6
    made = load_file(tmp_path / "p" / "adapter_model.safetensors")
    assert made["base_model.model.conv.lora_A.weight"].shape == (18, 3, 3, 3)


class TestNamesAndBases:
    """Flattened names are restored from the base, or not at all."""

    def test_unknown_names_are_listed(self, tmp_path: Path) -> None:
        save_file(
            {
                "lora_strange_thing_0.lora_down.weight": torch.ones(2, 4),
                "lora_strange_thing_0.lora_up.weight": torch.ones(4, 2),
            },
            tmp_path / "a.safetensors",
        )
        with pytest.raises(AdapterError, match="lora_strange_thing_0") as caught:
            convert(tmp_path / "a.safetensors", "peft", tmp_path / "x")
        assert "--base" in str(caught.value.hint)
        assert not (tmp_path / "x").exists()

    def test_the_base_settles_them(self, make_base: Make, tmp_path: Path) -> None:
        base = make_base({"strange.thing_0.weight": torch.ones(4, 4)})
        save_file(
            {
                "lora_strange_thing_0.lora_down.weight": torch.ones(2, 4),
                "lora_strange_thing_0.lora_up.weight": torch.ones(4, 2),
            },
            tmp_path / "a.safetensors",
        )
        convert(tmp_path / "a.safetensors", "peft", tmp_path / "x", base=base)
        assert dense_deltas(tmp_path / "x").keys() == {"strange.thing_0"}
        twice = make_base(
            {
                "strange.thing_0.weight": torch.ones(4, 4),
                "strange.thing.0.weight": torch.ones(4, 4),
            },
            name="twice",
        )
        with pytest.raises(AdapterError, match="several paths"):
            convert(tmp_path / "a.safetensors", "peft", tmp_path / "y", base=twice)

    def test_kernels_are_those_of_the_base(self, make_base: Make, tmp_path: Path) -> None:
        base = make_base({"mid_block.attentions.0.proj_in.weight": torch.ones(8, 8, 1, 1)})
        name = "lora_unet_mid_block_attentions_0_proj_in"
        save_file(
            {
                f"{name}.lora_down.weight": torch.ones(2, 8),
                f"{name}.lora_up.weight": torch.ones(8, 2),
            },
            tmp_path / "a.safetensors",
        )
        convert(tmp_path / "a.safetensors", "peft", tmp_path / "x", base=base)
        made = load_file(tmp_path / "x" / "adapter_model.safetensors")
        assert {tuple(value.shape) for value in made.values()} == {(2, 8, 1, 1), (8, 2, 1, 1)}

    def test_both_namings_of_sdxl(self, tmp_path: Path) -> None:
        key = "unet.down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q"
        save_file(
            {f"{key}.lora_A.weight": torch.ones(2, 8), f"{key}.lora_B.weight": torch.ones(8, 2)},
            tmp_path / "a.safetensors",
        )
        found = {}
        for naming in (None, "native", "diffusers"):
            output = tmp_path / f"{naming}.safetensors"
            convert(tmp_path / "a.safetensors", "kohya", output, naming=naming)
            found[naming] = next(iter(load_file(output))).partition(".")[0]
        native = "lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q"
        assert found[None] == found["native"] == native
        assert found["diffusers"] == f"lora_{key.replace('.', '_')}"

    def test_one_component_alone_has_its_own_names(self, tmp_path: Path) -> None:
        first = stable_diffusion(tmp_path / "sd.safetensors", alpha=None)
        report = convert(first, "peft", tmp_path / "u", component="unet")
        assert all(
            name.startswith(("down_", "up_", "mid_")) for name in dense_deltas(tmp_path / "u")
        )
        assert all("text_encoder" in name for name, _ in report.plan.dropped)
        assert len(report.plan.dropped) == 8


class TestFiles:
    """Metadata, extras, outputs."""

    def test_kohya_metadata(self, tmp_path: Path) -> None:
        first = stable_diffusion(tmp_path / "sd.safetensors", alpha=1.5)
        tensors = load_file(first)
        stale = {
            "sshs_model_hash": "f" * 64,
            "ss_network_dim": "99",
            "ss_tag_frequency": '{"a": 1}',
            "modelspec.hash_sha256": "0x00",
            "modelspec.author": "somebody",
        }
        save_file(tensors, first, stale)
        output = tmp_path / "k.safetensors"
        convert(first, "kohya", output)
        found = metadata_of(output)
        data = output.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        assert found["sshs_model_hash"] == hashlib.sha256(data[8 + length :]).hexdigest()
        assert (found["ss_network_dim"], found["ss_network_alpha"]) == ("2", "1.5")
        assert found["ss_network_module"] == "networks.lora"
        assert found["modelspec.architecture"] == "stable-diffusion-v1/lora"
        assert found["ss_tag_frequency"] == '{"a": 1}'
        assert found["modelspec.author"] == "somebody"
        assert "modelspec.hash_sha256" not in found
        history = json.loads(found["loratool"])
        digest = hashlib.sha256(first.read_bytes()).hexdigest()
        assert history["inputs"] == [{"name": "sd.safetensors", "sha256": digest}]
        save_file(load_file(output), tmp_path / "again.safetensors", found)
        assert (tmp_path / "again.safetensors").stat().st_size == len(data)
        convert(first, "kohya", output, force=True)
        assert output.read_bytes() == data

    def test_mixed_ranks_are_dynamic(self, make_adapter: Make, tmp_path: Path) -> None:
        adapter = make_adapter(
            lora(Q, 8, 8) | lora("model.layers.1.self_attn.q_proj", 8, 8, rank=2),
            rank_pattern={"layers.1.self_attn.q_proj": 2},
            target_modules=["q_proj"],
        )
        convert(adapter, "kohya", tmp_path / "k.safetensors")
        assert metadata_of(tmp_path / "k.safetensors")["ss_network_dim"] == "Dynamic"

    def test_a_head_is_refused_where_it_has_no_place(
        self, make_adapter: Make, tmp_path: Path
    ) -> None:
        adapter = make_adapter(
            lora(Q, 8, 8) | {"score.weight": torch.ones(2, 8)},
            target_modules=["q_proj"],
            modules_to_save=["score"],
        )
        with pytest.raises(UnsupportedError, match="no place") as caught:
            convert(adapter, "kohya", tmp_path / "k.safetensors")
        assert "--drop" in str(caught.value.hint)
        report = convert(adapter, "kohya", tmp_path / "k.safetensors", drop=["score"])
        assert report.plan.dropped == (("base_model.model.score.weight", "dropped as asked"),)
        convert(adapter, "module-path", tmp_path / "m.safetensors")
        assert torch.equal(load_file(tmp_path / "m.safetensors")["score.weight"], torch.ones(2, 8))

    def test_tokens_travel_between_positions_and_bundles(self, tmp_path: Path) -> None:
        first = stable_diffusion(tmp_path / "sd.safetensors", alpha=None)
        convert(first, "cloneofsimo", tmp_path / "c.safetensors")
        tensors = load_file(tmp_path / "c.safetensors") | {"<s1>": torch.randn(8)}
        save_file(tensors, tmp_path / "t.safetensors", metadata_of(tmp_path / "c.safetensors"))
        convert(tmp_path / "t.safetensors", "kohya", tmp_path / "k.safetensors")
        made = load_file(tmp_path / "k.safetensors")
        assert torch.equal(made["bundle_emb.s1.string_to_param.*"], tensors["<s1>"][None])
        convert(tmp_path / "k.safetensors", "cloneofsimo", tmp_path / "d.safetensors")
        back = load_file(tmp_path / "d.safetensors")
        assert back.keys() == tensors.keys()
        assert all(torch.equal(back[key], tensors[key]) for key in tensors)

    def test_a_dry_run_writes_nothing(self, tmp_path: Path) -> None:
        first = stable_diffusion(tmp_path / "sd.safetensors", alpha=3.0)
        before = sorted(path.name for path in tmp_path.iterdir())
        report = convert(first, "diffusers", tmp_path / "x.safetensors", dry_run=True)
        assert not report.is_written
        assert sorted(path.name for path in tmp_path.iterdir()) == before
        assert report.as_json()["dry_run"] is True

    def test_a_configuration_needs_a_folder(self, tmp_path: Path) -> None:
        first = stable_diffusion(tmp_path / "sd.safetensors", alpha=None)
        with pytest.raises(OutputError, match="a single file has"):
            convert(first, "peft", tmp_path / "x.safetensors")

    def test_an_existing_output_needs_force(self, tmp_path: Path) -> None:
        first = stable_diffusion(tmp_path / "sd.safetensors", alpha=None)
        (tmp_path / "x.safetensors").write_text("mine")
        with pytest.raises(OutputError, match="exists"):
            convert(first, "kohya", tmp_path / "x.safetensors")
        assert (tmp_path / "x.safetensors").read_text() == "mine"
        with pytest.raises(OutputError, match="overwrite the input"):
            convert(first, "kohya", first, force=True)

    def test_prefixed_files_hold_several_adapters(self, tmp_path: Path) -> None:
        tensors = {
            f"model_layers_0_self_attn_q_proj.{name}.lora_{side}": torch.full(shape, value)
            for name, value in (("one", 1.0), ("two", 2.0))
            for side, shape in (("A", (2, 8)), ("B", (8, 2)))
        }
        torch.save(tensors, tmp_path / "all.bin")
        with pytest.raises(AdapterError, match="several adapters: one, two"):
            convert(tmp_path / "all.bin", "peft", tmp_path / "x")
        convert(tmp_path / "all.bin", "peft", tmp_path / "x", adapter_name="two")
        (delta,) = dense_deltas(tmp_path / "x").values()
        assert torch.equal(delta, torch.full((8, 8), 8.0).double())
        convert(tmp_path / "x", "prefixed", tmp_path / "y.pt", adapter_name="style")
        made = torch.load(tmp_path / "y.pt", weights_only=True)
        assert made.keys() == {
            "model_layers_0_self_attn_q_proj.style.lora_A",
            "model_layers_0_self_attn_q_proj.style.lora_B",
        }

    def test_a_dtype_can_be_chosen(self, tmp_path: Path) -> None:
        first = stable_diffusion(tmp_path / "sd.safetensors", alpha=1.0)
        report = convert(first, "comfy", tmp_path / "x.safetensors", dtype="bfloat16")
        made = load_file(tmp_path / "x.safetensors")
        assert {v.dtype for k, v in made.items() if "alpha" not in k} == {torch.bfloat16}
        assert 1e-4 < report.relative_error < 1e-2

    def test_the_scheme_can_be_said(self, tmp_path: Path) -> None:
        save_file(
            {"layer.a.lora_A": torch.randn(4, 4), "layer.a.lora_B": torch.randn(4, 4)},
            tmp_path / "a.safetensors",
        )
        truth = load_file(tmp_path / "a.safetensors")
        convert(
            tmp_path / "a.safetensors",
            "module-path",
            tmp_path / "x.safetensors",
            source="transposed",
        )
        made = load_file(tmp_path / "x.safetensors")
        assert torch.equal(made["layer.a.lora_A.weight"], truth["layer.a.lora_A"].T)
        with pytest.raises(OptionError, match="is none of"):
            convert(tmp_path / "a.safetensors", "peft", tmp_path / "y", source="gibberish")


class TestOtherVerbs:
    """Verbs that write adapters write every scheme."""

    def test_compose_writes_the_scheme_of_its_inputs(self, tmp_path: Path) -> None:
        one = stable_diffusion(tmp_path / "one.safetensors", alpha=1.0)
        two = stable_diffusion(tmp_path / "two.safetensors", alpha=None)
        loratool.compose([one, two], tmp_path / "sum.safetensors", weights=[0.5, -1.0])
        found = kohya_deltas(tmp_path / "sum.safetensors")
        first, second = kohya_deltas(one), kohya_deltas(two)
        truth = {name: 0.5 * first[name] - second[name] for name in first}
        assert relative_error(found, truth) < 1e-6
        history = json.loads(metadata_of(tmp_path / "sum.safetensors")["loratool"])
        assert history["command"] == "compose"

    def test_rescale_and_truncate_too(self, tmp_path: Path) -> None:
        one = stable_diffusion(tmp_path / "one.safetensors", alpha=1.0)
        loratool.rescale(one, tmp_path / "half.safetensors", scale=0.5)
        truth = {name: delta / 2 for name, delta in kohya_deltas(one).items()}
        assert relative_error(kohya_deltas(tmp_path / "half.safetensors"), truth) < 1e-7
        before, after = load_file(one), load_file(tmp_path / "half.safetensors")
        assert all(torch.equal(before[k], after[k]) for k in before if "alpha" not in k)
        loratool.truncate(one, tmp_path / "thin.safetensors", rank=1)
        thin = load_file(tmp_path / "thin.safetensors")
        assert {v.shape[0] for k, v in thin.items() if "lora_down" in k} == {1}

    @pytest.mark.parametrize("to", ["mlx", "kohya", "transposed", "prefixed"])
    def test_compose_to_another_scheme(self, to: str, make_adapter: Make, tmp_path: Path) -> None:
        adapter = make_adapter(lora(Q, 8, 6), target_modules=["q_proj"])
        output = place(tmp_path, to, "out")
        loratool.compose([adapter], output, to=to)
        convert(output, "peft", tmp_path / "back")
        assert relative_error(dense_deltas(tmp_path / "back"), dense_deltas(adapter)) < 1e-6

    def test_merge_takes_a_unet_in_either_naming(self, make_base: Make, tmp_path: Path) -> None:
        name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
        save_file(
            {
                f"{name}.lora_down.weight": torch.ones(1, 4),
                f"{name}.lora_up.weight": torch.ones(4, 1),
            },
            tmp_path / "a.safetensors",
        )
        for module in (
            "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
            "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q",
        ):
            base = make_base({f"{module}.weight": torch.zeros(4, 4)}, name=module[:5])
            output = tmp_path / f"merged-{module[:5]}"
            loratool.merge(base, [tmp_path / "a.safetensors"], output)
            merged = load_file(output / "model.safetensors")
            assert torch.equal(merged[f"{module}.weight"], torch.ones(4, 4))


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(cli, [str(item) for item in arguments])


@pytest.mark.slow
def test_the_command_line(tmp_path: Path) -> None:
    first = stable_diffusion(tmp_path / "sd.safetensors", alpha=3.0)
    result = run("convert", first, "--to", "diffusers", "-o", tmp_path / "x.safetensors")
    assert result.exit_code == 0, result.output
    assert "kohya → diffusers, 152 modules" in result.output
    assert "multiplied into B" in result.output and "nothing dropped" in result.output
    result = run("convert", first, "--to", "peft", "-o", tmp_path / "p", "--json")
    document = json.loads(result.stdout)
    assert (document["schema"], document["from"], document["to"]) == (1, "kohya", "peft")
    assert document["exact"] is True and len(document["modules"]) == 152
    bad = run("convert", first, "--to", "peft", "-o", tmp_path / "q", "--enable-lora", "2,x")
    assert bad.exit_code == 2


class TestExperts:
    """mlx-lm stacks the factors of all experts."""

    def test_round_trip(self, tmp_path: Path) -> None:
        name = "model.layers.1.block_sparse_moe.switch_mlp.gate_proj"
        a, b = torch.randn(3, 2, 6), torch.randn(3, 5, 2)
        (tmp_path / "m").mkdir()
        save_file(
            {f"{name}.lora_a": a, f"{name}.lora_b": b}, tmp_path / "m" / "adapters.safetensors"
        )
        settings = {"fine_tune_type": "lora", "lora_parameters": {"rank": 2, "scale": 2.5}}
        (tmp_path / "m" / "adapter_config.json").write_text(json.dumps(settings))
        convert(tmp_path / "m", "peft", tmp_path / "p")
        found = dense_deltas(tmp_path / "p")
        truth = {
            f"model.layers.1.block_sparse_moe.experts.{i}.w1": 2.5 * b[i].double() @ a[i].double()
            for i in range(3)
        }
        assert found.keys() == truth.keys()
        assert relative_error(found, truth) < 1e-7
        convert(tmp_path / "p", "mlx", tmp_path / "n")
        made = load_file(tmp_path / "n" / "adapters.safetensors")
        assert torch.equal(made[f"{name}.lora_a"], a)
        assert torch.equal(made[f"{name}.lora_b"], b)
        config = json.loads((tmp_path / "n" / "adapter_config.json").read_text())
        assert config["lora_parameters"]["scale"] == 2.5
        assert config["num_layers"] == 1

    def test_a_missing_expert_is_refused(self, make_adapter: Make, tmp_path: Path) -> None:
        module = "model.layers.0.mlp.experts.1.up_proj"
        adapter = make_adapter(lora(module, 4, 4), target_modules=["up_proj"])
        with pytest.raises(UnsupportedError, match="expert 0 is not adapted"):
            convert(adapter, "mlx", tmp_path / "m")

    def test_raw_parameters_stay_with_peft(self, make_adapter: Make, tmp_path: Path) -> None:
        adapter = make_adapter(
            lora("model.layers.0.mlp.experts", 6, 5, rank=8),
            target_parameters=["mlp.experts.down_proj"],
            r=4,
        )
        with pytest.raises(UnsupportedError, match="raw parameter"):
            convert(adapter, "kohya", tmp_path / "k.safetensors")
        convert(adapter, "peft", tmp_path / "p")
        before = load_file(adapter / "adapter_model.safetensors")
        after = load_file(tmp_path / "p" / "adapter_model.safetensors")
        assert all(torch.equal(before[key], after[key]) for key in before)
        config = json.loads((tmp_path / "p" / "adapter_config.json").read_text())
        assert config["target_parameters"] == ["mlp.experts.down_proj"]
        assert (config["r"], config["lora_alpha"]) == (4, 8)


@pytest.mark.parametrize("target", ["vllm", "sglang", "llamacpp", "mlx", "comfy", "diffusers"])
def test_what_a_loader_reads_is_right_afterwards(
    target: str, make_adapter: Make, tmp_path: Path
) -> None:
    adapter = make_adapter(
        lora("model.layers.0.self_attn.q_proj", 8, 8)
        | lora("model.layers.0.mlp.gate_up_proj", 12, 8, rank=2),
        use_rslora=True,
        rank_pattern={"gate_up_proj": 2},
        alpha_pattern={"q_proj": 3},
        target_modules=["q_proj", "gate_up_proj"],
    )
    is_folder = target in ("vllm", "sglang", "llamacpp", "mlx")
    output = tmp_path / ("out" if is_folder else "out.safetensors")
    convert(adapter, None, output, target=target)
    assert not [f for f in loratool.validate(output, target=target) if f.is_error]
    convert(output, "peft", tmp_path / "back")
    found, truth = dense_deltas(tmp_path / "back"), dense_deltas(adapter)
    fused = "model.layers.0.mlp.gate_up_proj"
    if fused not in found:
        halves = [found.pop(f"model.layers.0.mlp.{leaf}") for leaf in ("gate_proj", "up_proj")]
        found[fused] = torch.cat(halves)
    assert relative_error(found, truth) < 1e-6
    if target in ("vllm", "sglang", "llamacpp"):
        config = json.loads((output / "adapter_config.json").read_text())
        assert config["r"] == config["lora_alpha"]
        assert not config["rank_pattern"] and not config["alpha_pattern"]


def test_a_scheme_or_a_loader_has_to_be_named(tmp_path: Path) -> None:
    first = stable_diffusion(tmp_path / "sd.safetensors", alpha=None)
    with pytest.raises(OptionError, match="--to, or --for"):
        convert(first, None, tmp_path / "x")
    with pytest.raises(OptionError, match="reads peft"):
        convert(first, "kohya", tmp_path / "x", target="vllm")
    with pytest.raises(OptionError, match="none of"):
        convert(first, None, tmp_path / "x", target="nobody")
