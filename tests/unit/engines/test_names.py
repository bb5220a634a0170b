"""Names of engines: what they mean, and what is said of those that are none."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loratool.engines.names import NAMES, EngineName, parse_name
from loratool.errors import OptionError

GOOD = {
    "processes": EngineName("processes"),
    "processes:1": EngineName("processes", 1),
    "processes:1024": EngineName("processes", 1024),
    "mpi": EngineName("mpi"),
    "dask://node-1.local:8786": EngineName("dask", None, "tcp://node-1.local:8786"),
    "dask://10.0.0.1": EngineName("dask", None, "tcp://10.0.0.1:8786"),
    "dask://[::1]:9/": EngineName("dask", None, "tcp://[::1]:9"),
    "tls://node:1": EngineName("dask", None, "tls://node:1"),
}
BAD = {
    "": "is none of",
    "processes:": "says no number",
    "processes:0": "says no number",
    "processes:1025": "says no number",
    "processes:-1": "says no number",
    "processes:²": "says no number",
    "procesess": "is none of",
    "mpi:4": "is none of",
    "dask": "lacks the address",
    "dask:8786": "lacks the address",
    "dask://": "lacks the address",
    "dask://h:99999": "lacks the address",
    "dask://a b:1": "lacks the address",
    "dask://u:secret@h:1": "user's name",
    "tcp://h:1": "called dask",
    "tcp://u:secret@h:1": "called dask",
    "ray://u:secret@h:1": "is none of",
    "\x1b[31m": "is none of",
}


@pytest.mark.parametrize("name", GOOD)
def test_a_name_means_an_engine(name: str) -> None:
    assert parse_name(name) == GOOD[name]


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_name_is_one_line_that_tells_no_secret(name: str) -> None:
    with pytest.raises(OptionError, match=BAD[name]) as failure:
        parse_name(name)
    told = f"{failure.value} {failure.value.hint}"
    assert "secret" not in told and "\x1b" not in told and "\n" not in told


@pytest.mark.parametrize("name", BAD)
def test_a_hint_works_when_it_is_followed(name: str) -> None:
    with pytest.raises(OptionError) as failure:
        parse_name(name)
    hint = (failure.value.hint or "--executor mpi").removeprefix("did you mean ").rstrip("?")
    assert parse_name(hint.removeprefix("--executor ").replace(":N", ":2")).kind


@given(st.text(max_size=30) | st.sampled_from(NAMES).map(lambda name: f"{name}:"))
def test_any_text_is_a_name_or_an_error_of_ours(text: str) -> None:
    error = None
    try:
        parse_name(text)
    except OptionError as found:
        error = found
    assert error is None or str(error).isprintable()
