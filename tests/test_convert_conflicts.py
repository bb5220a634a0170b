"""Conversions of files that are odd, mixed, or could be taken for something else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import lora
from deltas import dense_deltas, relative_error
from safetensors.torch import load_file, save_file

import loratool
from loratool import convert
from loratool.errors import AdapterError, LoratoolError, OptionError, OutputError, UnsupportedError

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
        report = convert(tmp_path / "a.safetensors", "comfy", tmp_path / "c.safetensors")
        names = {key.partition(".lora")[0] for key in load_file(tmp_path / "c.safetensors")}
        assert "diffusion_model.single_blocks.0.linear1" in names
        assert "diffusion_model.weird.x" in names
        assert any("weird.x" in note for note in report.notes)

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
    with pytest.raises(OptionError, match="finite"):
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
