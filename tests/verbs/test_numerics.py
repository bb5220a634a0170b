"""Every verb's numbers on tiny inputs, against float64 formulas and against what they once were.

``numerics.json`` holds, for each case, the relative Frobenius error and the largest error in
units of the last place, as the arithmetic with torch 2.13 had them. No case may become worse than
1.05 times that, unless it stays within the rounding that its dtype allows. With
``LORATOOL_UPDATE=1`` cases without figures get theirs; figures that are there are never changed:
delete a line to measure it again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from corpus import (
    EXACT,
    MERGEABLE,
    NEAREST,
    RANK,
    SHAPES,
    Array,
    Change,
    Draw,
    deltas_of,
    exact,
    sample,
    spacing,
    unit,
    write_model,
)
from safetensors.torch import load_file

import loratool

pytestmark = pytest.mark.slow

FIGURES: Final = Path(__file__).with_name("numerics.json")
SLACK: Final = 1.05
FLOATS: Final = ("F64", "F32", "F16", "BF16")
OPTION: Final = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
ALGEBRA: Final = 2.0**-43
"""What decompositions in float64 may lose, a thousand units of its rounding."""


@dataclass(frozen=True)
class Error:
    """How far one run was from the truth.

    Attributes:
        relative: ``‖found - truth‖ / ‖truth‖`` over all tensors.
        ulps: The largest error in units of the last place.
        is_rounding: Whether all is within the rounding that its dtype allows.
    """

    relative: float
    ulps: float
    is_rounding: bool

    @property
    def is_exact(self) -> bool:
        """Whether nothing was rounded but float64."""
        return self.relative <= ALGEBRA

    @property
    def figures(self) -> list[float]:
        return [float(f"{value:.3e}") for value in (self.relative, self.ulps)]


def merge_error(found: Mapping[str, Array], truth: Mapping[str, Change], dtype: str) -> Error:
    """Compare merged weights, element by element.

    One rounding to ``dtype`` is half a unit; the sum before it is in float32, or in float64 for
    float64 weights, over at most RANK + 2 terms, and DoRA divides by a norm.
    """
    terms = 16 * 2.0 ** -(53 if dtype == "F64" else 24)
    lost = total = worst = 0.0
    is_rounding = True
    for name, change in truth.items():
        error = np.abs(found[name] - change.value)
        last = spacing(change.value, dtype)
        lost += float(np.sum(error**2))
        total += float(np.sum(change.value**2))
        worst = max(worst, float(np.max(error / last)))
        is_rounding &= bool(np.all(error <= 0.5 * last + terms * change.size))
    return Error(np.sqrt(lost / total), worst, is_rounding)


def delta_error(found: Mapping[str, Array], truth: Mapping[str, Array], dtype: str) -> Error:
    """Compare deltas whose factors were rounded to ``dtype``.

    Elements of a product may cancel, so that their units are those of the largest element.
    """
    lost = total = worst = 0.0
    assert found.keys() == truth.keys()
    for name, value in truth.items():
        error = np.abs(found[name].reshape(value.shape) - value)
        last = spacing(np.max(np.abs(value)), dtype)
        lost += float(np.sum(error**2))
        total += float(np.sum(value**2))
        worst = max(worst, float(np.max(error) / last))
    relative = np.sqrt(lost / total)
    return Error(relative, worst, relative <= unit(dtype))


def number_error(found: Any, truth: Any) -> Error:
    """Compare numbers that a report prints; all are computed in float64."""
    one, other = np.ravel(np.asarray(found, float)), np.ravel(np.asarray(truth, float))
    assert one.shape == other.shape
    error = np.abs(one - other)
    relative = float(np.max(error / np.maximum(np.abs(other), 1.0)))
    return Error(relative, float(np.max(error / spacing(other, "F64"))), relative <= ALGEBRA)


def plain_names(deltas: Mapping[str, Array]) -> dict[str, Array]:
    """Name modules alike in every scheme: flat, without prefixes."""
    if len(deltas) == 1:
        return {"the only one": next(iter(deltas.values()))}
    return {name.replace(".", "_").removeprefix("lora_"): value for name, value in deltas.items()}


def best(delta: Array, rank: int) -> Array:
    """Return the best approximation of a rank."""
    left, values, right = np.linalg.svd(delta, full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank]


# merge


def merge(folder: Path, variant: str, base: str, factors: str, output: str | None = None) -> Error:
    made = sample(variant, factors, base)
    options = {"dtype": OPTION[output]} if output else {}
    out = folder / "out"
    loratool.merge(made.write_base(folder), [made.write(folder)], out, **options)
    tensors = load_file(out / "model.safetensors")
    found = {name: exact(tensors[name]) for name in made.merged}
    return merge_error(found, made.merged, output or base)


def merge_two(folder: Path, dtype: str) -> Error:
    first, second = (sample("lora", dtype, seed=seed) for seed in ("one", "two"))
    paths = [first.write(folder, "one"), second.write(folder, "two")]
    loratool.merge(first.write_base(folder), paths, folder / "out", weights=[0.7, -1.3])
    tensors = load_file(folder / "out" / "model.safetensors")
    truth = {}
    for name, weight in first.base.items():
        stored, module = exact(weight), name.removesuffix(".weight")
        value = stored + 0.7 * first.deltas[module] - 1.3 * second.deltas[module]
        size = 0.7 * first.merged[name].size + 1.3 * second.merged[name].size
        truth[name] = Change(value, size)
    return merge_error({name: exact(tensors[name]) for name in truth}, truth, dtype)


def merge_part_of_dora(folder: Path, dtype: str) -> Error:
    made = sample("dora", dtype)
    loratool.merge(made.write_base(folder), [made.write(folder)], folder / "out", weights=[0.25])
    tensors = load_file(folder / "out" / "model.safetensors")
    truth = {}
    for name, change in made.merged.items():
        stored = exact(made.base[name])
        truth[name] = Change(stored + 0.25 * (change.value - stored), np.abs(stored) + change.size)
    return merge_error({name: exact(tensors[name]) for name in truth}, truth, dtype)


# convert


def convert(
    folder: Path, variant: str, dtype: str, to: str, output: str | None = None, **options: Any
) -> Error:
    made = sample(variant, dtype)
    out = folder / ("out" if to in ("peft", "mlx") else "out.safetensors")
    if output is not None:
        options["dtype"] = OPTION[output]
    if made.base:
        options["base"] = made.write_base(folder)
    loratool.convert(made.write(folder), to, out, **options)
    truth = made.deltas
    if "rank" in options:
        truth = {name: best(delta, options["rank"]) for name, delta in dense(made).items()}
    return delta_error(plain_names(deltas_of(out)), plain_names(truth), output or dtype)


def dense(made: Any) -> dict[str, Array]:
    """Return ``W' - W`` as a matrix, from whatever the sample knows."""
    if made.deltas:
        return dict(made.deltas)
    return {
        name.removesuffix(".weight"): (change.value - exact(made.base[name])).reshape(
            len(change.value), -1
        )
        for name, change in made.merged.items()
    }


# compose, truncate, rescale


def compose(folder: Path, variant: str, dtype: str, rank: int | None = None) -> Error:
    pair = [sample(variant, dtype, seed=seed) for seed in ("one", "two")]
    paths = [made.write(folder, name) for made, name in zip(pair, ("a", "b"), strict=True)]
    loratool.compose(paths, folder / "out", weights=[0.7, -1.3], rank=rank)
    truth = {
        module: 0.7 * delta - 1.3 * pair[1].deltas[module]
        for module, delta in pair[0].deltas.items()
    }
    if rank is not None:
        truth = {module: best(delta, rank) for module, delta in truth.items()}
    return delta_error(deltas_of(folder / "out"), truth, dtype)


def combine(folder: Path, method: str, dtype: str) -> Error:
    pair = [sample("lora", dtype, seed=seed) for seed in ("one", "two")]
    paths = [made.write(folder, name) for made, name in zip(pair, ("a", "b"), strict=True)]
    options = {} if method == "peft-linear" else {"density": 0.6}
    loratool.compose(paths, folder / "out", weights=[0.7, 1.3], method=method, **options)
    truth = {}
    for module in SHAPES:
        deltas = [made.deltas[module] for made in pair]
        if method == "peft-linear":
            truth[module] = _factor_by_factor(pair, module)
        elif method == "ties":
            truth[module] = _core_ties(deltas, (0.7, 1.3), 0.6)
        else:
            truth[module] = _knots(deltas, (0.7, 1.3), 0.6)
    return delta_error(deltas_of(folder / "out"), truth, dtype)


def _factor_by_factor(pair: list[Any], module: str) -> Array:
    up: Any = 0
    down: Any = 0
    for made, weight in zip(pair, (0.7, 1.3), strict=True):
        root = np.sqrt(weight * 7 / RANK)
        up = up + root * exact(made.tensors[f"base_model.model.{module}.lora_B.weight"])
        down = down + root * exact(made.tensors[f"base_model.model.{module}.lora_A.weight"])
    return up @ down


def _ties(parts: list[Array], weights: tuple[float, ...], density: float) -> Array:
    """Trim each part, elect signs by the plain sum, average the weighted parts that agree."""
    kept = []
    for part in parts:
        count = max(1, int(density * part.size))
        least = np.sort(np.abs(part), axis=None)[-count]
        kept.append(np.where(np.abs(part) >= least, part, 0.0))
    elected = np.where(sum(kept) >= 0, 1.0, -1.0)
    agree = [np.sign(part) == elected for part in kept]
    total = sum(w * part * mask for w, part, mask in zip(weights, kept, agree, strict=True))
    return total / np.maximum(sum(mask.astype(int) for mask in agree), 1)


def _core_ties(deltas: list[Array], weights: tuple[float, ...], density: float) -> Array:
    left = np.linalg.svd(np.concatenate(deltas, axis=1), full_matrices=False)[0][:, : 2 * RANK]
    right = np.linalg.svd(np.concatenate(deltas, axis=0), full_matrices=False)[2][: 2 * RANK]
    cores = [left.T @ delta @ right.T for delta in deltas]
    return left @ _ties(cores, weights, density) @ right


def _knots(deltas: list[Array], weights: tuple[float, ...], density: float) -> Array:
    left, values, right = np.linalg.svd(np.concatenate(deltas, axis=1), full_matrices=False)
    rank = int(np.sum(values > 1e-10 * values[0]))
    parts = np.split(right[:rank], len(deltas), axis=1)
    return (left[:, :rank] * values[:rank]) @ _ties(parts, weights, density)


def truncate(folder: Path, variant: str, dtype: str, **rule: Any) -> Error:
    made = sample(variant, dtype)
    loratool.truncate(made.write(folder), folder / "out", **rule)
    truth = {}
    for module, delta in made.deltas.items():
        values = np.linalg.svd(delta, compute_uv=False)
        rank = rule.get("rank")
        if rank is None:
            tail = np.sqrt(np.cumsum(values[::-1] ** 2)[::-1])
            rank = int(np.sum(tail > rule["max_error"] * tail[0]))
        truth[module] = best(delta, rank)
    return delta_error(deltas_of(folder / "out"), truth, dtype)


def rescale(folder: Path, dtype: str, to: str = "peft", **options: Any) -> Error:
    made = sample("lora", dtype)
    path, out = made.write(folder), folder / "out"
    if to != "peft":
        loratool.convert(path, to, folder / "first.safetensors", alpha=None)
        path, out = folder / "first.safetensors", folder / "out.safetensors"
    loratool.rescale(path, out, **options)
    times = options.get("scale", 1.0)
    truth = {}
    source = deltas_of(path)
    for module, delta in source.items():
        limit = options.get("max_norm", np.inf) / np.linalg.norm(delta)
        truth[module] = times * min(1.0, limit) * delta
    return delta_error(deltas_of(out), truth, dtype)


# extract, compare, inspect


def extract(folder: Path, variant: str, dtype: str, **options: Any) -> Error:
    made = sample(variant, dtype)
    tuned, truth = dict(made.base), {}
    for name, change in made.merged.items():
        kind = made.base[name].dtype
        tuned[name] = _stored(change.value, kind)
        difference = (exact(tuned[name]) - exact(made.base[name])).reshape(len(change.value), -1)
        module = name.removesuffix(".weight")
        truth[module] = best(difference.T if variant == "embedding" else difference, RANK)
    base = made.write_base(folder)
    loratool.extract(
        base, write_model(folder / "tuned", tuned), folder / "out", rank=RANK, **options
    )
    return delta_error(deltas_of(folder / "out"), truth, dtype)


def _stored(values: Array, kind: Any) -> Any:
    import torch

    return torch.from_numpy(values.copy()).to(kind)


def compare(folder: Path, dtype: str) -> Error:
    pair = [sample("lora", dtype, seed=seed) for seed in ("one", "two")]
    paths = [made.write(folder, name) for made, name in zip(pair, ("a", "b"), strict=True)]
    document = loratool.compare(paths).as_json()
    found, truth = [], []
    sums = np.zeros((2, 2))
    for item in document["modules"]:
        one, other = (made.deltas[item["module"]] for made in pair)
        norms = [np.linalg.norm(one), np.linalg.norm(other)]
        product = float(np.sum(one * other))
        sums += [[norms[0] ** 2, product], [product, norms[1] ** 2]]
        found += [item["cosine"], item["relative_distance"], *item["norms"]]
        truth += [product / norms[0] / norms[1], np.linalg.norm(one - other) / norms[0], *norms]
        found.append(item["subspace_similarity"])
        truth.append(_overlap(one, other))
    cosine = sums[0, 1] / np.sqrt(sums[0, 0] * sums[1, 1])
    distance = np.sqrt((sums[0, 0] + sums[1, 1] - 2 * sums[0, 1]) / sums[0, 0])
    found += [document["cosine"], document["relative_distance"]]
    return number_error(found, [*truth, cosine, distance])


def _overlap(one: Array, other: Array) -> float:
    sides = []
    for first, second in ((one, other), (one.T, other.T)):
        bases = [np.linalg.svd(side)[0][:, :RANK] for side in (first, second)]
        sides.append(float(np.sum((bases[0].T @ bases[1]) ** 2)) / RANK)
    return sum(sides) / 2


def spectrum(folder: Path, variant: str, dtype: str) -> Error:
    made = sample(variant, dtype)
    document = loratool.inspect(made.write(folder), spectrum=True).as_json()
    found, truth = [], []
    for item in document["modules"]:
        values = np.linalg.svd(made.deltas[item["module"]], compute_uv=False)[:RANK]
        found += [*item["singular_values"], item["frobenius_norm"], item["spectral_norm"]]
        truth += [*values, np.linalg.norm(values), values[0]]
    return number_error(found, truth)


# All of them


def cases() -> Iterator[tuple[str, Callable[[Path], Error]]]:
    """Yield every case by name."""
    for dtype in FLOATS:
        for variant in MERGEABLE:
            yield (
                f"merge/{dtype}/{variant}",
                partial(merge, variant=variant, base=dtype, factors=dtype),
            )
        yield f"merge/{dtype}/two adapters", partial(merge_two, dtype=dtype)
        yield f"merge/{dtype}/a quarter of dora", partial(merge_part_of_dora, dtype=dtype)
        for to in ("peft", "kohya", "module-path", "mlx", "transposed", "loralib"):
            yield (
                f"convert/{dtype}/lora to {to}",
                partial(convert, variant="lora", dtype=dtype, to=to),
            )
        for to in ("peft", "diffusers", "comfy", "module-path"):
            yield (
                f"convert/{dtype}/kohya to {to}",
                partial(convert, variant="kohya", dtype=dtype, to=to),
            )
        for variant in ("rslora", "patterns", "adalora", "conv", "embedding"):
            yield (
                f"convert/{dtype}/{variant} to module-path",
                partial(convert, variant=variant, dtype=dtype, to="module-path"),
            )
        for variant in EXACT:
            yield (
                f"convert/{dtype}/{variant} written out",
                partial(convert, variant=variant, dtype=dtype, to="peft", to_lora=True),
            )
        for variant in (*NEAREST, "dora"):
            yield (
                f"convert/{dtype}/nearest of {variant}",
                partial(convert, variant=variant, dtype=dtype, to="peft", to_lora=True, rank=6),
            )
        for variant in ("lora", "rslora", "patterns", "adalora", "conv", "conv1d", "embedding"):
            yield f"compose/{dtype}/{variant}", partial(compose, variant=variant, dtype=dtype)
            yield (
                f"truncate/{dtype}/{variant}",
                partial(truncate, variant=variant, dtype=dtype, rank=2),
            )
            yield f"inspect/{dtype}/{variant}", partial(spectrum, variant=variant, dtype=dtype)
        yield (
            f"compose/{dtype}/lora of rank 3",
            partial(compose, variant="lora", dtype=dtype, rank=3),
        )
        for method in ("ties", "knots", "peft-linear"):
            yield f"compose/{dtype}/{method}", partial(combine, method=method, dtype=dtype)
        yield (
            f"truncate/{dtype}/lora within 0.4",
            partial(truncate, variant="lora", dtype=dtype, max_error=0.4),
        )
        yield f"rescale/{dtype}/alpha", partial(rescale, dtype=dtype, scale=0.3)
        yield f"rescale/{dtype}/B", partial(rescale, dtype=dtype, to="module-path", scale=0.3)
        yield f"rescale/{dtype}/fold", partial(rescale, dtype=dtype, fold=True)
        yield f"rescale/{dtype}/rslora", partial(rescale, dtype=dtype, to_rslora=True)
        yield f"rescale/{dtype}/norm", partial(rescale, dtype=dtype, max_norm=20.0)
        for variant in ("lora", "conv"):
            yield f"extract/{dtype}/{variant}", partial(extract, variant=variant, dtype=dtype)
        yield (
            f"extract/{dtype}/lora, exact",
            partial(extract, variant="lora", dtype=dtype, method="exact"),
        )
        yield (
            f"extract/{dtype}/embedding",
            partial(extract, variant="embedding", dtype=dtype, embeddings=True),
        )
        yield f"compare/{dtype}", partial(compare, dtype=dtype)
    for base, factors in (("BF16", "F32"), ("F16", "F32"), ("F32", "BF16"), ("F64", "F32")):
        for variant in ("lora", "dora", "embedding", "experts", "pissa"):
            yield (
                f"merge/{base} and {factors}/{variant}",
                partial(merge, variant=variant, base=base, factors=factors),
            )
    for base, output in (("F32", "BF16"), ("F32", "F16"), ("BF16", "F32"), ("F64", "F32")):
        yield (
            f"merge/{base} to {output}/lora",
            partial(merge, variant="lora", base=base, factors=base, output=output),
        )
        yield (
            f"convert/{base} to {output}/lora to peft",
            partial(convert, variant="lora", dtype=base, to="peft", output=output),
        )
    for factors in ("F8_E4M3", "F8_E5M2"):
        for output in OPTION:
            for to in ("peft", "module-path"):
                yield (
                    f"convert/{factors} to {output}/kohya to {to}",
                    partial(convert, variant="kohya", dtype=factors, to=to, output=output),
                )


CASES: Final = dict(cases())


@pytest.fixture(scope="module")
def figures() -> dict[str, list[float]]:
    return json.loads(FIGURES.read_text()) if FIGURES.exists() else {}


@pytest.mark.parametrize("name", CASES)
def test_no_error_grows(name: str, figures: dict[str, list[float]], tmp_path: Path) -> None:
    error = CASES[name](tmp_path)
    if os.environ.get("LORATOOL_UPDATE") and name not in figures:
        figures[name] = error.figures
        lines = (f"{json.dumps(key)}: {json.dumps(figures[key])}" for key in sorted(figures))
        FIGURES.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    relative, ulps = figures[name]
    # Where nothing was rounded, nothing may be rounded now.
    is_fine = error.is_exact if relative <= ALGEBRA else error.is_rounding
    assert error.relative <= SLACK * relative or is_fine, (name, error)
    assert error.ulps <= SLACK * ulps or is_fine, (name, error)


def test_every_figure_has_its_case(figures: dict[str, list[float]]) -> None:
    assert figures.keys() == CASES.keys()


def test_an_error_of_one_unit_is_found() -> None:
    truth = Draw("some", "F64")(8, 8)
    values = exact(truth)
    change = {"w": Change(values, np.abs(values))}
    for dtype in FLOATS:
        rounded = exact(_stored(values, truth.dtype)) + spacing(values, dtype)
        error = merge_error({"w": rounded}, change, dtype)
        assert not error.is_rounding or dtype in ("F32", "F64")
        assert error.ulps == pytest.approx(1.0, rel=1e-2)
