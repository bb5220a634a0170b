"""Every hint of a refusal is followed, as a user would, and leads to what was asked for."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

import pytest
import torch
from corpus import RANK, UNET_PATHS, VARIANTS, Draw, Sample, sample, write_model
from safetensors.torch import load_file, save_file
from samples import SCHEMES, place

from loratool.cli.main import _run as run_command_line
from loratool.loaders import loader_named, loader_names
from loratool.schemes import scheme_named

COMMAND: Final = re.compile(
    r"loratool (?:merge|convert|compose|extract|truncate) .*?-o (?:OUT|MERGED)"
)
OPTION: Final = re.compile(r"(?<=\s)--[a-z-]+(?:\s+(?:'[^']*'|(?!-)[^\s,;']+))?")
FLAGS: Final = ("--to-lora", "--fold")


@dataclass
class Case:
    """An adapter, its base, and somewhere to write."""

    adapter: Path
    base: Path
    folder: Path
    initial: Path
    outputs: int = 0

    def output(self, scheme: str = "peft") -> Path:
        self.outputs += 1
        return place(self.folder, scheme, f"out{self.outputs}")


def with_a_plain_module(made: Sample) -> Sample:
    """Add a plain LoRA of another module, so that something is left where one is left out."""
    draw = Draw("beside", "F32")
    down, up = draw(RANK, 32), draw(32, RANK)
    if made.config is None and any(key.startswith("lora_unet") for key in made.tensors):
        name = "lora_unet_mid_block_attentions_0_proj_out"
        tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        base = {"mid_block.attentions.0.proj_out.weight": draw(32, 32)}
        return replace(made, tensors=made.tensors | tensors, base=made.base | base)
    return made


def case_of(variant: str, folder: Path) -> Case:
    made = sample(variant)
    if not made.base:  # the delta is the same on any
        weights = {}
        for module, delta in made.deltas.items():
            path, kernel = UNET_PATHS[module]
            into = delta.shape[1] // (9 if kernel else 1)
            weights[f"{path}.weight"] = torch.randn(len(delta), into, *kernel)
        made = replace(made, base=weights)
    made = with_a_plain_module(made)
    initial = replace(sample(variant, seed="initial"), base=made.base)
    return Case(
        made.write(folder),
        write_model(folder / "base", made.base, made.base_config),
        folder,
        initial.write(folder, "initial"),
    )


def commands(case: Case) -> Iterator[tuple[str, Callable[[Path], list[str]], str]]:
    """Yield what is tried: a name, the command for an adapter, and the scheme of its output."""
    yield "merge", lambda a: ["merge", str(case.base), str(a)], "peft"
    for scheme in SCHEMES:
        if scheme_named(scheme).follows is not None:
            continue  # which these models are not of
        if scheme in ("onetrainer", "xlabs") and case.adapter.is_dir():
            continue  # nor are they pipelines, which is said once all else is mended
        yield f"convert to {scheme}", lambda a, s=scheme: ["convert", str(a), "--to", s], scheme
    for loader in loader_names():
        scheme = loader_named(loader).scheme
        yield f"for {loader}", lambda a, n=loader: ["convert", str(a), "--for", n], scheme
    yield "to-lora", lambda a: ["convert", str(a), "--to", "peft", "--to-lora"], "peft"
    yield "compose", lambda a: ["compose", str(a), str(a), "--to", "peft"], "peft"
    for options in (["--scale", "0.5"], ["--fold"], ["--alpha", "3"], ["--max-norm", "0.1"]):
        name = f"rescale {options[0]}"
        yield name, lambda a, o=options: ["rescale", str(a), *o], ""
    yield "truncate", lambda a: ["truncate", str(a), "--rank", "2"], ""
    yield "truncate energy", lambda a: ["truncate", str(a), "--energy", "0.9"], ""
    yield "compare", lambda a: ["compare", str(a), str(a)], "none"


def run(words: Sequence[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    capsys.readouterr()
    status = run_command_line(list(words), debug=False)
    return status, capsys.readouterr().err


def attempt(
    make: Callable[[Path], list[str]],
    adapter: Path,
    scheme: str,
    case: Case,
    capsys: pytest.CaptureFixture[str],
    more: Sequence[str] = (),
) -> tuple[int, str]:
    """Run a command on an adapter, in a place that its scheme may be written to."""
    words = [*make(adapter), *more]
    if "--to" in more:
        scheme = more[list(more).index("--to") + 1]
        words = without_option(without_option(make(adapter), "--to"), "--for") + list(more)
    if scheme == "":
        scheme = "peft" if adapter.is_dir() else "kohya"
    output = ["-o", str(case.output(scheme))] if scheme != "none" else []
    return run([*words, *output], capsys)


def without_option(words: Sequence[str], name: str) -> list[str]:
    at = words.index(name) if name in words else len(words)
    return [*words[:at], *words[at + 2 :]]


def filled(words: Sequence[str], case: Case, names: dict[str, str]) -> list[str]:
    """Return words of a hint with what stands for something in them."""
    known = {
        "ADAPTER": str(case.adapter),
        "BASE": str(case.base),
        "FOLDER": str(case.initial),
        "R": "4",
        **names,
    }
    return [known.get(word, word) for word in words]


def follow(
    hint: str,
    make: Callable[[Path], list[str]],
    scheme: str,
    case: Case,
    capsys: pytest.CaptureFixture[str],
) -> tuple[int, str]:
    """Do what a hint says; return what comes of it: an exit status, and what was said."""
    names: dict[str, str] = {}
    found = [shlex.split(match)[1:] for match in COMMAND.findall(hint.split("; or ")[0])]
    for words in found:
        output = case.output()
        last = words[-1]
        done = run([*filled(words[:-1], case, names), str(output)], capsys)
        if done[0] != 0:
            return done
        names[last] = str(output)
    if found:
        if found[0][0] == "merge":
            return 0, ""  # which is what remains to be done
        return attempt(make, Path(names["OUT"]), scheme, case, capsys)
    options = options_of(hint)
    assert options, hint
    return attempt(make, case.adapter, scheme, case, capsys, filled(options, case, names))


def options_of(hint: str) -> list[str]:
    given = [shlex.split(match) for match in OPTION.findall(hint)]
    return [word for words in given for word in words[: 1 if words[0] in FLAGS else 2]]


def both(make: Callable[[Path], list[str]], options: list[str], adapter: Path) -> list[str]:
    return [*make(adapter), *options]


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_hint_works(variant: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = case_of(variant, tmp_path)
    failures = []
    for name, make, scheme in commands(case):
        status, said = attempt(make, case.adapter, scheme, case, capsys)
        if status == 0:
            continue
        assert status == 2 and said.count("\n") == 2, (name, said)
        error, hint = said.splitlines()
        assert hint.startswith("hint: "), (name, said)
        after, answer = follow(hint, make, scheme, case, capsys)
        if after and "hint: write another scheme" in answer:  # which a scheme of few names may say
            first = filled(options_of(hint), case, {})
            again = partial(both, make, first)
            after, answer = follow(answer.splitlines()[1], again, scheme, case, capsys)
        if after:
            failures.append(f"{name}\n  {error}\n  {hint}\n  {answer}")
    assert not failures, "\n".join(failures)


def pair(name: str, out: int = 8, into: int = 8) -> dict[str, torch.Tensor]:
    return {
        f"{name}.lora_down.weight": torch.randn(2, into),
        f"{name}.lora_up.weight": torch.randn(out, 2),
        f"{name}.alpha": torch.tensor(1.0),
    }


WAN: Final = [f"blocks.{i}.cross_attn.{p}" for i in (0, 1, 11) for p in "kv"]
SD: Final = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
MISSING: Final = {
    "some modules of every block": (
        [f"diffusion_model.{name}" for name in WAN],
        [f"diffusion_model.{name}_img" for name in WAN],
        WAN,
    ),
    "one module": (
        ["diffusion_model.blocks.0.self_attn.q"],
        ["diffusion_model.head.head"],
        ["blocks.0.self_attn.q"],
    ),
    "a text encoder": (
        [f"lora_unet_{SD.replace('.', '_')}"],
        [f"lora_te_text_model_encoder_layers_{i}_self_attn_q_proj" for i in range(3)],
        [SD],
    ),
    "a module inside another one": (
        ["diffusion_model.blocks.0.ffn.2"],
        ["diffusion_model.blocks.0.ffn"],
        ["blocks.0.ffn.2"],
    ),
    "whole parameters": (["diffusion_model.blocks.0.self_attn.q"], [], ["blocks.0.self_attn.q"]),
}


@pytest.mark.parametrize("case", MISSING)
def test_what_the_base_lacks_can_be_left_out(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    present, missing, modules = MISSING[case]
    tensors: dict[str, torch.Tensor] = {}
    for name in present:
        tensors |= pair(name)
    kept = set(tensors)
    for name in missing:
        tensors |= pair(name)
    if not missing:
        missing = ["diffusion_model.blocks.0.norm3", "diffusion_model.blocks.0"]
        tensors |= {
            f"{name}.{leaf}": torch.ones(8)
            for name, leaf in zip(missing, ("diff", "diff_m"), strict=True)
        }
    adapter = tmp_path / "adapter.safetensors"
    save_file(tensors, adapter)
    base = write_model(tmp_path / "base", {f"{name}.weight": torch.zeros(8, 8) for name in modules})
    words = ["merge", str(base), str(adapter), "-o", str(tmp_path / "out")]
    status, said = run(words, capsys)
    error, hint = said.splitlines()
    assert status == 2
    assert any(name in error for name in missing)
    if len(missing) > 1:
        assert f"nor {len(missing) - 1} more" in error or len(missing) == 2
    options = [shlex.split(match) for match in OPTION.findall(hint)]
    status, said = run([*words, *(word for each in options for word in each)], capsys)
    assert status == 0, said
    left = re.findall(r"unused.*", said)
    assert len(left) <= 1
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert all(value.any() for value in merged.values())
    skipped = [key for key in tensors if re.search(options[0][1], key)]
    assert set(tensors) - set(skipped) == kept


def test_where_nothing_fits_another_base_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file(pair("diffusion_model.blocks.0.self_attn.q"), tmp_path / "adapter.safetensors")
    base = write_model(tmp_path / "base", {"model.layers.0.mlp.weight": torch.zeros(8, 8)})
    words = ["merge", str(base), str(tmp_path / "adapter.safetensors"), "-o", str(tmp_path / "o")]
    status, said = run(words, capsys)
    assert status == 2
    assert "is this the base" in said
    assert "--skip" not in said


def test_a_bias_that_the_base_lacks_can_be_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "diffusion_model.blocks.0.self_attn.q"
    save_file({**pair(name), f"{name}.diff_b": torch.ones(8)}, tmp_path / "adapter.safetensors")
    base = write_model(tmp_path / "base", {"blocks.0.self_attn.q.weight": torch.zeros(8, 8)})
    words = ["merge", str(base), str(tmp_path / "adapter.safetensors"), "-o", str(tmp_path / "o")]
    status, said = run(words, capsys)
    assert status == 2
    (option,) = (shlex.split(match) for match in OPTION.findall(said))
    assert run([*words, *option], capsys)[0] == 0


def test_tensors_without_a_place_can_be_left_out_all_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    q = "model.layers.0.self_attn.q_proj"
    folder = tmp_path / "adapter"
    folder.mkdir()
    tensors = {f"{q}.lora_A.weight": torch.ones(2, 8), f"{q}.lora_B.weight": torch.ones(8, 2)}
    tensors |= {f"strange.{i}.thing": torch.ones(3) for i in range(3)}
    tensors |= {f"{q}.base_layer.bias": torch.ones(8)}
    save_file(
        {f"base_model.model.{k}": v for k, v in tensors.items()},
        folder / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "bias": "lora_only"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    base = write_model(tmp_path / "base", {f"{q}.weight": torch.zeros(8, 8)})
    words = ["merge", str(base), str(folder), "-o", str(tmp_path / "out")]
    status, said = run(words, capsys)
    assert status == 2
    assert "nor are 3 more" in said
    (option,) = (shlex.split(match) for match in OPTION.findall(said))
    assert run([*words, *option], capsys)[0] == 0
    assert load_file(tmp_path / "out" / "model.safetensors")[f"{q}.weight"].any()
