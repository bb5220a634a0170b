"""Merge into a tiny model of every class of transformers, and compare with PEFT's merge.

Each class is built, saved with ``save_pretrained``, adapted by PEFT, and merged by loratool:

* ``live``: the adapter as PEFT writes it, with the names of the live model, on the files. The
  merged model, loaded again, has to have the weights of PEFT's ``merge_and_unload``.
* ``files``: an adapter with the names of the files, on the files; truth is the formula.
* ``old``: the same adapter on files with the names of the live model; which rows of them a row
  of the saved files became is found by its values.
* ``embeddings``: as ``live``, on all embeddings and the head.

    python tests/support/transformers_sweep.py [--only TYPE,TYPE] [--log FILE] [--jobs I/N]
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import logging
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import peft
import tiny_transformers as tiny
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import loratool
from loratool.errors import LoratoolError

__all__ = ["VERSIONS", "Result", "load", "main", "sweep_class"]

VERSIONS: Final = ("live", "files", "old", "embeddings")
RANK: Final = 3
ALPHA: Final = 6.0
LIMIT_S: Final = 90


@dataclass(frozen=True)
class Result:
    """What became of one merge: ``right``, ``refused``, ``wrong`` or ``skipped``, and why."""

    model_type: str
    class_name: str
    version: str
    outcome: str
    why: str = ""


class Skip(Exception):
    """Nothing to compare: transformers or PEFT cannot do it."""


def sweep_class(
    model_type: str, class_name: str, versions: Iterable[str] = VERSIONS, folder: Path | None = None
) -> list[Result]:
    """Return what becomes of each version of a merge into one class."""
    place = Path(tempfile.mkdtemp(dir=folder))
    try:
        try:
            config = tiny.tiny_config(model_type)
            model = tiny.build(class_name, config)
            model.save_pretrained(place / "base")
            again = load(class_name, place / "base")
            again.made_anew = _made_anew(model, again, class_name, place / "base")
        except Exception as error:
            return [Result(model_type, class_name, "all", "skipped", _line(error))]
        found = []
        for version in versions:
            try:
                why = RUNS[version](again, class_name, place / version, place / "base")
                outcome = "wrong" if why else "right"
            except Skip as error:
                outcome, why = "skipped", _line(error)
            except LoratoolError as error:
                outcome, why = "refused", _line(error)
            except Exception as error:
                outcome, why = "wrong", f"{type(error).__name__}: {_line(error)}"
            found.append(Result(model_type, class_name, version, outcome, why))
        return found
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _line(error: BaseException) -> str:
    text = str(error).strip().split("\n")[0]
    return (text or type(error).__name__)[:220]


def load(class_name: str, folder: Path) -> nn.Module:
    """Return the model in a folder."""
    kind = getattr(transformers, class_name)
    model: nn.Module = kind.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def _made_anew(model: nn.Module, again: nn.Module, class_name: str, folder: Path) -> set[str]:
    """Return the tensors that transformers makes itself on loading, the same each time.

    Raises:
        Skip: It does not read what it wrote, but something else each time.
    """
    found = _unlike(model, again)
    if found and (names := _unlike(again, load(class_name, folder))):
        raise Skip(f"transformers does not read back its own {min(names)}")
    return found


def _unlike(model: nn.Module, other: nn.Module) -> set[str]:
    first, second = model.state_dict(), other.state_dict()
    return {
        name
        for name in first.keys() & second.keys()
        if first[name].is_floating_point() and not torch.equal(first[name].float(), second[name])
    }


# --- the adapter as PEFT writes it


def _linear(model: nn.Module) -> list[str]:
    """Return all linear layers but a head that shares the weight of an embedding."""
    counts = collections.Counter(
        id(parameter) for one in model.modules() for parameter in one.parameters(recurse=False)
    )
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
        and name
        and counts[id(module.weight)] == 1
        and not _inside_attention(model, name)
        and module.weight.numel()
    ]


def _inside_attention(model: nn.Module, name: str) -> bool:
    owner = model.get_submodule(name.rpartition(".")[0])
    return isinstance(owner, nn.MultiheadAttention)


def _experts(model: nn.Module) -> list[str]:
    """Return the parameters that are stacks of matrices, in modules that have no weight."""
    return [
        f"{name}.{leaf}"
        for name, module in model.named_modules()
        for leaf, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3 and leaf.endswith("proj") and not hasattr(module, "weight")
    ]


def _embeddings(model: nn.Module) -> list[str]:
    found = [n for n, m in model.named_modules() if isinstance(m, nn.Embedding)]
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return found + [n for n, m in model.named_modules() if m is head and isinstance(m, nn.Linear)]


def _has_embeddings(model: nn.Module) -> bool:
    try:
        model.get_input_embeddings()
    except NotImplementedError:
        return False
    return True


def _adapt(model: nn.Module, modules: list[str], parameters: list[str], folder: Path) -> nn.Module:
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=modules or [],
        target_parameters=parameters or None,
        bias="none",
    )
    if not hasattr(model, "get_input_embeddings") or not _has_embeddings(model):
        model.get_input_embeddings = lambda: nn.Embedding(1, 1)  # type: ignore[method-assign]
    try:
        adapted = peft.get_peft_model(model, config)
    except Exception as error:
        raise Skip(f"PEFT: {_line(error)}") from error
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return adapted


def _against_peft(
    class_name: str, folder: Path, base: Path, modules: list[str], parameters: list[str]
) -> str:
    """Return what differs from PEFT's merge; nothing where they are the same."""
    model = load(class_name, base)
    if not modules and not parameters:
        raise Skip("nothing to adapt")
    try:
        adapted = _adapt(model, modules, parameters, folder / "adapter")
    except Skip:
        kept = [m for m in modules if "out_proj" not in m.rpartition(".")[2]]
        if len(kept) == len(modules) or not kept:
            raise
        adapted = _adapt(load(class_name, base), kept, parameters, folder / "adapter")
    loratool.merge(base, [folder / "adapter"], output=folder / "out")
    try:
        expected = adapted.merge_and_unload().state_dict()
    except Exception as error:
        raise Skip(f"PEFT: {_line(error)}") from error
    found = load(class_name, folder / "out").state_dict()
    return _difference(
        {n: t.double().numpy() for n, t in expected.items() if t.is_floating_point()},
        {n: t.double().numpy() for n, t in found.items() if t.is_floating_point()},
    )


def _difference(expected: dict[str, Any], found: dict[str, Any]) -> str:
    missing = sorted(expected.keys() - found.keys())
    if missing:
        return f"missing: {missing[0]}"
    for name, truth in expected.items():
        if truth.shape != found[name].shape:
            return f"{name}: shape {found[name].shape}, not {truth.shape}"
        error = float(np.abs(truth - found[name]).max(initial=0, where=np.isfinite(truth)))
        if not error < 1e-4 * max(1.0, float(np.abs(truth).max(initial=0))):
            return f"{name}: differs by {error:.3g}"
    return ""


def _run_live(model: nn.Module, class_name: str, folder: Path, base: Path) -> str:
    return _against_peft(class_name, folder, base, _linear(model), _experts(model))


def _run_embeddings(model: nn.Module, class_name: str, folder: Path, base: Path) -> str:
    """Adapt embeddings and head; truth is what the live layers compute, each of them apart.

    PEFT's merge adds the deltas of both sides of a tie to the weight that they share.
    """
    modules = [n for n in _embeddings(model) if f"{n}.weight" not in model.made_anew]
    if not modules:
        raise Skip("nothing to adapt")
    adapted = _adapt(load(class_name, base), modules, [], folder / "adapter")
    expected = {
        name: model.get_submodule(name).weight.detach().double().numpy()
        + adapted.get_base_model()
        .get_submodule(name)
        .get_delta_weight("default")
        .detach()
        .double()
        .numpy()
        for name in modules
        if hasattr(adapted.get_base_model().get_submodule(name), "get_delta_weight")
    }
    with torch.no_grad():
        loratool.merge(base, [folder / "adapter"], output=folder / "out")
    merged = load(class_name, folder / "out")
    found = {name: merged.get_submodule(name).weight.detach().double().numpy() for name in expected}
    return _difference(expected, found)


# --- an adapter with the names of the files


def _file_sites(model: nn.Module, stored: dict[str, torch.Tensor]) -> dict[str, list[Any]]:
    """Return the row of the live model that each row of the files' matrices is.

    Only those that are wholly in linear layers or experts of the live model.
    """
    rows: dict[bytes, tuple[str, int]] = {}
    live = [f"{name}.weight" for name in _linear(model)] + _experts(model)
    for name in live:
        tensor = model.get_parameter(name).detach()
        if tensor.ndim not in (2, 3):
            continue
        flat = tensor.reshape(-1, tensor.shape[-1])
        rows |= {_digest(row): (name, i) for i, row in enumerate(flat.numpy())}
    found = {}
    for name, tensor in stored.items():
        if tensor.ndim == 2 and tensor.numel() and name.endswith((".weight", "in_proj_weight")):
            places = [rows.get(_digest(row)) for row in tensor.numpy()]
            if all(places):
                found[name] = places
    return found


def _digest(row: np.ndarray) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(row, dtype=np.float32).tobytes()).digest()


def _with_file_names(
    model: nn.Module, base: Path, folder: Path
) -> tuple[dict[str, np.ndarray], dict[str, list[Any]], dict[str, torch.Tensor]]:
    stored: dict[str, torch.Tensor] = {}
    for file in base.glob("*.safetensors"):
        stored |= load_file(file)
    sites = _file_sites(model, stored)
    if not sites:
        raise Skip("no matrix of the files is in a linear layer as it is")
    if all(
        places[0][0] == name and len({p[0] for p in places}) == 1 for name, places in sites.items()
    ):
        raise Skip("the files have the names of the live model")
    generator = torch.Generator().manual_seed(2)
    tensors, deltas = {}, {}
    for name in sites:
        rows, columns = stored[name].shape
        down = torch.randn((RANK, columns), generator=generator) * 0.3
        up = torch.randn((rows, RANK), generator=generator) * 0.3
        module = name.rpartition(".")[0]
        tensors[f"base_model.model.{module}.lora_A.weight"] = down
        tensors[f"base_model.model.{module}.lora_B.weight"] = up
        deltas[name] = (ALPHA / RANK) * up.double().numpy() @ down.double().numpy()
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    leaves = sorted({name.split(".")[-2] for name in sites})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": leaves}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return deltas, sites, stored


def _run_files(model: nn.Module, class_name: str, folder: Path, base: Path) -> str:
    deltas, _, stored = _with_file_names(model, base, folder / "adapter")
    expected = {name: t.double().numpy() for name, t in stored.items() if t.is_floating_point()}
    for name, delta in deltas.items():
        expected[name] = expected[name] + delta
    return _merged_files(folder, base, expected)


def _run_old(model: nn.Module, class_name: str, folder: Path, base: Path) -> str:
    deltas, sites, _ = _with_file_names(model, base, folder / "adapter")
    live = folder / "base"
    live.mkdir()
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    tensors = {
        n: t.detach().clone().contiguous() for n, t in model.state_dict().items() if n not in tied
    }
    save_file(tensors, live / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(base / "config.json", live)
    expected = {n: t.double().numpy().copy() for n, t in tensors.items() if t.is_floating_point()}
    for name, delta in deltas.items():
        for row, (place, index) in enumerate(sites[name]):
            expected[place].reshape(-1, expected[place].shape[-1])[index] += delta[row]
    return _merged_files(folder, live, expected)


def _merged_files(folder: Path, base: Path, expected: dict[str, np.ndarray]) -> str:
    loratool.merge(base, [folder / "adapter"], output=folder / "out")
    found: dict[str, Any] = {}
    for file in (folder / "out").glob("*.safetensors"):
        found |= {n: t.double().numpy() for n, t in load_file(file).items()}
    return _difference(expected, found)


RUNS: Final = {
    "live": _run_live,
    "files": _run_files,
    "old": _run_old,
    "embeddings": _run_embeddings,
}


# --- the command line


def table(results: list[Result]) -> str:
    """Return what came out, as text."""
    lines = []
    merged = [r for r in results if r.version != "all"]
    left_out = [r for r in results if r.version == "all"]
    classes = {(r.model_type, r.class_name) for r in merged}
    types = {r.model_type for r in merged}
    lines.append(
        f"{len(classes)} classes of {len(types)} model types "
        f"built, {len(left_out)} left out; transformers {transformers.__version__}, "
        f"PEFT {peft.__version__}"
    )
    for version in VERSIONS:
        counts = collections.Counter(r.outcome for r in merged if r.version == version)
        told = ", ".join(f"{counts[o]} {o}" for o in ("right", "refused", "wrong", "skipped"))
        lines.append(f"{version:<11} {told}")
    for outcome in ("wrong", "refused"):
        lines += [
            f"{outcome}: {r.class_name} [{r.version}] {r.why}"
            for r in merged
            if r.outcome == outcome
        ]
    reasons = collections.Counter(r.why[:60] for r in results if r.outcome == "skipped")
    lines += [f"skipped {count}: {why}" for why, count in reasons.most_common(40)]
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    """Run the sweep that ``arguments`` name, and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="model types, comma-separated")
    parser.add_argument("--versions", default=",".join(VERSIONS))
    parser.add_argument("--log", type=Path, help="a file for one JSON line for each merge")
    parser.add_argument("--jobs", default="1/1", help="I/N: the I-th of N parts")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after so long")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    only = set(filter(None, options.only.split(",")))
    part, parts = map(int, options.jobs.split("/"))
    signal.signal(signal.SIGALRM, _too_long)
    began = time.monotonic()
    results: list[Result] = []
    for index, (model_type, _, name) in enumerate(tiny.all_classes()):
        if (only and model_type not in only and name not in only) or index % parts != part - 1:
            continue
        if time.monotonic() - began > options.seconds:
            break
        signal.alarm(LIMIT_S)
        try:
            found = sweep_class(model_type, name, options.versions.split(","))
        except Exception as error:
            found = [Result(model_type, name, "all", "skipped", _line(error))]
        finally:
            signal.alarm(0)
        results += found
        if options.log:
            with options.log.open("a") as log:
                log.writelines(json.dumps(asdict(one)) + "\n" for one in found)
    print(table(results))


def _too_long(*_: object) -> None:
    raise Skip(f"takes more than {LIMIT_S} seconds")


if __name__ == "__main__":
    main(sys.argv[1:])
