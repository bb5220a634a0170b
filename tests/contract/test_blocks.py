"""Blocks of weights computed by numpy and by PyTorch: one suite for both, truth in float64."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from samples import lora

import loratool
from loratool.codecs import numbers
from loratool.files.dtypes import DTYPES
from loratool.files.inputs import InputFiles
from loratool.files.rows import RowBytes
from loratool.files.safetensors import read_header
from loratool.math.deltas import (
    Additive,
    Changed,
    Interpolated,
    Offset,
    Placed,
    Rows,
    WeightDecomposed,
)
from loratool.math.deltas import column_norms as norms_of_columns
from loratool.math.lowrank import LowRank
from loratool.plan.blas import single_threaded_blas
from loratool.plan.blocks import Arithmetic, Bench, arithmetic_on, bench_on
from loratool.plan.gpu import Arithmetic as TorchArithmetic
from loratool.plan.gpu import TorchBench
from loratool.plan.host import HostArithmetic, HostBench

Make = Callable[..., Path]
ROWS, COLUMNS = 23, 17
CPU = torch.device("cpu")
KINDS: dict[str, tuple[Callable[[bool], Arithmetic], Callable[[], Bench]]] = {
    "numpy": (lambda wide: HostArithmetic("float64" if wide else "float32"), HostBench),
    "torch": (
        lambda wide: TorchArithmetic(torch.float64 if wide else torch.float32, CPU),
        lambda: TorchBench(CPU),
    ),
}
both = pytest.mark.parametrize("library", KINDS)


def array(library: str, values: np.ndarray) -> Any:
    return values.copy() if library == "numpy" else torch.from_numpy(values.copy())


def host(values: Any) -> np.ndarray:
    return np.asarray(values)


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape)


@both
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
def test_a_block_goes_in_and_comes_out_rounded_once(library: str, wide: bool, dtype: str) -> None:
    bench = KINDS[library][1]()
    codes = numbers.encode(random(ROWS, COLUMNS), dtype)
    view = bench.input(codes.nbytes)
    view[: codes.nbytes] = codes.tobytes()
    block = bench.load(view[: codes.nbytes], dtype, (ROWS, COLUMNS), is_double=wide)
    kind = np.float64 if wide else np.float32
    truth = numbers.decode(codes, dtype, codes.shape, kind)
    assert host(block).dtype == kind
    assert np.array_equal(host(block), truth)
    original = bench.kept(block)
    block *= 3
    for output in ("F16", "BF16", "F32", "F64"):
        data, is_finite = bench.store(block, output)
        assert is_finite
        expected = numbers.encode(truth * kind(3), output)
        assert bytes(data) == expected.tobytes()
    data, _ = bench.store(block, "BF16")
    stored = numbers.decode(data, "BF16", codes.shape)
    kept, total = bench.surviving(block, original, "BF16")
    assert kept == pytest.approx(((stored - truth) * 2.0 * truth).sum(), rel=1e-5)
    assert total == pytest.approx((4.0 * truth.astype(np.float64) ** 2).sum(), rel=1e-5)


@both
def test_what_is_not_finite_is_told(library: str) -> None:
    bench = KINDS[library][1]()
    for value, dtype in ((np.nan, "F32"), (np.inf, "BF16"), (7e4, "F16"), (3.4e38, "BF16")):
        block = array(library, np.full((2, 3), value, dtype=np.float32))
        with np.errstate(all="ignore"):
            assert not bench.store(block, dtype)[1], value


@both
@pytest.mark.parametrize("scale", [1.0, 1.7, 2.0, -0.5, 0.0])
@pytest.mark.parametrize("wide", [False, True])
def test_products_and_norms(library: str, scale: float, wide: bool) -> None:
    products = KINDS[library][1]().products
    kind = np.float64 if wide else np.float32
    weight, up, down = (random(*shape).astype(kind) for shape in ((300, 513), (300, 3), (3, 513)))
    block = array(library, weight)
    products.add_product(block, array(library, up), array(library, down), scale)
    truth = weight.astype(np.float64) + scale * (up.astype(np.float64) @ down.astype(np.float64))
    tolerance = 1e-13 if wide else 4e-6
    assert np.abs(host(block) - truth).max() < tolerance
    wide_block = host(block).astype(np.float64)
    np.testing.assert_allclose(
        host(products.row_norms(block)), np.sqrt((wide_block**2).sum(axis=1)), rtol=1e-13
    )
    np.testing.assert_allclose(
        host(products.column_squares(block)), (wide_block**2).sum(axis=0), rtol=1e-13
    )


def by_blocks(delta: Any, library: str, weight: np.ndarray, rows: int) -> np.ndarray:
    products = KINDS[library][1]().products
    parts = []
    for start in range(0, weight.shape[0], rows):
        original = array(library, weight[start : start + rows])
        block = array(library, weight[start : start + rows])
        delta.apply(block, original, start, products)
        parts.append(host(block))
    return np.concatenate(parts)


@both
@pytest.mark.parametrize("rows", [1, 4, 7, ROWS])
def test_every_delta_is_its_formula(library: str, rows: int) -> None:
    def made(*shape: int) -> Any:
        return array(library, random(*shape))

    weight, saved = random(ROWS, COLUMNS), random(ROWS, COLUMNS + 1)[:, :COLUMNS].copy()
    delta = LowRank(made(ROWS, 3), made(3, COLUMNS), 1.7)
    dense = 1.7 * host(delta.up) @ host(delta.down)
    moved = weight + dense
    row_factors = np.abs(random(ROWS)) / np.linalg.norm(moved, axis=1)
    column_factors = np.abs(random(COLUMNS)) / np.linalg.norm(moved, axis=0)
    blocks = ((i, array(library, weight[i : i + 5])) for i in range(0, ROWS, 5))
    norms = norms_of_columns(blocks, Additive(delta), COLUMNS)
    region = Placed(LowRank(made(9, 2), made(2, 5), 2.0), 4, 2)
    inside = weight[4:13, 2:7] + region.delta.scale * host(region.delta.up) @ host(
        region.delta.down
    )
    blocks = ((i, array(library, weight[i : i + 5])) for i in range(0, ROWS, 5))
    inner_norms = norms_of_columns(blocks, region, 5, None, (4, 9, 2))
    by_rows, by_columns = weight.copy(), weight.copy()
    by_rows[4:13, 2:7] = inside * (np.abs(saved[:9, :1]) / np.linalg.norm(inside, axis=1)[:, None])
    by_columns[4:13, 2:7] = inside * (np.abs(saved[0, :5]) / np.linalg.norm(inside, axis=0))
    part = {"rows": 9, "columns": 5, "first_row": 4, "first_column": 2}
    placed = weight.copy()
    placed[4 : 4 + 9, 2 : 2 + 5] += 2 * host(made(9, 2)) @ host(made(2, 5))
    saved_rows = weight.copy()
    saved_rows[[7, 2]] += 0.5 * (saved[:2] - weight[[7, 2]])
    replaced = weight.copy()
    replaced[[7, 2]] = saved[:2]
    cases = [
        (Additive(delta), moved),
        (Placed(LowRank(made(9, 2), made(2, 5), 2.0), 4, 2), placed),
        (WeightDecomposed(Additive(delta), abs(made(ROWS))), moved * row_factors[:, None]),
        (WeightDecomposed(region, array(library, np.abs(saved[:9, 0])), **part), by_rows),
        (
            WeightDecomposed(region, array(library, np.abs(saved[0, :5])), inner_norms, **part),
            by_columns,
        ),
        (
            WeightDecomposed(Additive(delta), abs(made(COLUMNS)), norms, 0.25),
            weight + 0.25 * (moved * column_factors - weight),
        ),
        (
            Offset(lambda i, n: array(library, saved[i : i + n]), -2.5, ROWS, COLUMNS),
            weight - 2.5 * saved,
        ),
        (
            Offset(lambda i, n: array(library, saved[i : i + n, :5]), 3.0, 9, 5, 4, 2),
            np.pad(3.0 * saved[:9, :5], ((4, ROWS - 13), (2, COLUMNS - 7))) + weight,
        ),
        (Interpolated(lambda i, n: array(library, saved[i : i + n]), 1.0), saved),
        (
            Interpolated(lambda i, n: array(library, saved[i : i + n]), 0.3),
            weight + 0.3 * (saved - weight),
        ),
        (Rows((7, 2), array(library, saved[:2])), replaced),
        (Rows((7, 2), array(library, saved[:2]), 0.5), saved_rows),
    ]
    for change, truth in cases:
        found = by_blocks(change, library, weight, rows)
        np.testing.assert_allclose(found, truth, rtol=1e-12, atol=1e-13, err_msg=repr(change))


@both
def test_a_copy_in_a_narrower_dtype_does_not_cost_precision(library: str) -> None:
    kind = KINDS[library][0](False)
    weight = random(ROWS, COLUMNS).astype(np.float32)
    copy = numbers.decode(numbers.encode(weight, "BF16"), "BF16", weight.shape, np.float32)
    copy[3, 4] = 9.0
    change = Interpolated(
        lambda i, n: array(library, copy[i : i + n]),
        1.0,
        rounded=lambda values: kind.rounded(values, "BF16"),
    )
    expected = weight.copy()
    expected[3, 4] = 9.0
    assert np.array_equal(by_blocks(change, library, weight, 5), expected)


@both
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "F8_E4M3", "I64"])
def test_stored_tensors_are_read_whole_and_by_rows(
    library: str, dtype: str, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    values = torch.arange(24).reshape(6, 4).to(getattr(torch, DTYPES[dtype].torch_name or ""))
    save_file({"x": torch.ones(3), "m": values}, tmp_path / "a.safetensors")
    stored = read_header(tmp_path / "a.safetensors").tensors["m"]
    kind = KINDS[library][0](True)
    truth = values.double().numpy()
    assert np.array_equal(host(kind.read(stored)), truth)
    files = InputFiles({})
    rows = kind.rows(RowBytes(stored, 4, files), 2, 3)
    files.close()
    assert np.array_equal(host(rows), truth[2:5])
    assert host(kind.zeros(2, 3)).tolist() == [[0.0] * 3] * 2
    assert host(kind.converted(kind.double().read(stored))).dtype == np.float64


def test_the_processor_is_numpys() -> None:
    for device in ("auto", "cpu"):
        assert isinstance(bench_on(device), HostBench)
        assert isinstance(arithmetic_on(device, is_double=True), HostArithmetic)


@pytest.mark.parametrize("transposed", [False, True])
def test_bits_do_not_depend_on_threads(
    transposed: bool, make_base: Make, make_adapter: Make, tmp_path: Path
) -> None:
    """DoRA on a weight stored as (in, out) sums its columns over all blocks."""
    names = {"h.0.attn.c_attn": (700, 2100), "h.0.attn.c_proj": (700, 700), "h.0.x": (900, 800)}
    tensors, factors = {}, {}
    for module, (into, out) in names.items():
        is_flipped = transposed and module != "h.0.x"
        tensors[f"{module}.weight"] = torch.randn((into, out) if is_flipped else (out, into))
        factors |= lora(module, out, into, 5)
        factors[f"{module}.lora_magnitude_vector"] = torch.rand(out) + 0.5
    base = make_base(tensors, {"model_type": "gpt2"} if transposed else None)
    adapter = make_adapter(factors, use_dora=True, r=5)
    found = []
    for threads in (1, 2, 8):
        report = loratool.merge(base, [adapter], tmp_path / str(threads), threads=threads)
        written = (tmp_path / str(threads) / "model.safetensors").read_bytes()
        found.append((written, report.retention))
    assert found[0] == found[1] == found[2]


def test_blas_is_held_to_one_thread_while_anybody_needs_it() -> None:
    """Whoever comes first and goes last: limits belong to the thread that sets them."""
    import threadpoolctl

    def threads() -> set[int]:
        info = threadpoolctl.threadpool_info()
        return {item["num_threads"] for item in info if item["user_api"] == "blas"}

    def use(entered: threading.Event, leave: threading.Event) -> None:
        with single_threaded_blas():
            entered.set()
            leave.wait()

    before = threads()
    if before == {1}:
        pytest.skip("a machine with one processor")
    events = [(threading.Event(), threading.Event()) for _ in range(3)]
    users = [threading.Thread(target=use, args=pair) for pair in events]
    for user, (entered, _) in zip(users, events, strict=True):
        user.start()
        entered.wait()
        assert threads() == {1}
    for user, (_, leave) in zip(users, events, strict=True):
        assert threads() == {1}
        leave.set()
        user.join()
    assert threads() == before
    with single_threaded_blas():
        assert threads() == {1}
    assert threads() == before


@both
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("weight", [1.0, 0.3])
@pytest.mark.parametrize("height", [1, 5, ROWS])
def test_a_region_becomes_a_function_of_itself(
    library: str, turned: bool, weight: float, height: int
) -> None:
    """Here ``W ∘ l`` with an l for each place, so that no part can be taken for another."""
    rows, columns, first_row, first_column = 11, 9, 4, 6
    values = random(ROWS, COLUMNS).astype(np.float32)
    factors = array(library, random(*((columns, rows) if turned else (rows, columns))))

    def function(part: Any, row: int, column: int) -> Any:
        assert part.dtype == factors.dtype  # float64
        count, width = part.shape[:2]
        return part * factors[row : row + count, column : column + width]

    change = Changed(
        function, rows, columns, first_row, first_column, is_transposed=turned, weight=weight
    )
    found = []
    for start in range(0, ROWS, height):
        block = array(library, values[start : start + height])
        change.apply(block, block, start)
        found.append(host(block))
    wanted = values.astype(np.float64)
    region = wanted[first_row : first_row + rows, first_column : first_column + columns]
    moved = region * (host(factors).T if turned else host(factors))
    region += weight * (moved - region)
    assert np.abs(np.concatenate(found) - wanted).max() <= 2.0**-24 * np.abs(wanted).max()


@both
def test_a_kernel_is_no_column(library: str) -> None:
    values = random(ROWS, 5 * 6).astype(np.float32)
    factors = array(library, random(1, 5, 1, 1))
    block = array(library, values)
    Changed(lambda part, row, column: part * factors, ROWS, 30, kernel=(2, 3)).apply(
        block, block, 0
    )
    wanted = values.reshape(ROWS, 5, 2, 3) * host(factors)
    assert np.allclose(host(block), wanted.reshape(ROWS, 30), rtol=1e-6)
