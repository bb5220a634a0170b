"""Where inputs lie, and what tells that they are the same."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loratool.errors import FileFormatError
from loratool.shards.roots import PROBED, SECOND, Mark, Roots, check_marks, mark_of


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "base" / "model.safetensors"
    path.parent.mkdir()
    path.write_bytes(bytes(range(256)) * 2048)
    return path


def test_a_copy_with_its_time_fits(file: Path, tmp_path: Path) -> None:
    mark = mark_of(file)
    kept = Path(shutil.copy2(file, tmp_path / "kept"))
    assert mark_of(kept).fits(mark) and mark.fits(mark_of(kept))
    (link := tmp_path / "link").symlink_to(file)
    assert mark_of(link).fits(mark)
    os.utime(kept, ns=(0, file.stat().st_mtime_ns + 1))
    assert not mark_of(kept).fits(mark)


def test_whole_seconds_fit_the_second_that_they_are_of(file: Path, tmp_path: Path) -> None:
    os.utime(file, ns=(0, 7 * SECOND + 123_456_789))
    mark = mark_of(file)
    copy = Path(shutil.copy2(file, tmp_path / "copy"))
    for time, fits in ((7 * SECOND, True), (8 * SECOND, False), (7 * SECOND + 5, False)):
        os.utime(copy, ns=(0, time))
        assert mark_of(copy).fits(mark) is fits
        assert mark.fits(mark_of(copy)) is fits


@pytest.mark.parametrize("at", [0, PROBED - 1, -1, -PROBED])
def test_a_byte_that_differs_at_either_end(file: Path, at: int) -> None:
    mark, times = mark_of(file), file.stat().st_mtime_ns
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(times, times))
    assert not mark_of(file).fits(mark)
    with pytest.raises(FileFormatError, match="is not the file") as caught:
        check_marks({file: mark})
    assert "cp -p" in str(caught.value.hint)


def test_another_size_or_no_file(file: Path) -> None:
    mark, time = mark_of(file), file.stat().st_mtime_ns
    with file.open("ab") as stream:
        stream.write(b"x")
    os.utime(file, ns=(time, time))
    assert not mark_of(file).fits(mark)
    file.unlink()
    for call in (lambda: mark_of(file), lambda: check_marks({file: mark})):
        with pytest.raises(FileFormatError):
            call()


def test_a_tag_is_all_that_counts_of_what_is_elsewhere(file: Path) -> None:
    mark = replace(mark_of(file), modified=None, tag="org/base@abc/model.safetensors")
    assert mark.fits(mark)
    assert not mark.fits(replace(mark, tag="org/base@abd/model.safetensors"))
    assert not mark.fits(mark_of(file))


marks = st.builds(
    Mark,
    st.integers(0, 2),
    st.none() | st.integers(0, 3 * SECOND),
    st.none() | st.just("tag"),
    st.just("ends"),
)


@given(marks, marks)
def test_fitting_is_mutual(one: Mark, two: Mark) -> None:
    assert one.fits(one)
    assert one.fits(two) == two.fits(one)


def test_names_below_roots(tmp_path: Path) -> None:
    (tmp_path / "base" / "unet").mkdir(parents=True)
    file = tmp_path / "base" / "unet" / "model.safetensors"
    file.touch()
    (tmp_path / "adapter.safetensors").touch()
    roots = Roots.of({"base": tmp_path / "base", "adapter 0": tmp_path / "adapter.safetensors"})
    assert roots.below(file) == ("base", "unet/model.safetensors")
    assert roots.below(tmp_path / "base") == ("base", ".")
    assert roots.below(tmp_path / "adapter.safetensors") == ("adapter 0", "adapter.safetensors")
    for path in (file, tmp_path / "base", tmp_path / "adapter.safetensors"):
        assert roots.placed(*roots.below(path)) == path
    (tmp_path / "elsewhere").mkdir()
    other = tmp_path / "elsewhere" / "model.safetensors"
    root, name = roots.below(other)
    assert roots.placed(root, name) == other
    assert roots.below(other) == (root, name)


def test_a_root_that_is_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    roots = Roots.of({"base": tmp_path / "link"})
    assert roots.named["base"] == str(tmp_path / "link")
    assert roots.below(tmp_path / "link" / "a") == ("base", "a")


@pytest.mark.parametrize("below", ["", "..", "../x", "a/../b", "/etc", "a//b", "a/", "a\0", "./a"])
def test_paths_that_lead_out(below: str, tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="is no path of this plan"):
        Roots.of({"base": tmp_path}).placed("base", below)
