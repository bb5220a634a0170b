"""GGUF headers: what they say, what is written, and hostile ones, which may cost nothing."""

from __future__ import annotations

import struct
import time
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loratool.errors import FileFormatError, UnsupportedError
from loratool.files import gguf
from loratool.files.containers import container_of
from loratool.files.gguf import Array, KeyValue, format_header, format_values, read_gguf
from loratool.files.spec import TensorSpec

HUGE = (1 << 63, (1 << 64) - 1, 1 << 60, 1 << 40, 1 << 32)


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return u64(len(raw)) + raw


def value(key: str | bytes, kind: int, raw: bytes) -> bytes:
    return text(key) + u32(kind) + raw


def array(key: str, kind: int, count: int, raw: bytes) -> bytes:
    return value(key, 9, u32(kind) + u64(count) + raw)


def info(
    name: str | bytes, sides: Sequence[int], kind: int = 0, offset: int = 0, dims: int | None = None
) -> bytes:
    count = len(sides) if dims is None else dims
    return text(name) + u32(count) + b"".join(map(u64, sides)) + u32(kind) + u64(offset)


def file(
    values: Sequence[bytes] = (),
    infos: Sequence[bytes] = (),
    data: int = 0,
    *,
    version: int = 3,
    counts: tuple[int, int] | None = None,
    alignment: int = 32,
) -> bytes:
    tensors, keys = counts or (len(infos), len(values))
    head = b"GGUF" + u32(version) + u64(tensors) + u64(keys) + b"".join((*values, *infos))
    return head + bytes(-len(head) % alignment) + bytes(data)


def written(folder: Path, content: bytes) -> Path:
    path = folder / "x.gguf"
    path.write_bytes(content)
    return path


KEYS = (
    value("u8", 0, b"\xff"),
    value("i8", 1, b"\xff"),
    value("u16", 2, b"\xff\xff"),
    value("i16", 3, b"\xff\xff"),
    value("u32", 4, b"\xff" * 4),
    value("i32", 5, b"\xff" * 4),
    value("f32", 6, struct.pack("<f", 0.1)),
    value("bool", 7, b"\x01"),
    value("text", 8, text("é\n")),
    value("broken", 8, text(b"\xff")),
    value("u64", 10, b"\xff" * 8),
    value("i64", 11, b"\xff" * 8),
    value("f64", 12, struct.pack("<d", 0.1)),
    array("numbers", 4, 3, struct.pack("<3I", 1, 2, 3)),
    array("floats", 6, 2, struct.pack("<2f", 0.5, 1e6)),
    array("flags", 7, 2, b"\x00\x01"),
    array("texts", 8, 2, text("a") + text('"')),
    array("none", 8, 0, b""),
    array("many", 8, 65, text("xy") * 65),
    array("more", 5, 5000, bytes(20000)),
    array("nested", 9, 2, (u32(4) + u64(1) + u32(7)) * 2),
)


def test_key_values_are_read_and_long_arrays_skipped(tmp_path: Path) -> None:
    found = read_gguf(written(tmp_path, file(KEYS)))
    assert found.metadata == {
        "u8": "255",
        "i8": "-1",
        "u16": "65535",
        "i16": "-1",
        "u32": "4294967295",
        "i32": "-1",
        "f32": "0.1",
        "bool": "true",
        "text": "é\n",
        "broken": "\ufffd",
        "u64": "18446744073709551615",
        "i64": "-1",
        "f64": "0.1",
        "numbers": "[1, 2, 3]",
        "floats": "[0.5, 1000000.0]",
        "flags": "[false, true]",
        "texts": '["a", "\\""]',
        "none": "[]",
    }
    kinds = {key: each.kind for key, each in found.values.items()}
    assert kinds["texts"] == "[str]" and kinds["f32"] == "f32" and kinds["nested"] == "[array]"
    assert found.values["many"].value == Array("str", 65)
    assert found.values["more"].value == Array("i32", 5000)
    assert found.values["nested"].value == Array("array", 2)
    assert found.raw_values == b"".join(KEYS)
    for raw, each in zip(KEYS, found.values.values(), strict=True):
        assert found.header is not None
        assert found.header[slice(*each.place)] == raw


@pytest.mark.parametrize("alignment", [1, 8, 32, 64, 4096])
def test_tensors_lie_at_multiples_of_the_alignment(alignment: int, tmp_path: Path) -> None:
    keys = [value("general.alignment", 4, u32(alignment))]
    second = -(-60 // alignment) * alignment
    third = -(-(second + 36) // alignment) * alignment
    infos = [
        info("a", (5, 3), 0),
        info("b", (64, 1), 2, second),
        info("ü", (), 1, third),
    ]
    found = read_gguf(written(tmp_path, file(keys, infos, third + 2, alignment=alignment)))
    assert found.alignment == alignment
    assert [stored.spec for stored in found.tensors.values()] == [
        TensorSpec("a", "F32", (3, 5)),
        TensorSpec("b", "Q4_0", (1, 64)),
        TensorSpec("ü", "F16", ()),
    ]
    offsets = [stored.offset for stored in found.tensors.values()]
    assert all(offset % alignment == 0 for offset in offsets)
    assert offsets[2] + 2 == found.size


def test_what_fills_up_the_last_tensor_may_be_missing(tmp_path: Path) -> None:
    infos = [info("a", (5,))]
    for size in (20, 32):
        assert read_gguf(written(tmp_path, file((), infos, size))).tensors["a"].spec.nbytes == 20
    for size, what in ((19, "truncated"), (21, "truncated"), (33, "trailing")):
        with pytest.raises(FileFormatError, match=what):
            read_gguf(written(tmp_path, file((), infos, size)))


def test_version_2_is_read_too(tmp_path: Path) -> None:
    found = read_gguf(written(tmp_path, file(KEYS, [info("a", (4,))], 32, version=2)))
    assert (found.version, list(found.tensors)) == (2, ["a"])
    layout = container_of(".gguf").lay_out([TensorSpec("a", "F16", (4,))], {}, "x.gguf", found)
    assert layout.header[4] == 3 and found.raw_values in layout.header


def test_infos_need_not_be_in_the_order_of_data(tmp_path: Path) -> None:
    infos = [info("b", (4,), 0, 32), info("a", (4,), 0, 0)]
    assert list(read_gguf(written(tmp_path, file((), infos, 64))).tensors) == ["a", "b"]


ONE = [info("a", (4,))]
HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty"),
    "big-endian": (b"GGUF" + struct.pack(">I", 3) + bytes(64), "big-endian"),
    "turned": (b"FUGG" + bytes(64), "big-endian"),
    "version 1": (file(version=1), "version 1"),
    "version 4": (file(version=4), "version 4"),
    "old": (b"tjgg" + bytes(64), "before GGUF"),
    "zip": (b"PK\x03\x04" + bytes(64), "zip"),
    "page": (b"<html>" + bytes(64), "web page"),
    "no header": (b"GGUF" + u32(3), "truncated"),
    "no counts": (b"GGUF" + u32(3) + u64(1), "truncated"),
    **{f"{n} tensors": (file(counts=(n, 0)), "claims") for n in HUGE},
    **{f"{n} key values": (file(counts=(0, n)), "claims") for n in HUGE},
    **{f"a key of {n}": (file([u64(n) + b"x" * 64]), "a key of") for n in HUGE},
    **{f"a text of {n}": (file([value("a", 8, u64(n))]), "string of|truncated") for n in HUGE},
    **{f"{n} texts": (file([array("a", 8, n, text("x") * 9)]), "claims") for n in HUGE},
    **{f"{n} numbers": (file([array("a", 4, n, bytes(9))]), "claims") for n in HUGE},
    **{f"{n} arrays": (file([array("a", 9, n, bytes(99))]), "claims") for n in HUGE},
    **{
        f"a long one of {n} texts": (
            file([array("a", 8, 99, text("x") * 50 + u64(n) + bytes(900))]),
            "truncated",
        )
        for n in HUGE
    },
    "arrays in arrays": (
        file([array("a", 9, 1, (u32(9) + u64(1)) * 50 + bytes(99))]),
        "arrays in arrays",
    ),
    "a type of key value": (file([value("a", 13, bytes(8))]), "unknown type 13"),
    "a type of elements": (file([array("a", 99, 1, bytes(8))]), "unknown type 99"),
    "a truth value": (file([value("a", 7, b"\x02")]), "no truth value"),
    "a key twice": (file([value("a", 0, b"x")] * 2), "occurs twice"),
    "a key that is no text": (file([value(b"\xff", 0, b"x")]), "no text"),
    "a tensor twice": (file((), [*ONE, info("a", (4,), 0, 32)], 64), "occurs twice"),
    "a name that is no text": (file((), [info(b"\xff", (4,))], 32), "no text"),
    "five sides": (file((), [info("a", (1, 1, 1, 1, 1))], 32), "5 dimensions"),
    "many sides": (file((), [info("a", (1,), dims=1 << 31)], 32), "dimensions"),
    **{f"a side of {n}": (file((), [info("a", (n,))], 32), "impossible|trunc") for n in HUGE},
    "sides": (file((), [info("a", (1 << 31, 1 << 31, 4))], 32), "impossible"),
    "no sides": (file((), [info("a", (0, 1 << 62))], 32), "impossible"),
    "no blocks": (file((), [info("a", (33, 2), 2)], 64), "no whole blocks of Q4_0"),
    "a number of blocks": (file((), [info("a", (), 2)], 64), "no whole blocks"),
    "a type": (file((), [info("a", (4,), 99)], 32), "type 99"),
    "a type that is gone": (file((), [info("a", (32,), 31)], 32), "rearranged"),
    "another type that is gone": (file((), [info("a", (32,), 9)], 64), "Q8_1"),
    **{f"an offset of {n}": (file((), [info("a", (4,), 0, n)], 32), "hole") for n in HUGE},
    "an odd offset": (file((), [info("a", (4,), 0, 1)], 64), "hole"),
    "an overlap": (file((), [*ONE, info("b", (4,), 0, 0)], 64), "overlaps"),
    "a hole": (file((), [*ONE, info("b", (4,), 0, 64)], 96), "hole"),
    "too short": (file((), ONE, 8), "truncated"),
    "too long": (file((), ONE, 64), "trailing"),
    **{
        f"an alignment of {n}": (file([value("general.alignment", 4, u32(n))], ONE, 32), "alignm")
        for n in (0, 3, 48, 1 << 31, (1 << 32) - 1)
    },
    "an alignment in words": (file([value("general.alignment", 8, text("32"))]), "alignment"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_breaks_a_rule_is_refused_at_no_cost(name: str, tmp_path: Path) -> None:
    content, what = HOSTILE[name]
    path = written(tmp_path, content)
    tracemalloc.start()
    start = time.perf_counter()
    try:
        with pytest.raises(FileFormatError, match=what):
            read_gguf(path)
        taken = time.perf_counter() - start
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20 and taken < 2


def test_a_header_takes_no_more_than_its_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = array("a", 8, 1000, text("x") * 1000)
    path = written(tmp_path, file([texts]))
    assert read_gguf(path).values["a"].value == Array("str", 1000)
    monkeypatch.setattr(gguf, "MAX_STRINGS", 999)
    with pytest.raises(FileFormatError, match="more than 999 strings"):
        read_gguf(path)
    monkeypatch.setattr(gguf, "MAX_STRINGS", 4000)
    monkeypatch.setattr(gguf, "MAX_HEADER_BYTES", 1 << 16)
    monkeypatch.setattr(gguf, "MAX_ELEMENTS", 5)
    short = [array(key, 4, 3, bytes(12)) for key in "ab"]
    found = read_gguf(written(tmp_path, file(short)))
    assert [each.value for each in found.values.values()] == [(0, 0, 0), Array("u32", 3)]
    monkeypatch.setattr(gguf, "MAX_KEY_VALUES", 5)
    with pytest.raises(FileFormatError, match="more than 5 arrays in arrays"):
        read_gguf(written(tmp_path, file([array("a", 9, 6, (u32(0) + u64(0)) * 6)])))
    big = written(tmp_path, file([array("a", 4, 40000, bytes(160000))]))
    with pytest.raises(FileFormatError, match="more than 65536 bytes"):
        read_gguf(big)


def test_a_vocabulary_is_walked_over_quickly(tmp_path: Path) -> None:
    count = 150_000
    tokens = b"".join(text(f"token {number}") for number in range(count))
    keys = [array("tokens", 8, count, tokens), array("merges", 8, count, tokens)]
    keys += [array("scores", 6, count, bytes(4 * count))]
    path = written(tmp_path, file(keys, ONE, 32))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        read_gguf(path)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.5  # 0.05 s where nothing else runs


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_damage_makes_anything_but_a_refusal(data: st.DataObject, tmp_path: Path) -> None:
    whole = bytearray(file(KEYS, [info("a", (5, 3)), info("b", (64, 1), 2, 64)], 128))
    for _ in range(data.draw(st.integers(1, 6))):
        place = data.draw(st.integers(0, len(whole) - 1))
        whole[place] = data.draw(st.integers(0, 255))
    cut = data.draw(st.one_of(st.none(), st.integers(0, len(whole))))
    path = written(tmp_path, bytes(whole[:cut]))
    try:
        found = read_gguf(path)
    except FileFormatError:
        return
    for stored in found.tensors.values():
        assert 0 <= stored.offset <= stored.offset + stored.span <= found.size


def test_texts_become_key_values_of_their_kinds(tmp_path: Path) -> None:
    metadata = {
        "general.architecture": "llama",
        "general.file_type": "7",
        "general.tags": '["a", "ü"]',
        "adapter.lora.alpha": "16.0",
        "adapter.alora.invocation_tokens": "[1, 2]",
        "split.no": "1",
        "other": "1",
    }
    raw, count = format_values(metadata)
    specs = [TensorSpec("a", "F32", (2, 3)), TensorSpec("b", "Q8_0", (1, 32))]
    head = format_header(specs, raw, count)
    path = written(tmp_path, head + bytes(-len(head) % 32) + bytes(64 - 32 + 64))
    found = read_gguf(path)
    assert found.metadata == metadata and found.raw_values == raw
    kinds = {key: each.kind for key, each in found.values.items()}
    assert list(kinds.values()) == ["str", "u32", "[str]", "f32", "[u32]", "u16", "str"]
    for key, wrong in (
        ("general.file_type", "x"),
        ("general.file_type", "-1"),
        ("general.tags", "a"),
        ("general.tags", "[1]"),
        ("adapter.alora.invocation_tokens", '["x"]'),
        ("general.tags", '{"a": 1}'),
        ("adapter.lora.alpha", ""),
    ):
        with pytest.raises(UnsupportedError, match=r"has to be"):
            format_values({key: wrong})


def test_what_the_format_does_not_have_is_not_written() -> None:
    for spec, what in (
        (TensorSpec("a", "U8", (2,)), "U8, which GGUF"),
        (TensorSpec("a", "F8_E4M3", (2,)), "F8_E4M3"),
        (TensorSpec("a", "F32", (1,) * 5), "5 dimensions"),
        (TensorSpec("a", "Q8_0", (2, 16)), "no whole blocks"),
    ):
        with pytest.raises(UnsupportedError, match=what):
            format_header([spec], b"", 0)
    with pytest.raises(UnsupportedError, match="blocks of GGUF"):
        container_of(".safetensors").lay_out([TensorSpec("a", "Q8_0", (2, 32))], {}, "x")
    with pytest.raises(UnsupportedError, match="Q8_0"):
        container_of(".bin").lay_out([TensorSpec("a", "Q8_0", (2, 32))], {}, "x.bin")


def test_a_file_like_another_keeps_what_it_says(tmp_path: Path) -> None:
    keys = [*KEYS, value("general.alignment", 4, u32(64))]
    infos = [info("b", (64, 1), 2, 0), info("a", (5, 3), 0, 64)]
    like = read_gguf(written(tmp_path, file(keys, infos, 128, alignment=64)))
    container = container_of(".gguf")
    specs = [stored.spec for stored in like.tensors.values()]
    same = container.lay_out(specs[::-1], {}, "y.gguf", like)
    assert same.header is like.header and same.size == like.size
    changed = [TensorSpec("c", "F16", (2,)), specs[1], TensorSpec("b", "F16", (2, 2, 2, 8, 1))]
    layout = container.lay_out(changed, {"other": "1"}, "y.gguf", like)
    path = tmp_path / "y.gguf"
    path.write_bytes(layout.header + bytes(layout.size - len(layout.header)))
    found = read_gguf(path)
    assert found.raw_values == like.raw_values and found.alignment == 64
    assert [stored.spec for stored in found.tensors.values()] == [
        TensorSpec("b", "F16", (1, 64)),  # in the shape that it is stored in
        TensorSpec("a", "F32", (3, 5)),
        TensorSpec("c", "F16", (2,)),
    ]
    assert {name: stored.offset for name, stored in found.tensors.items()} == layout.offsets


def test_a_value_knows_its_text() -> None:
    assert gguf.value_as_text(KeyValue(float("nan"), "f32", (0, 0))) == "nan"
    assert gguf.value_as_text(KeyValue(1e-5, "f64", (0, 0))) == "1e-05"
