"""Plans as JSON: the same value comes back, and a stranger's text does nothing."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loratool.errors import FileFormatError
from loratool.files.inputs import ELSEWHERE, Stamp
from loratool.files.spec import StoredTensor, TensorSpec
from loratool.shards.forms import as_form, form_text, from_form
from loratool.shards.model import ModelPart, Move, PartFile
from loratool.shards.roots import Mark, Roots

ROOT = Path("/somewhere/base")


def below(path: Path) -> tuple[str, str]:
    return "base", path.relative_to(ROOT).as_posix()


def placed(root: str, inside: str) -> Path:
    return Roots({"base": str(ROOT)}, {"base": ROOT}).placed(root, inside)


def again(value: Any) -> Any:
    """Return what comes of a value that is sent elsewhere as text."""
    return from_form(json.loads(form_text(as_form(value, below))), placed, "here")


names = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1).filter(
    lambda name: name not in (".", "..")
)
paths = st.lists(names, min_size=1, max_size=3).map(lambda parts: ROOT.joinpath(*parts))
specs = st.builds(
    TensorSpec,
    st.text(),
    st.sampled_from(["F32", "BF16", "U8"]),
    st.lists(st.integers(0, 9), max_size=3).map(tuple),
)
numbers = st.floats(allow_nan=False)
scalars = st.none() | st.booleans() | st.integers() | numbers | st.text() | st.binary() | paths
keys = st.text() | st.integers() | paths
values = st.recursive(
    scalars
    | specs
    | st.builds(StoredTensor, specs, paths, st.integers(0, 2**60))
    | st.builds(Move, st.integers(0, 3), specs, paths, st.integers(0), st.integers(0))
    | st.builds(PartFile, st.text(), st.integers(0), st.binary(), st.none() | paths)
    | st.builds(Mark, st.integers(0), st.none() | st.integers(), st.none() | st.text(), st.text()),
    lambda inner: (
        st.lists(inner, max_size=4).map(tuple)
        | st.lists(inner, max_size=4)
        | st.dictionaries(keys, inner, max_size=4)
        | st.frozensets(st.text() | st.integers(), max_size=4)
    ),
    max_leaves=12,
)


@given(values)
def test_a_value_comes_back(value: Any) -> None:
    assert again(value) == value
    assert type(again(value)) is type(value)


@given(st.floats())
def test_every_number_comes_back(number: float) -> None:
    found = again((number,))[0]
    assert found == number or (math.isnan(found) and math.isnan(number))
    assert math.copysign(1, found) == math.copysign(1, number) or math.isnan(number)


@given(st.lists(specs, min_size=2, max_size=6).map(tuple))
def test_many_of_a_class_are_rows_and_their_name_is_there_once(
    rows: tuple[TensorSpec, ...],
) -> None:
    text = form_text(as_form(rows, below))
    assert text.count("files.spec:TensorSpec") == 1
    assert again(rows) == rows


def test_a_part_comes_back() -> None:
    spec = TensorSpec("a.weight", "BF16", (4, 2))
    part = ModelPart(
        (PartFile("model.safetensors", 90, b"\x80\0header"),),
        (Move(0, spec, ROOT / "model.safetensors", 8, 16),),
        (),
        {"a.weight": (0, 16)},
        {},
        hashed=(ROOT / "sub" / "one.safetensors",),
    )
    assert again(part) == part


def test_the_device_and_the_file_of_a_stamp_stay_here() -> None:
    assert again(Stamp(3, 99, 1234, 5)) == Stamp(ELSEWHERE, 0, 1234, 0)


class Colour(Enum):
    RED = 1


@pytest.mark.parametrize("value", [object(), Colour.RED, Colour, len, {"a": range(3)}, 1j])
def test_what_has_no_form_is_a_fault_of_the_program(value: Any) -> None:
    with pytest.raises(TypeError, match="has no form"):
        as_form(value, below)


def test_the_text_is_the_same_in_every_process() -> None:
    code = (
        "import loratool\n"
        "from pathlib import Path\n"
        "from loratool.verbs.merge import plan_merge\n"
        "from loratool.shards.model import model_job\n"
        "from loratool.shards.roots import Roots\n"
        "import sys\n"
        "base, adapter = map(Path, sys.argv[1:])\n"
        "plan = plan_merge(base, [adapter])\n"
        "roots = Roots.of({'base': base, 'adapter 0': adapter})\n"
        "job = model_job(plan, Path('out'), roots, told={})\n"
        "print(job.digest, [part.form for part in job.parts], job.closing)\n"
    )
    fixtures = Path(__file__).parents[3] / "fixtures"
    line = [sys.executable, "-c", code, fixtures / "bases/llama-tied"]
    found = {
        subprocess.run(
            [*line, fixtures / "adapters/tied-trainable-tokens"],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1", "77")
    }
    assert len(found) == 1


HOSTILE: list[Any] = [
    {"@": "os:system"},
    {"@": "os:_Environ"},
    {"@": "subprocess:Popen", "args": "touch owned"},
    {"@": "..os:system"},
    {"@": "files.spec:json"},
    {"@": "files.spec:TensorSpec", "name": "a"},
    {"@": "files.spec:TensorSpec", "name": "a", "dtype": "F32", "shape": [], "more": 1},
    {"@": "files.spec:TensorSpec.__init__"},
    {"@": "files.spec:nothing"},
    {"@": "files.nothing:Nothing"},
    {"@": "errors:LoratoolError"},
    {"@": "cli.main:main"},
    {"@": "__main__:main"},
    {"@": "engines.mpi:Engine"},
    {"@": "live.layers:Tensor"},
    {"@": "plan.model:Path", "+": {}},
    {"@": "files.inputs:InputFiles", "stamps": {"m": []}},
    {"@": "shards.folder:PartsFolder", "output": "x"},
    {"@": "files.spec:TensorSpec", "+": {"name": "a"}},
    {"@": "files.spec:TensorSpec", "of": ["name"], "rows": [["a", "b"]]},
    {"@": "files.spec:TensorSpec", "of": ["name", "dtype"], "rows": [["a"]]},
    {"@": "files.spec:TensorSpec", "of": [[]], "rows": [["a"]]},
    {"@": "files.spec:TensorSpec", "of": 3, "rows": 4},
    {"@": 3},
    {"n": ["files.spec:TensorSpec", "a"]},
    {"n": ["os:PathLike", "a"]},
    {"n": ["shards.folder:PartsFolder", "/etc"]},
    {"n": [1, 2]},
    {"p": ["base", "../x"]},
    {"p": ["base", "/etc/passwd"]},
    {"p": ["base", "a/../../x"]},
    {"p": ["base", ""]},
    {"p": ["base", "a//b"]},
    {"p": ["base", "a\0b"]},
    {"p": ["elsewhere", "x"]},
    {"p": ["base"]},
    {"p": 3},
    {"m": 3},
    {"m": [[1]]},
    {"m": [[{"l": []}, 1]]},
    {"s": [{"l": []}]},
    {"s": None},
    {"l": 5},
    {"b": "***"},
    {"b": "é"},
    {"t": "\ud800"},
    {"x": "much"},
    {"x": 3},
    {},
    {"unknown": 1},
]


@pytest.mark.parametrize("form", HOSTILE, ids=lambda form: json.dumps(form)[:60])
def test_a_strangers_form_is_refused(form: Any) -> None:
    before = set(sys.modules)
    with pytest.raises(FileFormatError) as caught:
        from_form(form, placed, "plan.json")
    assert "\n" not in str(caught.value)
    with pytest.raises(FileFormatError):
        from_form([1, {"l": [form]}], placed, "plan.json")
    assert not {name for name in set(sys.modules) - before if not name.startswith("loratool")}


def test_a_form_that_is_nested_deeply() -> None:
    form: Any = 1
    for _ in range(100_000):
        form = [form]
    with pytest.raises(FileFormatError, match="RecursionError"):
        from_form(form, placed, "plan.json")


jsons = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from([*"@+pmlstbxn", "of", "rows", "name", "shape"]), inner, max_size=3
        )
        | st.fixed_dictionaries(
            {
                "@": st.sampled_from(
                    ["files.spec:TensorSpec", "plan.model:Step", "shards.model:Closing"]
                )
            },
            optional={"name": inner, "plan": inner, "spec": inner, "shape": inner},
        )
    ),
    max_leaves=15,
)


@given(jsons)
def test_any_json_is_a_value_or_refused(form: Any) -> None:
    with suppress(FileFormatError):
        from_form(form, placed, "plan.json")
