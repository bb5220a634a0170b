"""torch's zip archives, written without torch: the bytes that ``torch.save`` would write."""

from __future__ import annotations

import math
import mmap
import os
import struct
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.serialization import config

from loratool.errors import FileFormatError, UnsupportedError
from loratool.files.container import read_bytes
from loratool.files.dtypes import DTYPES
from loratool.files.pickles import read_pickle
from loratool.files.spec import TensorSpec
from loratool.files.torch_zip import TorchLayout, archive_stem, lay_out, seal

TORCH = {
    dtype.name: getattr(torch, dtype.torch_name) for dtype in DTYPES.values() if dtype.torch_name
}
NAMES = {dtype: name for name, dtype in TORCH.items()}
SHAPES = [(), (1,), (3,), (2, 5), (0,), (4, 0, 3), (2, 3, 4, 5), (1, 2, 1, 2, 1), (300,), (70_001,)]

Tensors = Mapping[str, torch.Tensor]


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Any bits, and so infinities and NaNs as well."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    empty = torch.empty(shape, dtype=dtype)
    if not empty.numel():
        return empty
    data = torch.randint(0, 256, (empty.nbytes,), generator=generator, dtype=torch.uint8)
    return data.view(dtype).reshape(shape)


def bytes_of(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else b""


def specs_of(tensors: Tensors) -> list[TensorSpec]:
    return [
        TensorSpec(name, NAMES[tensor.dtype], tuple(tensor.shape))
        for name, tensor in tensors.items()
    ]


def write(tensors: Tensors, path: Path) -> TorchLayout:
    """As a runner does: the file at its full size, data from the last tensor on, the frame."""
    layout = lay_out(specs_of(tensors), archive_stem(path))
    with path.open("w+b") as file:
        descriptor = file.fileno()
        os.truncate(descriptor, layout.size)

        def put(names: list[str]) -> None:
            for name in names:
                os.pwrite(descriptor, bytes_of(tensors[name]), layout.offsets[name])

        names = list(reversed(tensors))
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(put, [names[start::3] for start in range(3)]))
        seal(descriptor, layout, path=path, threads=2)
    return layout


def assert_as_torch(tensors: Tensors, folder: Path, name: str = "pytorch_model.bin") -> Path:
    """Compare with ``torch.save``, byte for byte; return our file."""
    ours, theirs = folder / "ours" / name, folder / "theirs" / name
    ours.parent.mkdir(exist_ok=True)
    theirs.parent.mkdir(exist_ok=True)
    layout = write(tensors, ours)
    torch.save(dict(tensors), theirs)
    assert layout.size == theirs.stat().st_size
    assert ours.read_bytes() == theirs.read_bytes()
    return ours


def assert_reads_back(tensors: Tensors, path: Path) -> None:
    loaded = torch.load(path, weights_only=True)
    assert list(loaded) == list(tensors)
    described = read_pickle(path).tensors
    assert [stored.spec for stored in described.values()] == specs_of(tensors)
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        assert bytes_of(loaded[name]) == bytes_of(tensor)
        assert described[name].strides is None
        assert described[name].alias_of is None
        assert read_bytes(described[name]) == bytes_of(tensor)


@pytest.mark.parametrize("dtype", TORCH)
def test_every_dtype_is_written_as_torch_writes_it(dtype: str, tmp_path: Path) -> None:
    tensors = {
        f"layers.{seed}.weight": random_tensor(TORCH[dtype], shape, seed)
        for seed, shape in enumerate(SHAPES)
    }
    assert_reads_back(tensors, assert_as_torch(tensors, tmp_path))


def test_dtypes_stand_together(tmp_path: Path) -> None:
    tensors = {
        f"{dtype}.{turn}": random_tensor(kind, (turn, 7))
        for turn in range(3)
        for dtype, kind in TORCH.items()
    }
    assert_reads_back(tensors, assert_as_torch(tensors, tmp_path))


names = st.text(st.characters(exclude_categories=["Cs"]), max_size=40) | st.text(
    "abcxyz.0123456789_", min_size=1, max_size=300
)
shapes = st.lists(st.integers(0, 5), max_size=6).map(tuple)


@settings(max_examples=60, deadline=None)
@given(
    described=st.dictionaries(
        names, st.tuples(st.sampled_from(sorted(TORCH)), shapes), max_size=20
    ),
    stem=st.text("ab.-_ ()", min_size=1, max_size=30),
)
def test_any_names_and_shapes(
    described: dict[str, tuple[str, tuple[int, ...]]],
    stem: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    tensors = {
        # A name that is a word of a program is one object with torch's; names in files are not.
        name.encode().decode(): random_tensor(TORCH[dtype], shape, seed)
        for seed, (name, (dtype, shape)) in enumerate(described.items())
    }
    folder = tmp_path_factory.mktemp("any")
    assert_reads_back(tensors, assert_as_torch(tensors, folder, f"{stem}.bin"))


@pytest.mark.parametrize("name", ["storage", "cpu", "0", "10", "data.pkl", "", "a/b", "a\0b"])
def test_names_that_mean_something_to_the_format(name: str, tmp_path: Path) -> None:
    tensors = {
        word.encode().decode(): torch.full((2,), float(number))
        for number, word in enumerate([name, *map("x{}".format, range(11))])
    }
    assert_reads_back(tensors, assert_as_torch(tensors, tmp_path))


@pytest.mark.parametrize("count", [0, 1, 2, 8, 9, 24, 25, 254, 255, 999, 1000, 1001, 2000, 5081])
@pytest.mark.slow
def test_any_number_of_tensors(count: int, tmp_path: Path) -> None:
    """Batches of a thousand, longer indices, and each size of the set that torch hashes."""
    tensors = {f"t{number}": torch.tensor(number) for number in range(count)}
    assert_reads_back(tensors, assert_as_torch(tensors, tmp_path))


@pytest.mark.slow
def test_more_records_than_the_first_zip_could_count(tmp_path: Path) -> None:
    tensors = {f"t{number}": torch.tensor(number % 100) for number in range(65_535)}
    path = assert_as_torch(tensors, tmp_path)
    assert len(read_pickle(path).tensors) == len(tensors)
    with zipfile.ZipFile(path) as archive:
        assert len(archive.infolist()) == len(tensors) + 6


def huge(hole: Path) -> dict[str, torch.Tensor]:
    """Sizes and offsets on both sides of what 32 bits hold, over the pages of an empty file."""
    most = (1 << 32) - 1
    hole.touch()
    os.truncate(hole, 2 * most)

    def mapped(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        size = math.prod(shape) * dtype.itemsize
        data = torch.from_file(str(hole), shared=True, size=size, dtype=torch.uint8)
        return data.view(dtype).reshape(shape)

    return {
        "first": mapped(torch.float32, 10),
        "just.below": mapped(torch.int8, most - 1),
        "behind": mapped(torch.bfloat16, 3),
        "empty": torch.empty(0, 2),
        "just.at": mapped(torch.uint8, most),
        "square": mapped(torch.float8_e4m3fn, 1 << 16, 1 << 16),
        "long": mapped(torch.int8, (1 << 31) + 1, 1, 2),
    }


def test_the_frame_of_a_file_beyond_4_gb(tmp_path: Path) -> None:
    """torch leaves holes where data belong, and 0 for their CRC-32s; we fill in the same."""
    tensors = huge(tmp_path / "hole")
    path = tmp_path / "huge.bin"
    with torch.serialization.skip_data():
        torch.save(tensors, path)
    layout = lay_out(specs_of(tensors), "huge")
    assert layout.size == path.stat().st_size > 1 << 34
    with path.open("rb") as file:
        for offset, data in layout.frame([0] * len(tensors)):
            assert os.pread(file.fileno(), len(data), offset) == data


def test_a_file_beyond_4_gb_is_read(tmp_path: Path) -> None:
    tensors = huge(tmp_path / "hole")
    path = tmp_path / "huge.bin"
    layout = lay_out(specs_of(tensors), "huge")
    with path.open("w+b") as file:
        os.truncate(file.fileno(), layout.size)
        for offset, data in layout.frame([0] * len(tensors)):
            os.pwrite(file.fileno(), data, offset)
        os.pwrite(file.fileno(), b"\x2a", layout.offsets["long"] + 3)
    described = read_pickle(path).tensors
    assert {name: stored.offset for name, stored in described.items()} == layout.offsets
    with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
        loaded = torch.load(path, weights_only=True, mmap=True)
    assert [loaded[name].shape for name in tensors] == [t.shape for t in tensors.values()]
    assert loaded["long"][:3, 0].tolist() == [[0, 0], [0, 42], [0, 0]]
    with zipfile.ZipFile(path) as archive:
        assert archive.getinfo("huge/data/6").file_size == tensors["long"].nbytes


def test_layout_is_aligned_and_in_order() -> None:
    specs = [TensorSpec(f"t{size}", "U8", (size,)) for size in range(130)]
    layout = lay_out(specs, "model")
    assert list(layout.offsets) == [spec.name for spec in specs]
    places = list(layout.offsets.values())
    assert all(place % 64 == 0 for place in places)
    for spec, place, following in zip(specs, places, places[1:], strict=False):
        assert place + spec.nbytes < following


def test_the_frame_leaves_out_the_data_and_nothing_else() -> None:
    specs = [
        TensorSpec(f"t{number}", "U8", (size,))
        for number, size in enumerate((3, 0, 100, 1 << 33, 0, 64))
    ]
    layout = lay_out(specs, "model")
    pieces = [(offset, len(data)) for offset, data in layout.frame([0] * len(specs))]
    pieces += [(layout.offsets[spec.name], spec.nbytes) for spec in specs if spec.nbytes]
    position = 0
    for offset, length in sorted(pieces):
        assert offset == position
        position += length
    assert position == layout.size


def test_checksums_hold_across_blocks(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    long = random_tensor(torch.uint8, ((3 << 20) + 1,))
    write({f"long.{turn}": long + turn for turn in range(7)} | {"short": torch.ones(3)}, path)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    content = bytearray(path.read_bytes())
    content[2 << 20] ^= 1
    path.write_bytes(content)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() == "x/data/0"


def test_torch_finds_storages_without_reading_headers(tmp_path: Path) -> None:
    tensors = {f"t{number}": random_tensor(torch.int16, (number, 9)) for number in range(40)}
    write(tensors, tmp_path / "x.bin")
    with config.patch("load.calculate_storage_offsets", True):
        loaded = torch.load(tmp_path / "x.bin", weights_only=True, mmap=True)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_torch_trains_on_what_it_loads(tmp_path: Path) -> None:
    layer = torch.nn.Linear(4, 3)
    with torch.no_grad():
        write({name: value.detach() for name, value in layer.state_dict().items()}, tmp_path / "l")
    other = torch.nn.Linear(4, 3)
    other.load_state_dict(torch.load(tmp_path / "l", weights_only=True))
    assert torch.equal(other.weight, layer.weight)
    other(torch.ones(2, 4)).sum().backward()


@pytest.mark.parametrize(
    "name", ["model.bin", "model", "model.tar.pt", "a.", "a\\b.bin", "..bin", "modèle.bin", "a b"]
)
def test_archives_are_called_as_torch_calls_them(name: str, tmp_path: Path) -> None:
    torch.save({}, tmp_path / name)
    with zipfile.ZipFile(tmp_path / name) as archive:
        stem = archive.namelist()[0].removesuffix("/data.pkl")
    assert archive_stem(tmp_path / name) == stem


def test_a_file_that_is_only_a_suffix() -> None:
    assert archive_stem(Path(".bin")) == "archive"


@pytest.mark.parametrize("dtype", sorted(DTYPES.keys() - TORCH.keys()))
def test_dtypes_that_torch_lacks_are_refused(dtype: str) -> None:
    with pytest.raises(UnsupportedError, match=f"no dtype like {dtype}"):
        lay_out([TensorSpec("packed", dtype, (2, 8))], "x")


def test_names_must_differ() -> None:
    with pytest.raises(ValueError, match="same name"):
        lay_out([TensorSpec("a", "F32", (1,))] * 2, "x")


@pytest.mark.parametrize("stem", ["", "a/b"])
def test_archives_must_have_a_name(stem: str) -> None:
    with pytest.raises(ValueError, match="cannot be called"):
        lay_out([], stem)


def test_a_file_that_is_too_short_is_not_sealed(tmp_path: Path) -> None:
    layout = lay_out([TensorSpec("a", "F32", (1 << 20,))], "x")
    with (tmp_path / "x.bin").open("w+b") as file:
        os.truncate(file.fileno(), layout.size // 2)
        with pytest.raises(FileFormatError, match="became shorter"):
            seal(file.fileno(), layout, path=tmp_path / "x.bin")


@pytest.mark.slow
def test_memory_does_not_grow_with_the_data(tmp_path: Path) -> None:
    """A quarter of a gigabyte of holes is sealed by a process that may hold 32 MB more."""
    program = f"""
import os, resource
from pathlib import Path
from loratool.files.spec import TensorSpec
from loratool.files.torch_zip import lay_out, seal
path = Path({str(tmp_path / "x.bin")!r})
layout = lay_out([TensorSpec("a", "F32", (1 << 26,)), TensorSpec("b", "F32", (9,))], "x")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with path.open("w+b") as file:
    os.truncate(file.fileno(), layout.size)
    seal(file.fileno(), layout, path=path)
assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 << 10
import sys
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)
    assert (tmp_path / "x.bin").stat().st_size > 1 << 28


def test_data_that_look_like_zip_do_no_harm(tmp_path: Path) -> None:
    """torch counts such data as a CRC-32 of its own in the fingerprint; we do not."""
    data = b"PK\7\x08" + struct.pack("<I", 7) + b"PK\3\4PK\1\2PK\5\6" + bytes(20)
    tensors = {"a": torch.frombuffer(bytearray(data), dtype=torch.uint8), "b": torch.ones(2)}
    write(tensors, tmp_path / "x.bin")
    assert_reads_back(tensors, tmp_path / "x.bin")
