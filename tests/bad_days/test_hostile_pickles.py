"""Pickles that were made to be read otherwise than torch reads them, or to cost time and memory."""

from __future__ import annotations

import collections
import random
import resource
import time
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import (
    dictionary,
    laughs,
    legacy,
    named,
    number,
    sequence,
    storage,
    tensor,
    text,
    zipped,
)
from samples import contents

from loratool.errors import FileFormatError
from loratool.files.container import read_bytes
from loratool.files.pickles import read_pickle

A = text("a")
KEYS = b"\x80\x02](" + text("0") + b"e."
DATA = bytes(range(64))
DOUBLE = named("torch", "DoubleStorage")
LONGS = named("torch", "LongStorage")
VIEW = sequence(text("v"), number(4), number(8))
PAIRS = b"](" + b"".join(number(n) + b"N\x86" for n in range(20_000)) + b"e\x85q\x08"
AGAIN = named("collections", "OrderedDict") + b"h\x08R"
IN_ITSELF = b"]q\x07(" + tensor(storage()) + b"h\x07e"
SCANNED = b"](" + b"N" * 200_000 + b"eq\x07"

REFUSED = {
    "a storage with a view": (storage(text("0"), 16, None, VIEW), "unknown type"),
    "a storage in two ways": (
        sequence(tensor(storage(text("0"), 8, DOUBLE), (8,), (1,)), tensor(storage())),
        "in two ways",
    ),
    "two sizes of one": (
        sequence(tensor(storage()), tensor(storage(text("0"), 8), (2,), (1,))),
        "in two ways",
    ),
    "an expanded tensor": (tensor(storage(), (4, 1 << 28), (0, 0)), "larger than its storage"),
    "an overlapping one": (tensor(storage(), (16, 16), (0, 1)), "larger than its storage"),
    "a tensor beyond its storage": (tensor(storage(), (4, 4), (4, 1), 1), "beyond its storage"),
    "a nested key": (tensor(storage(laughs())), "unknown type"),
    "a nested kind": (tensor(storage(text("0"), 16, laughs())), "unknown type"),
    "a kind of another module": (
        tensor(storage(text("0"), 16, named("os", "FloatStorage"))),
        "would call",
    ),
    "a tensor that is set anew": (
        tensor(storage()) + sequence(storage(), number(0)) + b"b",
        "where a PickledDict belongs",
    ),
    "a parameter that is none": (
        named("torch._utils", "_rebuild_parameter") + sequence(A, b"\x88", b"N") + b"R",
        "no tensor",
    ),
    "a gradient of integers": (
        named("torch._utils", "_rebuild_parameter")
        + sequence(tensor(storage(text("0"), 8, LONGS), (8,), (1,)), b"\x88", b"N")
        + b"R",
        "gradient of I64",
    ),
    "a parameter with a state": (
        named("torch._utils", "_rebuild_parameter_with_state")
        + sequence(tensor(storage()), b"\x88", b"N", b"}" + text("data") + b"Ns")
        + b"R",
        "state of its own",
    ),
    "a state of a plain dictionary": (b"}}b", "has none"),
    "a name that is not called": (named("os", "system"), "would call"),
    "a storage that is nowhere": (
        tensor(
            sequence(
                text("storage"),
                named("torch", "FloatStorage"),
                text("0"),
                text("meta"),
                number(16),
            )
            + b"Q"
        ),
        "unknown type",
    ),
    "copies of a tuple": (
        sequence(
            b"(" + b"".join(number(n) + b"N\x86" for n in range(5000)) + b"t\x85q\x08",
            AGAIN * 400,
        ),
        "over and over",
    ),
    "a tuple from below the mark": (b"(K\x01\x86" + b"t", "more than there is"),
    "opcodes of a later protocol": (b"\x8c\x01a", "uses the opcode"),
    "a name with an escape": (named("torch", "\\x46loatStorage") + b")R", "would call"),
    "a list in itself": (IN_ITSELF, "holds itself"),
    "copies of copies": (sequence(PAIRS, AGAIN * 400), "over and over"),
    "half a character": (b"}" + b"X\x03\x00\x00\x00\xed\xa0\x80" + b"Ns", "not text"),
}


@pytest.mark.parametrize(("value", "why"), REFUSED.values(), ids=REFUSED)
def test_what_torch_would_not_read_so_is_refused(value: bytes, why: str, tmp_path: Path) -> None:
    begin = time.perf_counter()
    with pytest.raises(FileFormatError, match=why) as caught:
        read_pickle(zipped(tmp_path / "x.bin", dictionary(A, value)))
    assert len(str(caught.value)) < 1000
    assert time.perf_counter() - begin < 20, "a hang, not a slow machine"


@pytest.mark.parametrize(
    ("value", "keys"),
    [
        (tensor(storage(text("0"), 16, None, VIEW)), KEYS),
        (tensor(storage(text("0"), 16, None, b"N")), b"\x80\x02](" + laughs() + b"e."),
        (tensor(storage(text("0"), 16, None, b"N")), b"\x80\x02](" + text("0") * 2 + b"e."),
        (tensor(storage(text("0"), 16, None, b"N")), b"\x80\x02]."),
        (tensor(storage(text("0"), 15, None, b"N"), (3, 4)), KEYS),
        (tensor(storage(text("0"), 16)), KEYS),
    ],
    ids=["view", "nested key", "listed twice", "not listed", "another size", "no view"],
)
def test_the_older_format_too(value: bytes, keys: bytes, tmp_path: Path) -> None:
    good = legacy(
        tmp_path / "good.bin", dictionary(A, tensor(storage(text("0"), 16, None, b"N"))), KEYS, DATA
    )
    assert read_bytes(read_pickle(good).tensors["a"]) == DATA
    with pytest.raises(FileFormatError):
        read_pickle(legacy(tmp_path / "x.bin", dictionary(A, value), keys, DATA))


def test_looking_into_one_list_for_many_keys(tmp_path: Path) -> None:
    items = b"".join(number(n) + b"h\x07" for n in range(20_000))
    path = zipped(tmp_path / "x.bin", dictionary(text("k"), SCANNED, items))
    assert not read_pickle(path).tensors


def test_archives_that_two_readers_see_in_two_ways(tmp_path: Path) -> None:
    good = dictionary(A, tensor(storage()))
    assert read_pickle(zipped(tmp_path / "good.bin", good)).tensors
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile warns of the names that are there twice
        for number_, records in enumerate(
            (
                {"data/0": bytes(64)},
                {"DATA/0": bytes(64)},
                {"other/data.pkl": good},
                {"byteorder": b"middle"},
                {"byteorder": b"little\n"},
                {".storage_alignment": b"x"},
            )
        ):
            path = zipped(tmp_path / f"{number_}.bin", good, **records)
            with pytest.raises(FileFormatError):
                read_pickle(path)
    for size in (63, 65):
        with pytest.raises(FileFormatError, match="than claimed"):
            read_pickle(zipped(tmp_path / f"size-{size}.bin", good, {"0": size}))
    with zipfile.ZipFile(tmp_path / "elsewhere.bin", "w") as archive:
        archive.writestr("first/version", b"3")
        archive.writestr("archive/data.pkl", good)
    with pytest.raises(FileFormatError, match=r"not one written|several"):
        read_pickle(tmp_path / "elsewhere.bin")


def test_long_names_are_not_multiplied(tmp_path: Path) -> None:
    inner = b"}(" + b"".join(text(str(n)) + b"N" for n in range(5000)) + b"u"
    with pytest.raises(FileFormatError, match="names too long"):
        read_pickle(zipped(tmp_path / "x.bin", dictionary(text("p" * 100_000), inner)))


def test_memory_is_that_of_the_file(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(FileFormatError, match="over and over"):
        read_pickle(zipped(tmp_path / "x.bin", dictionary(A, sequence(PAIRS, AGAIN * 3000))))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10


# ------------------------------------------------------------------- the same as torch


def saved() -> dict[str, Any]:
    """Return tensors of every kind that is read: strided, shared, empty, complex, nested."""
    return contents() | {
        "list": [torch.ones(2), 3],
        "empty": torch.zeros(0, 3),
        "complex": torch.ones(2, dtype=torch.complex64),
        "flags": torch.tensor([True, False]),
    }


def flattened(value: Any, prefix: str = "") -> dict[str, torch.Tensor]:
    """Return the tensors of what torch has loaded by the names that they get here."""
    found: dict[str, torch.Tensor] = {}
    for key, item in enumerate(value) if isinstance(value, list) else value.items():
        name = f"{prefix}{key}"
        if isinstance(item, torch.Tensor):
            found[name] = item
        elif isinstance(item, dict) or (
            isinstance(item, list) and any(isinstance(part, torch.Tensor) for part in item)
        ):
            found |= flattened(item, f"{name}.")
    return found


def mutated(whole: bytes, source: random.Random) -> bytes:
    """Return the file with one or two bytes changed, left out or put in."""
    data = bytearray(whole)
    for _ in range(source.choice([1, 1, 2])):
        place, kind = source.randrange(len(data)), source.random()
        if kind < 0.5:
            data[place] ^= 1 << source.randrange(8)
        elif kind < 0.8:
            data[place] = source.randrange(256)
        elif kind < 0.9:
            del data[place]
        else:
            data.insert(place, source.randrange(256))
    return bytes(data)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
def test_damage_is_refused_or_reads_as_in_torch(
    is_zip: bool, tmp_path: Path, fuzz_seconds: float
) -> None:
    """Whatever is accepted, torch's weights-only loader reads to the same bytes.

    It may refuse more where a field of the archive is wrong that no tensor depends on.
    """
    path = tmp_path / "x.bin"
    torch.save(saved(), path, _use_new_zipfile_serialization=is_zip)
    whole, source = path.read_bytes(), random.Random(0)
    counts: collections.Counter[str] = collections.Counter()
    end = time.monotonic() + fuzz_seconds
    while time.monotonic() < end or counts["same"] < 20:
        path.write_bytes(mutated(whole, source))
        try:
            read = {n: read_bytes(each) for n, each in read_pickle(path).tensors.items()}
        except FileFormatError:
            counts["refused"] += 1
            continue
        try:
            loaded = flattened(torch.load(path, weights_only=True, map_location="cpu"))
        except RuntimeError as error:
            is_container = "zip archive" in str(error) or "PytorchStreamReader" in str(error)
            if not (is_zip and is_container):
                raise
            counts["container"] += 1
            continue
        expected = {
            name: bytes(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
            for name, value in loaded.items()
        }
        assert read == expected
        counts["same"] += 1
    assert counts["refused"] > counts["same"]
    assert counts["container"] < 0.05 * (counts["same"] + counts["container"]) + 3


@pytest.mark.filterwarnings("ignore")
def test_tensors_that_are_no_arrays_of_known_numbers_are_refused(tmp_path: Path) -> None:
    values = {
        "quantised": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        "sparse": torch.eye(3).to_sparse(),
        "expanded": torch.ones(1).expand(4),
        "complex128": torch.ones(2, dtype=torch.complex128),
    }
    for name, value in values.items():
        for is_zip in (True, False):
            path = tmp_path / f"{name}-{is_zip}.bin"
            torch.save({"a": value}, path, _use_new_zipfile_serialization=is_zip)
            with pytest.raises(FileFormatError):
                read_pickle(path)
