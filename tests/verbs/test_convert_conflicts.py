"""Conversions of files that are odd, mixed, or could be taken for something else."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from deltas import dense_deltas, relative_error
from safetensors.torch import load_file, save_file
from samples import lora

import loratool
from loratool import convert
from loratool.errors import AdapterError, LoratoolError, OptionError, OutputError, UnsupportedError
from loratool.names.positions import text_paths, unet_paths

Make = Callable[..., Path]
QKV = "lora_unet_double_blocks_0_img_attn_qkv"
QUERY = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
QUERY_PATH = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


def kohya(
    path: Path,
    name: str = QUERY,
    *,
    out: int = 8,
    into: int = 8,
    rank: int = 4,
    **more: torch.Tensor,
) -> Path:
    """Write a kohya file of one module with alpha 2."""
    tensors = {
        f"{name}.lora_down.weight": torch.randn(rank, into),
        f"{name}.lora_up.weight": torch.randn(out, rank),
        f"{name}.alpha": torch.tensor(2.0),
    }
    save_file(tensors | {f"{name}.{key}": value for key, value in more.items()}, path)
    return path


@pytest.mark.parametrize("to", ["peft", "mlx"])
@pytest.mark.parametrize("ending", [".safetensors", ".bin", ".pt"])
def test_a_scale_in_a_configuration_needs_a_folder(to: str, ending: str, tmp_path: Path) -> None:
    first = kohya(tmp_path / "a.safetensors")
    with pytest.raises(OutputError, match="no place for"):
        convert(first, to, tmp_path / f"out{ending}")


@pytest.mark.parametrize("slot", ["diff_b", "dora_scale"])
def test_rows_of_an_untrained_part_are_kept(slot: str, tmp_path: Path) -> None:
    up = torch.randn(36, 6) * torch.block_diag(
        torch.ones(12, 2), torch.zeros(12, 2), torch.ones(12, 2)
    )
    values = torch.rand(36) if slot == "diff_b" else torch.rand(36, 1)
    save_file(
        {
            f"{QKV}.lora_down.weight": torch.randn(6, 12),
            f"{QKV}.lora_up.weight": up,
            f"{QKV}.{slot}": values,
        },
        tmp_path / "a.safetensors",
    )
    convert(tmp_path / "a.safetensors", "diffusers", tmp_path / "b.safetensors", family="flux")
    made = load_file(tmp_path / "b.safetensors")
    key = "lora_B.bias" if slot == "diff_b" else "lora_magnitude_vector"
    found = [made[f"transformer.transformer_blocks.0.attn.to_{part}.{key}"] for part in "qkv"]
    assert torch.equal(torch.cat(found), values.flatten())
    assert not made["transformer.transformer_blocks.0.attn.to_k.lora_B.weight"].any()


class TestPathsThatLookLikePipelines:
    """Many models have a ``transformer`` or a ``unet`` of their own."""

    PATHS = (
        "transformer.blocks.0.attn.Wqkv",
        "transformer.wte",
        "transformer.word_embeddings",
        "transformer.layers.0.q_proj",
        "unet.layers.0.q_proj",
        "text_encoder.something.else",
    )

    @pytest.mark.parametrize("module", PATHS)
    @pytest.mark.parametrize("to", ["peft", "module-path", "mlx", "loralib", "transposed", "kohya"])
    def test_they_keep_their_names(
        self, module: str, to: str, make_adapter: Make, tmp_path: Path
    ) -> None:
        adapter = make_adapter(lora(module, 8, 6), target_modules=[module])
        folder = to in ("peft", "mlx")
        middle = tmp_path / ("middle" if folder else "middle.safetensors")
        convert(adapter, to, middle)
        convert(middle, "peft", tmp_path / "back")
        if to in ("module-path", "loralib") and module.endswith(("q_proj", "else")):
            return  # as a file, these are diffusers' names
        if module in ("transformer.wte", "transformer.word_embeddings") and to != "peft":
            keys = load_file(tmp_path / "back" / "adapter_model.safetensors")
            assert all(key.startswith(f"base_model.model.{module}.") for key in keys)
            return
        assert dense_deltas(tmp_path / "back").keys() == {module}

    def test_for_a_loader(self, make_adapter: Make, tmp_path: Path) -> None:
        adapter = make_adapter(lora(self.PATHS[0], 8, 6), target_modules=["Wqkv"])
        convert(adapter, None, tmp_path / "v", target="vllm")
        assert dense_deltas(tmp_path / "v").keys() == {self.PATHS[0]}


class TestMixedFiles:
    def test_factors_of_another_scheme_are_no_extras(self, tmp_path: Path) -> None:
        folder = tmp_path / "m"
        folder.mkdir()
        save_file(
            {
                "model.layers.0.k_proj.lora_a": torch.randn(8, 4),
                "model.layers.0.k_proj.lora_b": torch.randn(4, 8),
                "model.layers.0.q_proj.lora_A.weight": torch.randn(4, 8),
                "model.layers.0.q_proj.lora_B.weight": torch.randn(8, 4),
            },
            folder / "adapters.safetensors",
        )
        settings = {"fine_tune_type": "lora", "lora_parameters": {"rank": 4, "scale": 20.0}}
        (folder / "adapter_config.json").write_text(json.dumps(settings))
        with pytest.raises(AdapterError, match="mixes schemes"):
            convert(folder, "peft", tmp_path / "p")
        with pytest.raises(AdapterError, match="mixes schemes"):
            loratool.compose([folder], tmp_path / "c", to="peft")
        codes = [item.code for item in loratool.validate(folder)]
        assert "LT032" in codes
        report = convert(folder, "peft", tmp_path / "p", skip=[r"lora_[AB]\.weight"])
        assert len(report.plan.parts) == 1


class TestFamilies:
    def test_kohya_files_match_what_they_were_made_of(self, tmp_path: Path) -> None:
        key = "unet.down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q"
        save_file(
            {f"{key}.lora_A.weight": torch.randn(2, 8), f"{key}.lora_B.weight": torch.randn(8, 2)},
            tmp_path / "a.safetensors",
        )
        convert(tmp_path / "a.safetensors", "kohya", tmp_path / "k.safetensors")
        found = loratool.compare([tmp_path / "a.safetensors", tmp_path / "k.safetensors"])
        assert found.as_json()["cosine"] == pytest.approx(1)
        convert(tmp_path / "k.safetensors", "kohya", tmp_path / "l.safetensors")
        loratool.compose(
            [tmp_path / "k.safetensors", tmp_path / "l.safetensors"], tmp_path / "s.safetensors"
        )

    def test_a_module_that_the_family_does_not_have(self, tmp_path: Path) -> None:
        tensors = {}
        for name in (
            "transformer_blocks.0.attn.to_q",
            "single_transformer_blocks.0.attn.to_q",
            "weird.x",
        ):
            tensors |= {
                f"transformer.{name}.lora_A.weight": torch.randn(2, 12),
                f"transformer.{name}.lora_B.weight": torch.randn(12, 2),
            }
        save_file(tensors, tmp_path / "a.safetensors")
        with pytest.raises(UnsupportedError, match=r"^weird\.x: is no module of flux;") as error:
            convert(tmp_path / "a.safetensors", "comfy", tmp_path / "c.safetensors")
        assert "--naming diffusers" in str(error.value.hint)
        convert(tmp_path / "a.safetensors", "comfy", tmp_path / "c.safetensors", naming="diffusers")
        names = {key.partition(".lora")[0] for key in load_file(tmp_path / "c.safetensors")}
        assert names > {
            f"diffusion_model.{name}" for name in ("weird.x", "transformer_blocks.0.attn.to_q")
        }

    @pytest.mark.parametrize("to", ["diffusers", "diffusers-legacy"])
    def test_native_names_of_an_unknown_family(self, to: str, tmp_path: Path) -> None:
        tensors = lora("diffusion_model.foo.0.bar", 12, 12)
        save_file(tensors, tmp_path / "a.safetensors")
        with pytest.raises(
            UnsupportedError, match=r"^foo\.0\.bar: is no module of a family"
        ) as error:
            convert(tmp_path / "a.safetensors", to, tmp_path / "c.safetensors")
        assert "--to peft" in str(error.value.hint)
        convert(tmp_path / "a.safetensors", "peft", tmp_path / "p")
        names = load_file(tmp_path / "p" / "adapter_model.safetensors")
        assert {key.rsplit(".", 2)[0] for key in names} == {"base_model.model.foo.0.bar"}
        for kept, prefix in (
            ("comfy", "diffusion_model.foo.0.bar"),
            ("kohya", "lora_unet_foo_0_bar"),
        ):
            convert(tmp_path / "a.safetensors", kept, tmp_path / f"{kept}.safetensors")
            assert f"{prefix}.alpha" in load_file(tmp_path / f"{kept}.safetensors")

    def test_hub_names_of_an_unknown_family(self, tmp_path: Path) -> None:
        save_file(lora("transformer.foo.0.bar", 12, 12), tmp_path / "a.safetensors")
        with pytest.raises(UnsupportedError, match=r"^foo\.0\.bar: is no module of a family"):
            convert(tmp_path / "a.safetensors", "comfy", tmp_path / "c.safetensors")
        convert(tmp_path / "a.safetensors", "comfy", tmp_path / "c.safetensors", naming="diffusers")
        assert "diffusion_model.foo.0.bar.alpha" in load_file(tmp_path / "c.safetensors")

    def test_a_hint_of_a_module_to_leave_out_works(self, tmp_path: Path) -> None:
        tensors = lora("diffusion_model.double_blocks.0.img_attn.qkv", 36, 12)
        tensors |= lora("diffusion_model.single_blocks.0.linear1", 84, 12)
        tensors |= lora("diffusion_model.weird.x", 12, 12)
        save_file(tensors, tmp_path / "a.safetensors")
        with pytest.raises(UnsupportedError, match=r"^weird\.x: is no module of flux;") as error:
            convert(tmp_path / "a.safetensors", "diffusers", tmp_path / "c.safetensors")
        (pattern,) = re.findall("--drop '(.*)'", str(error.value.hint))
        convert(tmp_path / "a.safetensors", "diffusers", tmp_path / "c.safetensors", drop=[pattern])

    def test_native_names_that_two_families_have_stay_native(self, tmp_path: Path) -> None:
        """Z-Image's and Lumina 2's; nothing has to be known of them."""
        save_file(
            lora("diffusion_model.layers.0.attention.out", 12, 12), tmp_path / "a.safetensors"
        )
        convert(tmp_path / "a.safetensors", "kohya", tmp_path / "k.safetensors")
        assert "lora_unet_layers_0_attention_out.alpha" in load_file(tmp_path / "k.safetensors")
        with pytest.raises(UnsupportedError, match="different counterparts"):
            convert(tmp_path / "a.safetensors", "diffusers", tmp_path / "c.safetensors")

    def test_encoders_alone(self, tmp_path: Path) -> None:
        clip = "text_model.encoder.layers.0.self_attn.q_proj"
        t5 = "encoder.block.0.layer.0.SelfAttention.q"
        for second, parts, encoder in (
            (clip, {"te1", "te2"}, "clip_g"),
            (t5, {"te1", "te3"}, "t5xxl"),
        ):
            tensors = {}
            for path in (f"text_encoder.{clip}", f"text_encoder_2.{second}"):
                tensors |= {
                    f"{path}.lora_A.weight": torch.randn(2, 8),
                    f"{path}.lora_B.weight": torch.randn(8, 2),
                }
            save_file(tensors, tmp_path / "a.safetensors")
            convert(tmp_path / "a.safetensors", "kohya", tmp_path / "k.safetensors", force=True)
            convert(tmp_path / "a.safetensors", "comfy", tmp_path / "c.safetensors", force=True)
            assert {key.split("_")[1] for key in load_file(tmp_path / "k.safetensors")} == parts
            assert any(f".{encoder}." in key for key in load_file(tmp_path / "c.safetensors"))

    def test_a_family_without_the_modules(self, tmp_path: Path) -> None:
        with pytest.raises(OptionError, match="has none of the modules"):
            convert(
                kohya(tmp_path / "a.safetensors"),
                "comfy",
                tmp_path / "c.safetensors",
                family="flux",
            )

    def test_fused_and_split_are_not_compared(self, tmp_path: Path) -> None:
        name = "lora_unet_double_blocks_9_img_attn_qkv"
        save_file(
            {
                f"{name}.lora_down.weight": torch.randn(4, 12),
                f"{name}.lora_up.weight": torch.randn(36, 4),
            },
            tmp_path / "a.safetensors",
        )
        convert(tmp_path / "a.safetensors", "diffusers", tmp_path / "d.safetensors")
        with pytest.raises(UnsupportedError, match="original checkpoint"):
            loratool.compare([tmp_path / "a.safetensors", tmp_path / "d.safetensors"])


@pytest.mark.parametrize("alpha", [float("nan"), float("inf")])
def test_alpha_is_a_number(alpha: float, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="no number"):
        convert(kohya(tmp_path / "a.safetensors"), "comfy", tmp_path / "c.safetensors", alpha=alpha)


def test_halves_of_odd_outputs(tmp_path: Path) -> None:
    first = kohya(tmp_path / "a.safetensors", "lora_unet_final_layer_adaLN_modulation_1", out=5)
    with pytest.raises(UnsupportedError, match="5 outputs"):
        convert(first, "diffusers", tmp_path / "d.safetensors", family="flux")


class TestVariantsWithMagnitudes:
    def _lokr(self, path: Path) -> dict[str, torch.Tensor]:
        tensors = {
            f"{QUERY}.lokr_w1": torch.randn(2, 2),
            f"{QUERY}.lokr_w2": torch.randn(4, 3),
            f"{QUERY}.dora_scale": torch.rand(8, 1) + 0.5,
        }
        save_file(tensors, path)
        return tensors

    def test_they_travel(self, tmp_path: Path) -> None:
        before = self._lokr(tmp_path / "a.safetensors")
        convert(tmp_path / "a.safetensors", "comfy", tmp_path / "b.safetensors")
        convert(tmp_path / "b.safetensors", "kohya", tmp_path / "c.safetensors")
        after = load_file(tmp_path / "c.safetensors")
        assert all(torch.equal(after[key], value) for key, value in before.items())

    def test_they_are_written_out_with_a_base(self, make_base: Make, tmp_path: Path) -> None:
        tensors = self._lokr(tmp_path / "a.safetensors")
        weight = torch.randn(8, 6)
        base = make_base({f"{QUERY_PATH.removeprefix('unet.')}.weight": weight})
        with pytest.raises(UnsupportedError, match="base"):
            convert(tmp_path / "a.safetensors", "peft", tmp_path / "p", to_lora=True)
        convert(tmp_path / "a.safetensors", "peft", tmp_path / "p", to_lora=True, base=base, rank=6)
        w = weight.double()
        v = w + torch.kron(
            tensors[f"{QUERY}.lokr_w1"].double(), tensors[f"{QUERY}.lokr_w2"].double()
        )
        expected = tensors[f"{QUERY}.dora_scale"].double() / v.norm(dim=1, keepdim=True) * v - w
        (found,) = dense_deltas(tmp_path / "p").values()
        assert relative_error({"x": found}, {"x": expected}) < 1e-6


class TestBases:
    def test_a_pipeline_tells_its_encoders_apart(self, tmp_path: Path) -> None:
        local = "text_model.encoder.layers.0.self_attn.q_proj"
        for name in ("text_encoder", "text_encoder_2"):
            (tmp_path / "pipe" / name).mkdir(parents=True)
            save_file(
                {f"{local}.weight": torch.ones(8, 8)},
                tmp_path / "pipe" / name / "model.safetensors",
            )
        tensors = {}
        for part in ("te1", "te2"):
            key = f"lora_{part}_{local.replace('.', '_')}"
            tensors |= {
                f"{key}.lora_down.weight": torch.randn(2, 8),
                f"{key}.lora_up.weight": torch.randn(8, 2),
            }
        save_file(tensors, tmp_path / "a.safetensors")
        convert(
            tmp_path / "a.safetensors",
            "diffusers",
            tmp_path / "d.safetensors",
            base=tmp_path / "pipe",
        )
        names = {key.partition(".")[0] for key in load_file(tmp_path / "d.safetensors")}
        assert names == {"text_encoder", "text_encoder_2"}

    def test_an_original_checkpoint_shapes_kernels(self, make_base: Make, tmp_path: Path) -> None:
        base = make_base(
            {"model.diffusion_model.input_blocks.1.1.proj_in.weight": torch.ones(8, 8, 1, 1)}
        )
        first = kohya(tmp_path / "a.safetensors", "lora_unet_down_blocks_0_attentions_0_proj_in")
        for to in ("comfy", "kohya", "diffusers"):
            convert(first, to, tmp_path / "o.safetensors", base=base, force=True)
            shapes = {
                v.ndim for k, v in load_file(tmp_path / "o.safetensors").items() if "alpha" not in k
            }
            assert shapes == {4}

    def test_a_base_of_something_else(self, make_base: Make, tmp_path: Path) -> None:
        base = make_base({"model.layers.0.q.weight": torch.ones(8, 8)})
        with pytest.raises(AdapterError, match="none of the adapter's modules"):
            convert(kohya(tmp_path / "a.safetensors"), "peft", tmp_path / "p", base=base)

    def test_a_dora_of_another_size(
        self, make_adapter: Make, make_base: Make, tmp_path: Path
    ) -> None:
        module = "model.layers.0.self_attn.q_proj"
        base = make_base({f"{module}.weight": torch.ones(32, 32)})
        adapter = make_adapter(
            lora(module, 16, 16) | {f"{module}.lora_magnitude_vector": torch.ones(16)},
            use_dora=True,
            target_modules=["q_proj"],
        )
        with pytest.raises(AdapterError, match="the base's weight"):
            convert(adapter, "peft", tmp_path / "p", to_lora=True, base=base, rank=2)


def test_nan_is_said_and_no_error_is_made_up(tmp_path: Path) -> None:
    first = kohya(tmp_path / "a.safetensors")
    tensors = load_file(first)
    tensors[f"{QUERY}.lora_up.weight"][0, 0] = float("nan")
    save_file(tensors, first)
    report = convert(first, "comfy", tmp_path / "c.safetensors", dtype="float16")
    assert any("NaN" in note for note in report.notes)
    assert json.dumps(report.as_json(), allow_nan=False)


def test_errors_of_huge_scales(make_adapter: Make, tmp_path: Path) -> None:
    adapter = make_adapter(
        lora("model.layers.0.q_proj", 8, 8), lora_alpha=9e29, target_modules=["q_proj"]
    )
    report = convert(adapter, "kohya", tmp_path / "k.safetensors", dtype="bfloat16")
    assert 1e-4 < report.relative_error < 1e-2


def test_nested_raw_parameters_stay(make_adapter: Make, tmp_path: Path) -> None:
    module = "model.layers.0.mlp.experts"
    tensors = lora(f"{module}.base_layer", 12, 5, rank=8) | lora(module, 5, 6, rank=8)
    adapter = make_adapter(
        tensors, r=4, target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    )
    convert(adapter, "peft", tmp_path / "p")
    before = load_file(adapter / "adapter_model.safetensors")
    after = load_file(tmp_path / "p" / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("name", ["a.b", "", "a/b"])
def test_names_of_adapters(name: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="no name of an adapter"):
        convert(kohya(tmp_path / "a.safetensors"), "prefixed", tmp_path / "p.bin", name=name)


def test_options_that_mean_nothing(tmp_path: Path) -> None:
    first = kohya(tmp_path / "a.safetensors")
    with pytest.raises(OptionError, match="--to-lora"):
        convert(first, "peft", tmp_path / "p", rank=3)
    report = convert(first, "peft", tmp_path / "p", drop=["nothing like it"])
    assert any("nothing like it" in note for note in report.notes)


def test_two_names_of_one_module(tmp_path: Path) -> None:
    local = "text_model_encoder_layers_0_self_attn_q_proj"
    tensors = {}
    for part in ("te", "te1"):
        tensors |= {
            f"lora_{part}_{local}.lora_down.weight": torch.ones(2, 8),
            f"lora_{part}_{local}.lora_up.weight": torch.ones(8, 2),
        }
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(AdapterError, match="mean the same"):
        convert(tmp_path / "a.safetensors", "peft", tmp_path / "p")


def test_positions_that_do_not_add_up(tmp_path: Path) -> None:
    tensors = {}
    for number in range(143):
        tensors |= {f"unet:{number}:down": torch.ones(1, 8), f"unet:{number}:up": torch.ones(8, 1)}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(AdapterError, match="expected 144"):
        convert(tmp_path / "a.safetensors", "kohya", tmp_path / "k.safetensors")


def test_metadata_of_a_changed_base(tmp_path: Path) -> None:
    fields = {"unet.r": 4, "unet.lora_alpha": 4, "unet.init_lora_weights": "pissa"}
    save_file(
        {
            f"{QUERY_PATH}.lora_A.weight": torch.ones(4, 8),
            f"{QUERY_PATH}.lora_B.weight": torch.ones(8, 4),
        },
        tmp_path / "a.safetensors",
        {"lora_adapter_metadata": json.dumps(fields)},
    )
    with pytest.raises(UnsupportedError, match="pissa"):
        convert(tmp_path / "a.safetensors", "peft", tmp_path / "p")


def test_eight_bit_factors_move(tmp_path: Path) -> None:
    tensors = {
        f"{QUERY}.lora_down.weight": torch.randn(4, 8).to(torch.float8_e4m3fn),
        f"{QUERY}.lora_up.weight": torch.randn(8, 4).to(torch.float8_e4m3fn),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    report = convert(tmp_path / "a.safetensors", "comfy", tmp_path / "c.safetensors")
    assert all(item.is_moved for item in report.plan.parts)
    assert any("F8" in note for note in report.notes)
    convert(tmp_path / "a.safetensors", "comfy", tmp_path / "d.safetensors", dtype="float32")
    made = load_file(tmp_path / "d.safetensors")
    wide = {value.dtype for value in made.values()}
    assert wide == {torch.float32}


def test_nothing_is_left_behind_when_it_fails(tmp_path: Path) -> None:
    first = kohya(tmp_path / "a.safetensors", mystery=torch.ones(3))
    with pytest.raises(LoratoolError):
        convert(first, "diffusers", tmp_path / "d.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_product_of_whole_matrices_takes_its_scale_along(tmp_path: Path) -> None:
    """PEFT scales a LoKr of two whole matrices, LyCORIS does not."""
    (tmp_path / "p").mkdir()
    one, two = torch.randn(2, 2), torch.randn(4, 8)
    prefix = "base_model.model.model.layers.0.q_proj"
    save_file(
        {f"{prefix}.lokr_w1": one, f"{prefix}.lokr_w2": two},
        tmp_path / "p" / "adapter_model.safetensors",
    )
    settings = {"peft_type": "LOKR", "r": 2, "alpha": 6}
    (tmp_path / "p" / "adapter_config.json").write_text(json.dumps(settings))
    convert(tmp_path / "p", "kohya", tmp_path / "k.safetensors")
    made = load_file(tmp_path / "k.safetensors")
    name = "lora_model_layers_0_q_proj"
    expected = 3 * torch.kron(one.double(), two.double())
    found = torch.kron(made[f"{name}.lokr_w1"].double(), made[f"{name}.lokr_w2"].double())
    assert relative_error({"x": found}, {"x": expected}) < 1e-6
    for source in (tmp_path / "p", tmp_path / "k.safetensors"):
        convert(source, "peft", tmp_path / "x", to_lora=True, force=True)
        (delta,) = dense_deltas(tmp_path / "x").values()
        assert relative_error({"x": delta}, {"x": expected}) < 1e-6


def test_dora_on_a_square_conv1d(make_adapter: Make, make_base: Make, tmp_path: Path) -> None:
    module = "transformer.h.0.attn.c_proj"
    weight = torch.randn(16, 16)  # (in, out)
    base = make_base({f"{module}.weight": weight}, {"model_type": "gpt2"})
    magnitude = torch.rand(16) + 0.5
    adapter = make_adapter(
        lora(module, 16, 16) | {f"{module}.lora_magnitude_vector": magnitude},
        use_dora=True,
        target_modules=["c_proj"],
    )
    convert(adapter, "peft", tmp_path / "p", to_lora=True, base=base, rank=16)
    w = weight.double().T
    v = w + dense_deltas(adapter)[module]
    expected = magnitude.double()[:, None] / v.norm(dim=1, keepdim=True) * v - w
    assert relative_error(dense_deltas(tmp_path / "p"), {module: expected}) < 1e-6


class TestGroupedInputs:
    """QA-LoRA: A sees the mean of each group of inputs, which only the base's shape tells."""

    @pytest.fixture
    def adapter(self, make_adapter: Make) -> Path:
        return make_adapter(
            lora("fc", 24, 4), use_qalora=True, qalora_group_size=4, target_modules=["fc"]
        )

    def test_without_a_base(self, adapter: Path, tmp_path: Path) -> None:
        with pytest.raises(UnsupportedError, match="groups of inputs"):
            convert(adapter, "kohya", tmp_path / "k.safetensors")

    def test_with_one(self, adapter: Path, make_base: Make, tmp_path: Path) -> None:
        base = make_base({"fc.weight": torch.zeros(24, 16)})
        convert(adapter, "peft", tmp_path / "p", base=base)
        loratool.merge(base, [adapter], tmp_path / "truth")
        truth = load_file(tmp_path / "truth" / "model.safetensors")["fc.weight"].double()
        assert relative_error(dense_deltas(tmp_path / "p"), {"fc": truth}) < 1e-6


class TestComponents:
    def test_a_component_is_said_for_modules_without_one(self, tmp_path: Path) -> None:
        local = "text_model.encoder.layers.0.self_attn.q_proj"
        key = f"text_encoder_2.{local}"
        tensors = {
            f"{key}.lora_A.weight": torch.randn(2, 8),
            f"{key}.lora_B.weight": torch.randn(8, 2),
        }
        save_file(tensors, tmp_path / "a.safetensors")
        convert(tmp_path / "a.safetensors", "peft", tmp_path / "p", component="text_encoder_2")
        assert dense_deltas(tmp_path / "p").keys() == {local}
        convert(tmp_path / "p", "kohya", tmp_path / "k.safetensors", component="text_encoder_2")
        assert all(key.startswith("lora_te2_") for key in load_file(tmp_path / "k.safetensors"))
        convert(tmp_path / "p", "diffusers", tmp_path / "d.safetensors", component="text_encoder_2")
        assert load_file(tmp_path / "d.safetensors").keys() == tensors.keys()

    def test_one_that_is_not_there(self, tmp_path: Path) -> None:
        first = kohya(tmp_path / "a.safetensors")
        with pytest.raises(OptionError, match="there are: unet"):
            convert(first, "peft", tmp_path / "p", component="frob")


@pytest.mark.parametrize("with_base", [False, True])
def test_language_models_with_a_transformer(
    with_base: bool, make_base: Make, tmp_path: Path
) -> None:
    path = "transformer.h.0.attn.c_proj" if not with_base else "transformer.strange_0.x"
    base = make_base({f"{path}.weight": torch.ones(8, 8)})
    first = kohya(tmp_path / "a.safetensors", f"lora_{path.replace('.', '_')}")
    convert(first, "peft", tmp_path / "p", base=base if with_base else None)
    assert dense_deltas(tmp_path / "p").keys() == {path}


class TestFlatNamesStay:
    """In its own scheme, nobody has to know what a flattened name stands for."""

    @pytest.mark.parametrize("verb", ["convert", "rescale", "truncate", "compose"])
    def test_every_verb(self, verb: str, tmp_path: Path) -> None:
        first = kohya(tmp_path / "a.safetensors", "lora_some_thing_strange")
        output = tmp_path / "b.safetensors"
        run = {
            "convert": lambda: convert(first, "kohya", output),
            "rescale": lambda: loratool.rescale(first, output, scale=2),
            "truncate": lambda: loratool.truncate(first, output, rank=2),
            "compose": lambda: loratool.compose([first, first], output),
        }
        run[verb]()
        names = {key.partition(".")[0] for key in load_file(output)}
        assert names == {"lora_some_thing_strange"}

    def test_elsewhere_they_are_refused(self, tmp_path: Path) -> None:
        first = kohya(tmp_path / "a.safetensors", "lora_some_thing_strange")
        with pytest.raises(AdapterError, match="not known"):
            loratool.compose([first], tmp_path / "p", to="peft")


class TestDryRuns:
    """What is said of a scheme that a verb does not write itself is true of the file."""

    @pytest.mark.parametrize("verb", ["rescale", "truncate", "compose"])
    def test_sizes(self, verb: str, tmp_path: Path) -> None:
        first = kohya(tmp_path / "a.safetensors")
        output = tmp_path / "b.safetensors"

        def run(*, dry_run: bool) -> dict[str, object]:
            if verb == "rescale":
                report = loratool.rescale(first, output, scale=2, dry_run=dry_run)
                return report.as_json()
            if verb == "truncate":
                return loratool.truncate(first, output, rank=2, dry_run=dry_run).as_json()
            return loratool.compose([first, first], output, dry_run=dry_run).as_json()

        expected = run(dry_run=True)
        assert not output.exists()
        real = run(dry_run=False)
        size = output.stat().st_size
        assert real["bytes_written"] == size
        assert abs(int(str(expected["bytes_to_write"])) - size) <= 128
        assert expected["tensors"] == real["tensors"]

    def test_refusals(self, make_adapter: Make, tmp_path: Path) -> None:
        adapter = make_adapter(
            lora("model.layers.0.q_proj", 8, 8) | {"score.weight": torch.ones(2, 8)},
            target_modules=["q_proj"],
            modules_to_save=["score"],
        )
        for dry_run in (True, False):
            with pytest.raises(UnsupportedError, match="no place") as caught:
                loratool.compose([adapter], tmp_path / "k.safetensors", to="kohya", dry_run=dry_run)
            assert "--skip" in str(caught.value.hint)


def test_an_alpha_without_factors_is_named_and_left(tmp_path: Path) -> None:
    first = kohya(tmp_path / "a.safetensors")
    tensors = load_file(first) | {
        "lora_unet_mid_block_attentions_0_proj_in.alpha": torch.tensor(1.0)
    }
    save_file(tensors, first)
    report = convert(first, "peft", tmp_path / "p")
    assert any("belong to no factors" in note for note in report.notes)
    assert [name for name, _ in report.plan.dropped] == [
        "lora_unet_mid_block_attentions_0_proj_in.alpha"
    ]


def test_the_hint_for_a_tensor_without_a_place_works(make_adapter: Make, tmp_path: Path) -> None:
    module = "model.layers.0.q_proj"
    adapter = make_adapter(
        lora(module, 8, 8) | {f"{module}.lora_B.bias": torch.ones(8)},
        lora_bias=True,
        target_modules=["q_proj"],
    )
    with pytest.raises(UnsupportedError) as caught:
        convert(adapter, "mlx", tmp_path / "m")
    pattern = str(caught.value.hint).split("'")[1]
    report = convert(adapter, "mlx", tmp_path / "m", skip=[pattern])
    assert len(report.plan.parts) == 1


def test_merging_half_of_a_pipeline_says_how(make_base: Make, tmp_path: Path) -> None:
    name = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    first = kohya(tmp_path / "a.safetensors")
    other = kohya(tmp_path / "b.safetensors", name)
    save_file(load_file(first) | load_file(other), first)
    base = make_base({f"{QUERY_PATH.removeprefix('unet.')}.weight": torch.zeros(8, 8)})
    with pytest.raises(LoratoolError) as caught:
        loratool.merge(base, [first], tmp_path / "m")
    pattern = str(caught.value.hint).split("'")[1]
    report = loratool.merge(base, [first], tmp_path / "m", skip=[pattern])
    assert report.merged == 1


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_lists_of_the_first_files(component: str, tmp_path: Path) -> None:
    """cloneofsimo/lora once saved a bare list of factors: up, down, up, down."""
    paths = unet_paths() if component == "unet" else text_paths(8)
    assert paths is not None
    listed, truth = [], {}
    for path in paths:
        up = torch.randn(64 if path.endswith("ff.net.0.proj") else 8, 2)
        down = torch.randn(2, 8)
        listed += [up, down]
        truth[path] = up.double() @ down.double()
    torch.save(listed, tmp_path / "a.pt")
    convert(tmp_path / "a.pt", "peft", tmp_path / "p")
    assert relative_error(dense_deltas(tmp_path / "p"), truth) < 1e-6


def test_the_hint_for_several_tensors_names_them_all(make_adapter: Make, tmp_path: Path) -> None:
    adapter = make_adapter(
        lora("model.layers.0.q_proj", 8, 8)
        | {"score.weight": torch.ones(2, 8), "score.bias": torch.ones(2)},
        target_modules=["q_proj"],
        modules_to_save=["score"],
    )
    with pytest.raises(UnsupportedError, match="1 more") as caught:
        convert(adapter, "kohya", tmp_path / "k.safetensors")
    pattern = str(caught.value.hint).split("'")[1]
    report = convert(adapter, "kohya", tmp_path / "k.safetensors", drop=[pattern])
    assert len(report.plan.dropped) == 2 and len(report.plan.parts) == 1


@pytest.mark.parametrize(("out", "into"), [(12, 9), (9, 12), (9, 9)])
def test_glora_of_either_layout_has_its_own_rank(out: int, into: int, tmp_path: Path) -> None:
    """LyCORIS before 2.0 stored ``a1 (r, in)``, ``a2 (in, r)``, ``b1 (r, in)``, ``b2 (out, r)``."""
    weight, rank = torch.randn(out, into), 3
    a1, a2 = torch.randn(rank, into), torch.randn(into, rank)
    b1, b2 = torch.randn(rank, into), torch.randn(out, rank)
    base = tmp_path / "base.safetensors"
    save_file({f"{QUERY_PATH.removeprefix('unet.')}.weight": weight}, base)
    truth = 2 / rank * (weight.double() @ (a2 @ a1).double() + (b2 @ b1).double())
    layouts = {"old": (a1, a2, b1, b2), "new": (a2, a1, b2, b1)}
    for name, parts in layouts.items():
        slots = dict(zip(("a1", "a2", "b1", "b2"), parts, strict=True))
        tensors = {f"{QUERY}.{slot}.weight": value for slot, value in slots.items()}
        first, output = tmp_path / f"{name}.safetensors", tmp_path / f"{name}-out"
        save_file(tensors | {f"{QUERY}.alpha": torch.tensor(2.0)}, first)
        convert(first, "peft", output, to_lora=True, base=base, rank=9)
        ((module, found),) = dense_deltas(output).items()
        assert relative_error({module: found}, {module: truth}) < 1e-5
