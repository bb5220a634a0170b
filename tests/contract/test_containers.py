"""What every container of weights promises, whoever wrote it; a fake one is among them."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from fakes.finding import find_fakes

from loratool.discovery import PLUGINS
from loratool.errors import FileFormatError, PluginError, UnsupportedError
from loratool.files.container import Container, Layout, read_bytes
from loratool.files.containers import (
    FILES,
    USUAL,
    container_of,
    is_weights,
    model_suffixes,
    open_weights,
)
from loratool.files.spec import TensorSpec

with pytest.MonkeyPatch.context() as patch:
    find_fakes(patch)
    SUFFIXES = dict(FILES.claimed("suffixes"))
    CONTAINERS = {file: FILES.load(file) for file in FILES.claims()}

each_container = pytest.mark.parametrize("file", CONTAINERS)

SPECS = (
    TensorSpec("a.weight", "F32", (3, 5)),
    TensorSpec("naïve.β", "BF16", (7,)),
    TensorSpec("scalar", "F64", ()),
    TensorSpec("nothing", "F16", (0, 4)),
    TensorSpec("codes", "I8", (2, 2, 2)),
)
METADATA = {"one": "1", "zwei": "2"}


@pytest.fixture(autouse=True)
def _with_fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    find_fakes(monkeypatch)


def suffix_of(file: str) -> str:
    return next(suffix for suffix, owner in SUFFIXES.items() if owner == file)


def data(spec: TensorSpec) -> bytes:
    return bytes(i % 251 for i in range(len(spec.name), len(spec.name) + spec.nbytes))


def laid_out(container: Container, specs: tuple[TensorSpec, ...], name: str) -> Layout:
    """Return where everything lies; one that is only read says so, and what to do."""
    try:
        return container.lay_out(specs, METADATA, name)
    except UnsupportedError:
        pytest.skip("is only read")


def written(container: Container, path: Path, specs: tuple[TensorSpec, ...] = SPECS) -> Path:
    layout = laid_out(container, specs, path.name)
    with path.open("w+b") as file:
        file.truncate(layout.size)
        for spec in reversed(specs):  # in any order
            file.seek(layout.offsets[spec.name])
            file.write(data(spec))
        file.flush()
        layout.seal(file.fileno(), METADATA, path=path)
    assert path.stat().st_size == layout.size
    return path


@each_container
@pytest.mark.parametrize("specs", [SPECS, SPECS[:1], ()], ids=["several", "one", "none"])
def test_what_is_written_is_read_back(
    file: str, specs: tuple[TensorSpec, ...], tmp_path: Path
) -> None:
    container = CONTAINERS[file]
    path = written(container, tmp_path / f"x{suffix_of(file)}", specs)
    found = open_weights(path)
    assert found == container.open(path)
    assert found.size == path.stat().st_size and found.path == path
    assert {stored.spec for stored in found.tensors.values()} == set(specs)
    for name, stored in found.tensors.items():
        assert stored.spec.name == name and read_bytes(stored) == data(stored.spec)
    assert found.metadata == (METADATA if container.has_metadata else {})
    first = path.read_bytes()
    assert written(container, path, specs).read_bytes() == first


@each_container
def test_the_data_of_a_layout_do_not_overlap(file: str) -> None:
    layout = laid_out(CONTAINERS[file], SPECS, "x")
    places = sorted((layout.offsets[spec.name], spec.nbytes) for spec in SPECS)
    assert places[0][0] >= len(layout.header)
    for (one, size), (two, _) in pairwise(places):
        assert one + size <= two
    assert sum(places[-1]) <= layout.size
    if layout.header:
        assert len(layout.header) + sum(spec.nbytes for spec in SPECS) == layout.size


@each_container
def test_metadata_of_the_same_length_may_come_last(file: str, tmp_path: Path) -> None:
    container = CONTAINERS[file]
    path = written(container, tmp_path / f"x{suffix_of(file)}")
    layout = laid_out(container, SPECS, path.name)
    with path.open("r+b") as target:
        layout.seal(target.fileno(), METADATA | {"one": "9"}, path=path)
    if container.has_metadata:
        assert open_weights(path).metadata["one"] == "9"
    assert read_bytes(open_weights(path).tensors["codes"]) == data(SPECS[-1])


@each_container
def test_damaged_files_are_refused(file: str, tmp_path: Path) -> None:
    container = CONTAINERS[file]
    whole = written(container, tmp_path / f"x{suffix_of(file)}").read_bytes()
    path = tmp_path / f"y{suffix_of(file)}"
    for content in (
        b"",
        b"\0" * 64,
        b"{}" * 64,
        b"\xff" * 1000,
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        *(whole[: len(whole) * part // 8] for part in range(8)),
        whole[:-1],
    ):
        path.write_bytes(content)
        with pytest.raises(FileFormatError):
            open_weights(path)


@each_container
def test_no_bit_that_flips_makes_anything_but_a_refusal(file: str, tmp_path: Path) -> None:
    whole = written(CONTAINERS[file], tmp_path / f"x{suffix_of(file)}").read_bytes()
    path = tmp_path / f"y{suffix_of(file)}"
    for position in range(0, len(whole), max(1, len(whole) // 400)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        try:
            found = open_weights(path)
        except FileFormatError:
            continue
        for stored in found.tensors.values():
            assert stored.offset >= 0 and stored.offset + stored.span <= len(whole)


@each_container
def test_files_of_another_container_are_refused(file: str, tmp_path: Path) -> None:
    for other, container in CONTAINERS.items():
        if other != file:
            path = written(container, tmp_path / f"{other}{suffix_of(file)}")
            with pytest.raises(FileFormatError):
                open_weights(path)


def test_suffixes_tell_the_container_whatever_their_case() -> None:
    for suffix, file in SUFFIXES.items():
        assert container_of(suffix) is container_of(Path(f"x{suffix.upper()}")) is CONTAINERS[file]
        assert is_weights(Path(f"x{suffix}"))
    assert not is_weights(Path("x.txt")) and not is_weights(Path("safetensors"))
    assert model_suffixes() == (USUAL, ".bin", ".fake", ".gguf")
    with pytest.raises(FileFormatError, match=r"\.safetensors, \.bin"):
        container_of("x.txt")


def test_two_that_claim_a_suffix_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "containers"
    folder.mkdir()
    (folder / "rival.py").write_text('CLAIM = {"suffixes": [".bin"]}\n')
    monkeypatch.setenv(PLUGINS, str(tmp_path))
    with pytest.raises(PluginError, match=r"claims '\.bin', which \w+ claims too"):
        is_weights(Path("x.bin"))
