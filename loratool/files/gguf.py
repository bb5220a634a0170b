"""GGUF headers: read within bounds, and written as the format's own library does.

A header is a magic number and a version, how many tensors and key values there are, the key
values, then name, sides, type and offset of each tensor; the data follow, each tensor at a multiple
of the alignment. The sides of a tensor are told from the last one on.

A header comes from a stranger. Reading one takes no more memory than a few times its bytes, at most
``MAX_HEADER_BYTES``; what it claims to hold has to fit into them, and so has every count before
anything is done as often. Arrays are skipped over, but for short ones; the strings in them have to
be walked through one by one, at most ``MAX_STRINGS``.
"""

from __future__ import annotations

import json
import reprlib
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeAlias

from loratool.errors import FileFormatError, UnsupportedError, unreadable
from loratool.files.container import WeightsFile
from loratool.files.dtypes import DTYPES
from loratool.files.inputs import stamp_of
from loratool.files.json import LFS_PREFIX
from loratool.files.sources import opened
from loratool.files.spec import StoredTensor, TensorSpec

__all__ = [
    "ALIGNMENT",
    "COUNT",
    "HEAD",
    "MAX_HEADER_BYTES",
    "TYPES",
    "Array",
    "GgufFile",
    "KeyValue",
    "Value",
    "aligned",
    "edited_values",
    "format_header",
    "format_values",
    "read_gguf",
    "value_as_text",
]

MAGIC: Final = b"GGUF"
COUNT: Final = 16
HEAD: Final = 24
"""Where the number of key values stands, and where they begin."""
VERSIONS: Final = (2, 3)
ALIGNMENT: Final = 32
"""What data lie at multiples of where ``general.alignment`` says nothing else."""
ALIGNMENT_KEY: Final = "general.alignment"

MAX_HEADER_BYTES: Final = 256 << 20
MAX_TENSORS: Final = 200_000
MAX_KEY_VALUES: Final = 100_000
MAX_STRINGS: Final = 4_000_000
"""Strings in all arrays together: a large vocabulary and its merges are a tenth of it."""
MAX_DEPTH: Final = 4
"""Arrays in arrays; nobody has written any."""
MAX_DIMENSIONS: Final = 4
MAX_NAME: Final = 1 << 16
MAX_SIZE: Final = 1 << 62
MAX_ALIGNMENT: Final = 1 << 24
SHORT_NUMBERS: Final = 4096
SHORT_STRINGS: Final = 64
MAX_ELEMENTS: Final = 1_000_000
"""Arrays up to these lengths are read, until as many elements have been."""
START: Final = 64 << 10
CHUNK: Final = 1 << 20

TYPES: Final[dict[str, int]] = {
    "F32": 0,
    "F16": 1,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q5_0": 6,
    "Q5_1": 7,
    "Q8_0": 8,
    "Q2_K": 10,
    "Q3_K": 11,
    "Q4_K": 12,
    "Q5_K": 13,
    "Q6_K": 14,
    "Q8_K": 15,
    "IQ2_XXS": 16,
    "IQ2_XS": 17,
    "IQ3_XXS": 18,
    "IQ1_S": 19,
    "IQ4_NL": 20,
    "IQ3_S": 21,
    "IQ2_S": 22,
    "IQ4_XS": 23,
    "I8": 24,
    "I16": 25,
    "I32": 26,
    "I64": 27,
    "F64": 28,
    "IQ1_M": 29,
    "BF16": 30,
    "TQ1_0": 34,
    "TQ2_0": 35,
    "MXFP4": 39,
    "NVFP4": 40,
    "Q1_0": 41,
}
"""The number of each dtype."""
DTYPE_OF: Final = {number: name for name, number in TYPES.items()}
GONE: Final = {
    **dict.fromkeys((4, 5), "an early type that nothing reads any more"),
    9: "Q8_1, which is for computing only",
    **dict.fromkeys((31, 32, 33), "Q4_0 rearranged for one kind of processor"),
    **dict.fromkeys((36, 37, 38), "IQ4_NL rearranged for one kind of processor"),
}

SCALARS: Final = {
    0: ("u8", struct.Struct("<B")),
    1: ("i8", struct.Struct("<b")),
    2: ("u16", struct.Struct("<H")),
    3: ("i16", struct.Struct("<h")),
    4: ("u32", struct.Struct("<I")),
    5: ("i32", struct.Struct("<i")),
    6: ("f32", struct.Struct("<f")),
    7: ("bool", struct.Struct("<B")),
    10: ("u64", struct.Struct("<Q")),
    11: ("i64", struct.Struct("<q")),
    12: ("f64", struct.Struct("<d")),
}
"""What key values may be, by number, beside strings and arrays."""
STRING: Final = 8
ARRAY: Final = 9
NUMBERS: Final = {name: number for number, (name, _) in SCALARS.items()} | {"str": STRING}

KINDS: Final = {
    ALIGNMENT_KEY: "u32",
    "general.file_type": "u32",
    "general.quantization_version": "u32",
    "general.base_model.count": "u32",
    "general.dataset.count": "u32",
    "general.tags": "[str]",
    "general.languages": "[str]",
    "adapter.lora.alpha": "f32",
    "adapter.alora.invocation_tokens": "[u32]",
    "split.no": "u16",
    "split.count": "u16",
    "split.tensors.count": "i32",
}
"""What is written otherwise than as a string; arrays come as JSON."""

HEADS: Final = (".attention.head_count", ".attention.head_count_kv")


@dataclass(frozen=True, slots=True)
class Array:
    """An array that was skipped over.

    Attributes:
        kind: What its elements are: ``u32``, ``str``, ``array`` …
        count: How many there are.
    """

    kind: str
    count: int


Value: TypeAlias = "int | float | bool | str | tuple[int | float | bool | str, ...] | Array"


@dataclass(frozen=True, slots=True)
class KeyValue:
    """One key value.

    Attributes:
        value: What it says; short arrays are tuples.
        kind: What it is: ``u32``, ``str``, ``[f32]`` …
        place: Where its bytes, those of the key included, begin and end in the header.
    """

    value: Value
    kind: str
    place: tuple[int, int]


@dataclass(frozen=True, slots=True)
class GgufFile(WeightsFile):
    """A GGUF file.

    Attributes:
        values: Its key values, in their order.
        alignment: What the data of each tensor lie at multiples of.
        version: Of the format.
    """

    values: Mapping[str, KeyValue] = field(default_factory=dict)
    alignment: int = ALIGNMENT
    version: int = VERSIONS[-1]

    @property
    def raw_values(self) -> bytes:
        """The bytes of all key values."""
        ends = [each.place[1] for each in self.values.values()]
        return (self.header or b"")[HEAD:][: max(ends, default=HEAD) - HEAD]


def aligned(offset: int, alignment: int) -> int:
    """Return the first multiple of ``alignment`` from ``offset`` on."""
    return -(-offset // alignment) * alignment


# --- reading


def read_gguf(path: Path) -> GgufFile:
    """Read and check the header of ``path``.

    Raises:
        FileFormatError: The file breaks a rule of the format; the message says which.
    """
    try:
        with opened(path) as file:
            stamp = stamp_of(file)
            header = _Header(path, file, stamp.size)
            version, tensors, count = _read_counts(header)
            values = dict(_key_values(header, count))
            alignment = _alignment(path, values)
            infos = [_read_info(header) for _ in range(tensors)]
            raw = header.read()
    except OSError as error:
        raise unreadable(path, error) from None
    start = aligned(header.at, alignment)
    stored = _placed(path, infos, start, alignment, (header.at, stamp.size))
    texts = {k: text for k, value in values.items() if (text := value_as_text(value)) is not None}
    return GgufFile(
        path,
        stored,
        texts,
        stamp.size,
        stamp,
        raw,
        values=values,
        alignment=alignment,
        version=version,
    )


class _Header:
    """The bytes of a header, read as far as they are looked at."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path = path
        self.size = size
        self.data = file.read(START)
        self.at = 0
        self._file = file
        self._strings = 0
        self._elements = 0
        self._arrays = 0

    def wrong(self, what: str) -> FileFormatError:
        """Return the error that the header breaks a rule."""
        return FileFormatError(self.path, f"header: {what}")

    def need(self, count: int) -> None:
        """Have the next ``count`` bytes read.

        Raises:
            FileFormatError: There are not as many, or more than a header may have.
        """
        end = self.at + count
        if end <= len(self.data):
            return
        if end > self.size:
            raise FileFormatError(
                self.path,
                f"truncated: its header goes on, and the file has {self.size} bytes",
                hint="download it again",
            )
        if end > MAX_HEADER_BYTES:
            raise self.wrong(f"has more than {MAX_HEADER_BYTES} bytes")
        wanted = max(end, min(2 * len(self.data), MAX_HEADER_BYTES), CHUNK)
        self.data += self._file.read(wanted - len(self.data))
        if end > len(self.data):
            raise FileFormatError(self.path, "became shorter while it was read")

    def unpack(self, what: struct.Struct) -> Any:
        """Return the next number."""
        self.need(what.size)
        (value,) = what.unpack_from(self.data, self.at)
        self.at += what.size
        return value

    def text(self, most: int, what: str) -> str:
        """Return the next string, of a length up to ``most``."""
        length = self.unpack(U64)
        if length > most:
            raise self.wrong(f"{what} of {length} bytes; {most} are the most")
        self.need(length)
        raw = self.data[self.at : self.at + length]
        self.at += length
        # Of values only: what cannot be decoded is still there in the raw bytes.
        return raw.decode("utf-8", "replace")

    def can_read(self, count: int, most: int) -> bool:
        """Whether an array of so many elements, ``most`` at most, is read and not skipped."""
        if count > most or self._elements + count > MAX_ELEMENTS:
            return False
        self._elements += count
        return True

    def nest(self, count: int) -> None:
        """Note that there are so many arrays in one."""
        self._arrays += count
        if self._arrays > MAX_KEY_VALUES:
            raise self.wrong(f"has more than {MAX_KEY_VALUES} arrays in arrays")

    def numbers(self, what: struct.Struct, count: int) -> tuple[int | float, ...]:
        """Return the next ``count`` numbers."""
        self.need(count * what.size)
        found = struct.unpack_from(f"<{count}{what.format[1:]}", self.data, self.at)
        self.at += count * what.size
        return found

    def skip_strings(self, count: int) -> None:
        """Walk over so many strings."""
        self._strings += count
        if self._strings > MAX_STRINGS:
            raise self.wrong(f"has arrays of more than {MAX_STRINGS} strings")
        unpack, left = U64.unpack_from, count
        while left:
            data, at = self.data, self.at
            try:
                while left:
                    at += 8 + unpack(data, at)[0]
                    left -= 1
            except (struct.error, OverflowError, IndexError):
                pass  # beyond what has been read
            self.at = min(at, self.size + 1)
            self.need(8 if left else 0)

    def read(self) -> bytes:
        """Return all bytes up to here."""
        return self.data[: self.at]


U32: Final = SCALARS[4][1]
U64: Final = SCALARS[10][1]


def _read_counts(header: _Header) -> tuple[int, int, int]:
    """Return the version, and how many tensors and key values there are."""
    if header.data[:4] != MAGIC:
        raise FileFormatError(header.path, _not_gguf(header.data))
    header.at = 4
    version = header.unpack(U32)
    if version not in VERSIONS:
        if version and not version & 0xFFFF:
            raise FileFormatError(
                header.path,
                "is big-endian",
                hint="convert the model again, without --bigendian",
            )
        raise FileFormatError(
            header.path, f"is GGUF of version {version}; versions 2 and 3 are read"
        )
    tensors, values = header.unpack(U64), header.unpack(U64)
    # A tensor takes at least 24 bytes, a key value 13.
    left = header.size - header.at
    for count, most, least, what in (
        (tensors, MAX_TENSORS, 24, "tensors"),
        (values, MAX_KEY_VALUES, 13, "key values"),
    ):
        if count > most or count * least > left:
            raise header.wrong(f"claims {count} {what} in {left} bytes; {most} are the most")
    return version, tensors, values


def _not_gguf(start: bytes) -> str:
    if start.startswith(LFS_PREFIX):
        return "a git-LFS pointer, not the weights; fetch them with 'git lfs pull'"
    if not start:
        return "the file is empty"
    if start[:4] in (b"ggjt", b"tjgg", b"lmgg", b"fmgg", b"ggml", b"ggmf", b"ggla", b"algg"):
        return "a file of llama.cpp from before GGUF; convert the model again"
    if start[:4] == MAGIC[::-1]:
        return "is big-endian"
    if start.startswith(b"PK\x03\x04"):
        return "a zip archive, such as a torch pickle, not a GGUF file"
    if start.lstrip()[:1] == b"<":
        return "a web page or XML text, not a GGUF file; the download went wrong"
    return "not a GGUF file"


def _key_values(header: _Header, count: int) -> Iterator[tuple[str, KeyValue]]:
    seen: set[str] = set()
    for _ in range(count):
        begin = header.at
        key = _name(header, "a key")
        if key in seen:
            raise header.wrong(f"the key {reprlib.repr(key)} occurs twice")
        seen.add(key)
        kind, value = _read_value(header, key)
        yield key, KeyValue(value, kind, (begin, header.at))


def _name(header: _Header, what: str) -> str:
    begin = header.at
    text = header.text(MAX_NAME, what)
    if "\ufffd" in text and text.encode() != header.data[begin + 8 : header.at]:
        raise header.wrong(f"{what} that is no text: {reprlib.repr(text)}")
    return text


def _read_value(header: _Header, key: str) -> tuple[str, Value]:
    kind = header.unpack(U32)
    if kind == STRING:
        return "str", header.text(MAX_HEADER_BYTES, f"{reprlib.repr(key)} is a string")
    if kind == ARRAY:
        return _read_array(header, key, 1)
    return _kind(header, key, kind), _read_scalar(header, key, kind)


def _kind(header: _Header, key: str, kind: int) -> str:
    if kind not in SCALARS:
        raise header.wrong(f"{reprlib.repr(key)} is of the unknown type {kind}")
    return SCALARS[kind][0]


def _read_scalar(header: _Header, key: str, kind: int) -> int | float | bool:
    name, form = SCALARS[kind]
    value: int | float = header.unpack(form)
    if name != "bool":
        return value
    if value not in (0, 1):
        raise header.wrong(f"{reprlib.repr(key)} is {value}, which is no truth value")
    return bool(value)


def _read_array(header: _Header, key: str, depth: int) -> tuple[str, Value]:
    kind, count = header.unpack(U32), header.unpack(U64)
    name = {STRING: "str", ARRAY: "array"}.get(kind) or _kind(header, key, kind)
    form = SCALARS[kind][1] if kind in SCALARS else U64
    left = header.size - header.at
    if count * form.size > left:
        raise header.wrong(
            f"{reprlib.repr(key)} claims {count} elements, and {left} bytes are left"
        )
    if kind == ARRAY:
        if depth == MAX_DEPTH:
            raise header.wrong(f"{reprlib.repr(key)} is of arrays in arrays")
        header.nest(count)
        for _ in range(count):
            _read_array(header, key, depth + 1)
    elif kind == STRING and header.can_read(count, SHORT_STRINGS):
        texts = [header.text(MAX_HEADER_BYTES, "a string") for _ in range(count)]
        return "[str]", tuple(texts)
    elif kind == STRING:
        header.skip_strings(count)
    elif header.can_read(count, SHORT_NUMBERS):
        numbers = header.numbers(form, count)
        return f"[{name}]", tuple(map(bool, numbers)) if name == "bool" else numbers
    else:
        header.need(count * form.size)
        header.at += count * form.size
    return f"[{name}]", Array(name, count)


def value_as_text(value: KeyValue) -> str | None:
    """Return a value as text, which :func:`format_values` makes the same of; none of long arrays.

    Arrays are JSON.
    """
    if isinstance(value.value, Array):
        return None
    if isinstance(value.value, tuple):
        kind = value.kind[1:-1]
        if kind == "str":
            return json.dumps(value.value, ensure_ascii=False)
        return f"[{', '.join(_as_text(each, kind) for each in value.value)}]"
    return _as_text(value.value, value.kind)


def _as_text(value: int | float | bool | str, kind: str) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if kind != "f32":
        return str(value)
    # The shortest that is the same float32.
    near = (float(f"{value:.{digits}g}") for digits in range(6, 10))
    pack = SCALARS[NUMBERS[kind]][1].pack
    return str(next((each for each in near if pack(each) == pack(value)), value))


def _alignment(path: Path, values: Mapping[str, KeyValue]) -> int:
    if ALIGNMENT_KEY not in values:
        return ALIGNMENT
    given = values[ALIGNMENT_KEY]
    size = given.value
    if given.kind != "u32" or not isinstance(size, int) or not 0 < size <= MAX_ALIGNMENT:
        raise FileFormatError(path, f"header: {ALIGNMENT_KEY} is {size!r:.40}")
    if size.bit_count() != 1:
        raise FileFormatError(path, f"header: {ALIGNMENT_KEY} is {size}, which is no power of two")
    return size


def _read_info(header: _Header) -> tuple[TensorSpec, int]:
    """Return what the next tensor is, and where from the first one its data begin."""
    name = _name(header, "a tensor")
    count = header.unpack(U32)
    if count > MAX_DIMENSIONS:
        raise _wrong(header.path, name, f"has {count} dimensions; {MAX_DIMENSIONS} are the most")
    sides = [header.unpack(U64) for _ in range(count)]
    number, offset = header.unpack(U32), header.unpack(U64)
    if number not in DTYPE_OF:
        what = GONE.get(number, "which is not known here")
        raise _wrong(header.path, name, f"is of type {number}, {what}")
    spec = TensorSpec(name, DTYPE_OF[number], tuple(reversed(sides)))
    if max(sides, default=0) >= MAX_SIZE or spec.elements >= MAX_SIZE:
        raise _wrong(header.path, name, f"has the impossible shape {list(spec.shape)}")
    if not _is_of_blocks(spec):
        raise _wrong(
            header.path, name, f"has the shape {list(spec.shape)}, no whole blocks of {spec.dtype}"
        )
    return spec, offset


def _is_of_blocks(spec: TensorSpec) -> bool:
    block = DTYPES[spec.dtype].block
    return block is None or (bool(spec.shape) and spec.shape[-1] % block[0] == 0)


def _wrong(path: Path, name: str, what: str) -> FileFormatError:
    return FileFormatError(path, f"header: tensor {reprlib.repr(name)} {what}")


def _placed(
    path: Path,
    infos: Sequence[tuple[TensorSpec, int]],
    start: int,
    alignment: int,
    ends: tuple[int, int],
) -> dict[str, StoredTensor]:
    """Return the tensors in the order of their data, each at the first place after the one before.

    Args:
        path: The file.
        infos: The tensors, and where from the start they begin.
        start: Where the data begin.
        alignment: Of each of them.
        ends: Where the header ends, and the file.
    """
    names = {spec.name for spec, _ in infos}
    if len(names) != len(infos):
        twice = next(
            one.name
            for one, two in pairwise(sorted((spec for spec, _ in infos), key=lambda s: s.name))
            if one.name == two.name
        )
        raise _wrong(path, twice, "occurs twice")
    expected, end = start, ends[0]
    found = {}
    for spec, offset in sorted(infos, key=lambda info: (info[1], info[0].nbytes)):
        begin = start + offset
        if begin != expected:
            kind = "overlaps the one before" if begin < expected else "leaves a hole before it"
            raise _wrong(path, spec.name, f"begins at byte {begin}, which {kind} ({expected})")
        found[spec.name] = StoredTensor(spec, path, begin)
        end = begin + spec.nbytes
        expected = aligned(end, alignment)
    # Some writers leave out what fills up the last tensor.
    if ends[1] not in (end, expected):
        state = "truncated" if ends[1] < expected else "has trailing bytes"
        hint = "download it again" if state == "truncated" else None
        raise FileFormatError(
            path, f"{state}: its header describes {end} bytes, the file has {ends[1]}", hint=hint
        )
    return found


# --- writing


def format_values(metadata: Mapping[str, str]) -> tuple[bytes, int]:
    """Return texts as key values, and how many they are: strings, but for :data:`KINDS`.

    Raises:
        UnsupportedError: A text is not what its key stands for.
    """
    made = [_key_value(key, text, _kind_written(key, text)) for key, text in metadata.items()]
    return b"".join(made), len(made)


def edited_values(file: GgufFile, changes: Mapping[str, str | None]) -> tuple[bytes, int]:
    """Return the key values of ``file`` with some changed, and how many they are.

    What is changed keeps its type and its place, what is new goes to the end.

    Args:
        file: The file; the bytes of every other key value are those that it has.
        changes: By key what it says instead, as :func:`value_as_text` spells it, or ``None``
            where it goes.

    Raises:
        UnsupportedError: A text is not what its key stands for.
    """
    header, made = file.header or b"", []
    for key, value in file.values.items():
        if key not in changes:
            made.append(header[slice(*value.place)])
        elif (text := changes[key]) is not None:
            made.append(_key_value(key, text, value.kind))
    for key, text in changes.items():
        if key not in file.values and text is not None:
            made.append(_key_value(key, text, _kind_written(key, text)))
    return b"".join(made), len(made)


def _key_value(key: str, text: str, kind: str) -> bytes:
    """Return the bytes of one key value.

    Raises:
        UnsupportedError: The text is not what its key stands for.
    """
    try:
        return _string(key) + _value(text, kind)
    except (ValueError, TypeError, KeyError, RecursionError, struct.error):
        raise UnsupportedError(key, f"is {reprlib.repr(text)}, and has to be {kind}") from None


def _kind_written(key: str, text: str) -> str:
    """Return what a text is written as: of heads, one number or one for each layer."""
    if key.endswith(HEADS):
        return "[u32]" if text.startswith("[") else "u32"
    return KINDS.get(key, "str")


def _string(text: str) -> bytes:
    if not isinstance(text, str):
        raise TypeError
    raw = text.encode()
    return U64.pack(len(raw)) + raw


def _value(text: str, kind: str) -> bytes:
    if not kind.startswith("["):
        return U32.pack(NUMBERS[kind]) + _element(text, kind)
    kind = kind[1:-1]
    elements = json.loads(text)
    if not isinstance(elements, list):
        raise TypeError
    packed = b"".join(_element(each, kind) for each in elements)
    return U32.pack(ARRAY) + U32.pack(NUMBERS[kind]) + U64.pack(len(elements)) + packed


def _element(value: Any, kind: str) -> bytes:
    if kind == "str":
        return _string(value)
    form = SCALARS[NUMBERS[kind]][1]
    if kind == "bool":
        value = {"true": True, "false": False}[str(value).lower()]
    return form.pack(float(value) if kind.startswith("f") else int(value))


def format_header(
    specs: Sequence[TensorSpec], values: bytes, count: int, alignment: int = ALIGNMENT
) -> bytes:
    """Return the header of a file that stores ``specs`` in this order, without what fills it up.

    Args:
        specs: The tensors.
        values: The key values as they are stored.
        count: How many they are.
        alignment: Of the data of each tensor.

    Raises:
        UnsupportedError: The format has no such tensor.
    """
    head = MAGIC + U32.pack(VERSIONS[-1]) + U64.pack(len(specs)) + U64.pack(count)
    made, offset = [head, values], 0
    for spec in specs:
        if spec.dtype not in TYPES:
            raise UnsupportedError(spec.name, f"is {spec.dtype}, which GGUF does not have")
        if len(spec.shape) > MAX_DIMENSIONS:
            raise UnsupportedError(
                spec.name, f"has {len(spec.shape)} dimensions; GGUF has {MAX_DIMENSIONS}"
            )
        if not _is_of_blocks(spec):
            raise UnsupportedError(
                spec.name, f"has the shape {list(spec.shape)}, no whole blocks of {spec.dtype}"
            )
        made += [_string(spec.name), U32.pack(len(spec.shape))]
        made += [U64.pack(side) for side in reversed(spec.shape)]
        made += [U32.pack(TYPES[spec.dtype]), U64.pack(offset)]
        offset = aligned(offset + spec.nbytes, alignment)
    return b"".join(made)
