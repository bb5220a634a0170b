"""What every loader promises, whoever wrote it; a fake one is among them."""

from __future__ import annotations

import shlex

import click
import pytest
from fakes.finding import find_fakes

from loratool.cli.main import cli
from loratool.loaders import builtin_loaders, loader_named, loader_names
from loratool.loaders.checks import mending
from loratool.loaders.loader import Fate, Loader, Mend, Rule
from loratool.schemes import scheme_named


def options_of(name: str) -> list[str]:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    return [option for parameter in command.params for option in parameter.opts]


OPTIONS = {name: options_of(name) for name in ("convert", "merge", "truncate")}

with pytest.MonkeyPatch.context() as patch:
    find_fakes(patch)
    LOADERS = builtin_loaders()

each_loader = pytest.mark.parametrize("loader", LOADERS, ids=lambda loader: loader.name)


@pytest.fixture(autouse=True)
def _with_fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    find_fakes(monkeypatch)


def rules(loader: Loader) -> list[Rule]:
    single = (loader.mixed_ranks, loader.wrapped, loader.named, loader.regex_targets)
    return [*loader.rules.values(), *(rule for rule in single if rule is not None)]


@each_loader
def test_it_is_found_by_its_name(loader: Loader) -> None:
    assert loader_named(loader.name) is loader
    assert loader.name in loader_names()


@each_loader
def test_it_reads_what_is_written_for_it(loader: Loader) -> None:
    scheme = scheme_named(loader.scheme)
    assert loader.scheme in loader.reads
    for name in (*loader.reads, *loader.tolerates):
        scheme_named(name)
    assert not set(loader.reads) & set(loader.tolerates)
    if loader.file_names and scheme.home.weights_name:
        assert scheme.home.weights_name in loader.file_names
    assert loader.title and loader.summary and loader.source


@each_loader
def test_its_words_end_a_sentence(loader: Loader) -> None:
    for words in (loader.scale.words, *(rule.words for rule in rules(loader))):
        assert words and not words.endswith(".")


@each_loader
def test_every_rule_names_a_next_step_that_exists_or_none(loader: Loader) -> None:
    """Each command in a hint has the options that it is told with."""
    for rule in rules(loader):
        if rule.fate is Fate.NOTED:
            assert rule.mend is Mend.MERGE  # said, but never offered
            continue
        hint = mending(rule.mend, loader)
        commands = [part for part in hint.split(": ")[-1:] + hint.split("; ") if "loratool" in part]
        assert commands
        for text in commands:
            words = shlex.split(text[text.index("loratool") :])
            known = OPTIONS[words[1]]
            for word in words[2:]:
                assert not word.startswith("-") or word in known, (word, text)
            if "--for" in words:
                assert words[words.index("--for") + 1] == loader.name


@each_loader
def test_a_rank_that_it_can_be_set_up_for_is_offered(loader: Loader) -> None:
    for rank in range(1, 600, 7):
        offered = loader.next_rank(rank)
        assert offered is None or (offered >= rank and offered == loader.next_rank(offered))
        assert (offered is None) == (loader.largest_rank is not None and rank > loader.largest_rank)
