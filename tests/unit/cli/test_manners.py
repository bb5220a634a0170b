"""What is the same on every command: help in groups, ``-q``, names listed and completed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator

import click
import pytest
from click.shell_completion import ShellComplete
from samples import FIXTURES

from loratool.cli.help import GROUPS, GroupedCommand, choices_of, group_of, summary_of
from loratool.cli.main import COMMANDS, _run, cli
from loratool.errors import LoratoolError

ADAPTER = str(FIXTURES / "adapters" / "lora-linear")
BASE = str(FIXTURES / "bases" / "llama-untied")


def command_named(name: str) -> click.Command:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    return command


def options() -> Iterator[tuple[str, click.Option]]:
    for name in COMMANDS:
        for param in command_named(name).params:
            if isinstance(param, click.Option):
                yield name, param


def help_at(name: str, width: int) -> str:
    command = command_named(name)
    parent = click.Context(cli, info_name="loratool")
    context = click.Context(command, info_name=name, parent=parent, terminal_width=width)
    context.help_option_names = ["-h", "--help"]  # which click keeps from the first time on
    return command.get_help(context)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_in_groups_and_fits(name: str) -> None:
    assert isinstance(command_named(name), GroupedCommand)
    for width in (58, 78, 118):
        lines = help_at(name, width).splitlines()
        titles = [line[:-1] for line in lines if re.fullmatch(r"\w[\w ]*:", line)]
        assert [title for title in titles if title in GROUPS] == [t for t in GROUPS if t in titles]
        example = lines.index("  Example:")
        for place, line in enumerate(lines):
            is_example = place > example and line.startswith("      ")
            assert is_example or len(line) <= max(width, 60) or " " not in line.strip(), line
        assert "…" not in "".join(lines[: lines.index("")])


def test_the_list_of_commands_is_whole_at_any_width() -> None:
    for width in (58, 78, 118):
        context = click.Context(cli, info_name="loratool", terminal_width=width)
        context.help_option_names = ["-h", "--help"]
        shown = " ".join(cli.get_help(context).split())
        for name in COMMANDS:
            text = command_named(name).help or ""
            sentence = " ".join(text.partition("\n\n")[0].split())
            assert f"{name} {sentence}" in shown
        assert "..." not in shown.partition("Commands:")[2]


def test_the_summary_is_read_without_importing() -> None:
    body = '    """Do\n    this. And that.\n\n    More.\n    """\n'
    source = f"x\ndef command(\n    a: int,\n) -> None:\n{body}"
    assert summary_of(source) == "Do this."
    assert summary_of("nothing") == ""


def test_every_choice_is_in_the_help_and_is_completed() -> None:
    seen = 0
    for name, option in options():
        for choice in choices_of(option):
            seen += 1
            assert re.search(rf"[\s\[|,:]{re.escape(choice)}[\s\]|,.]", help_at(name, 78)), choice
        if choices_of(option):
            flag = max(option.opts, key=len)
            found = ShellComplete(cli, {}, "loratool", "X").get_completions([name, flag], "")
            assert [item.value for item in found] == list(choices_of(option)), (name, flag)
    assert seen > 200


def test_every_option_has_a_place_and_words() -> None:
    for name, option in options():
        assert group_of(option) in GROUPS
        assert option.help and option.help.endswith("."), (name, option.name)


def test_quiet_is_the_same_everywhere() -> None:
    texts = {}
    for name, option in options():
        if option.name == "quiet":
            texts[name] = (tuple(option.opts), option.help)
    assert len(set(texts.values())) == 1
    assert set(COMMANDS) - set(texts) <= {"completion"}


@pytest.mark.parametrize(
    ("line", "speaks"),
    [
        (f"inspect {ADAPTER}", True),
        (f"inspect {BASE}", True),
        (f"validate {ADAPTER}", False),
        (f"validate {FIXTURES / 'adapters' / 'factor-missing'}", True),
        (f"compare {ADAPTER} {ADAPTER}", True),
        ("schemes", True),
        (f"truncate {ADAPTER} --rank 1 -o OUT", False),
        (f"truncate {ADAPTER} --rank 1 -o OUT --dry-run", True),
        (f"truncate {ADAPTER} --rank 1 -o OUT --json", True),
        (f"rescale {ADAPTER} --scale 2 -o OUT", False),
        (f"compose {ADAPTER} -o OUT", False),
        (f"convert {ADAPTER} --to mlx -o OUT", False),
        (f"merge {BASE} {ADAPTER} -o OUT", False),
        (f"merge {BASE} {ADAPTER} -o OUT --dry-run", True),
    ],
)
def test_quiet_leaves_what_was_asked_for(
    line: str,
    speaks: bool,
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = line.replace("OUT", str(tmp_path_factory.mktemp("quiet") / "out")).split()
    status = _run([*words, "-q"], debug=False)
    assert status in (0, 1)
    assert bool(capsys.readouterr().out) == speaks


def test_the_version_says_what_a_report_of_a_bug_needs() -> None:
    code = (
        "import sys; from loratool.cli.main import _run\n"
        "_run(['--version', '--verbose'], debug=False)\n"
        "print({'torch'} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"HF_TOKEN": "hf_secret"},
    )
    assert done.stderr.strip() == "set()"
    names = [line.partition(":")[0] for line in done.stdout.splitlines()[1:]]
    assert {"Python", "platform", "numpy", "torch", "GPU", "click"} <= set(names)
    assert "BLAS: " in done.stdout
    assert "hf_secret" not in done.stdout
    values = [re.split(r": +", line)[1] for line in done.stdout.splitlines()[1:]]
    assert all(values)


def test_verbose_alone_is_told_to_go_with_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(["--version"], debug=False) == 0
    assert capsys.readouterr().out.count("\n") == 1


def test_errors_of_click_name_the_command() -> None:
    with pytest.raises(click.UsageError) as caught:
        cli.main(["merge", "a", "b", "-o"], prog_name="loratool", standalone_mode=False)
    assert caught.value.ctx is not None
    assert caught.value.ctx.command_path == "loratool merge"
    with pytest.raises((LoratoolError, click.UsageError)):
        cli.main(["merge", "a", "b", "-o", ""], prog_name="loratool", standalone_mode=False)


def test_extras_are_named_without_their_versions(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = ["click<9,>=8", "a-b<2,>=1.6; extra == 'x'", "c.d[e]>=2 ; extra == 'x'"]
    monkeypatch.setattr("importlib.metadata.requires", lambda _: wanted)
    assert _run(["--version", "--verbose"], debug=False) == 0
    assert "a-b not installed, c.d not installed\n" in capsys.readouterr().out
