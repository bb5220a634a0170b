"""Plug-ins of every kind are found alike: from a folder, from a wheel, from a zip archive."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from fakes.finding import FAKES
from samples import FIXTURES, ROOT

import loratool
from loratool import variants
from loratool.base import layouts
from loratool.codecs import codec
from loratool.discovery import PLUGINS, Plugins
from loratool.errors import PluginError
from loratool.files import containers
from loratool.loaders import FILES as LOADERS
from loratool.names import families

KINDS = {
    "codecs": (codec.FILES, "blocked"),
    "containers": (containers.FILES, "fake"),
    "families": (families.FILES, "braid"),
    "layouts": (layouts.FILES, "trifold"),
    "loaders": (LOADERS, "picky"),
    "variants": (variants.FILES, "mirror"),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


@each_kind
def test_a_file_is_known_once_its_folder_is_named(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugins, fake = KINDS[kind]
    monkeypatch.delenv(PLUGINS, raising=False)
    before = plugins.names()
    assert fake not in before and list(before) == sorted(before)
    with pytest.raises(KeyError):
        plugins.load(fake)
    monkeypatch.setenv(PLUGINS, os.pathsep.join((str(FAKES), "/nowhere")))
    assert set(plugins.names()) == {*before, fake}
    assert plugins.load(fake) is not None
    monkeypatch.delenv(PLUGINS)
    assert plugins.names() == before


@each_kind
def test_plugins_import_none_of_their_kind(kind: str) -> None:
    plugins, _ = KINDS[kind]
    claimed = plugins.claims() or plugins.names()
    package = sys.modules[plugins.package]
    for name in claimed:
        text = Path(package.__path__[0], f"{name}.py").read_text()
        imported = {
            node.module for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)
        }
        assert not imported & {f"{plugins.package}.{other}" for other in claimed}, name


def made(folder: Path, text: str, name: str = "x") -> None:
    (folder / "codecs").mkdir(exist_ok=True)
    (folder / "codecs" / f"{name}.py").write_text(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('CLAIM = {"suffixes": [".x"]}\n', "no plug-in with CODEC"),
        ('CLAIM = {"suffixes": [".x"]}\nCODEC = (\n', "no plug-in"),
        ('CLAIM = {"suffixes": [open]}\n', "no literal"),
        ('CLAIM = dict(suffixes=[".x"])\n', "no literal"),
    ],
)
def test_a_broken_one_is_refused_by_name(
    text: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(tmp_path, text, f"broken_{abs(hash(text))}")
    monkeypatch.setenv(PLUGINS, str(tmp_path))
    with pytest.raises(PluginError, match=words):
        [codec.FILES.load(name) for name in codec.FILES.claims()]


def test_two_of_one_name_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(tmp_path, "", "fp8_block")
    monkeypatch.setenv(PLUGINS, str(tmp_path))
    with pytest.raises(PluginError, match="second plug-in 'fp8_block'"):
        codec.FILES.names()


def test_folders_may_be_named_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        made(tmp_path / name, f'CLAIM = {{}}\nCODEC = "{name}"\n', f"of_the_{name}")
    for name in ("first", "second", "first"):
        monkeypatch.setenv(PLUGINS, str(tmp_path / name))
        assert f"of_the_{name}" in codec.FILES.names()
    assert codec.FILES.load("of_the_first") == "first"
    monkeypatch.setenv(PLUGINS, str(tmp_path / "second"))
    assert "of_the_second" in codec.FILES.claims()
    with pytest.raises(KeyError):
        codec.FILES.load("of_the_first")


def test_a_claim_is_read_without_an_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = 'CLAIM: Final = {\n    "own": [".x"],\n}\nOTHER = {"a": 1}\nraise SystemExit\n'
    made(tmp_path, text, "loud")
    monkeypatch.setenv(PLUGINS, str(tmp_path))
    assert codec.FILES.claims()["loud"] == {"own": [".x"]}
    assert codec.FILES.claimed("own")[".x"] == "loud"
    assert Plugins("loratool.codecs", "CODEC").names() == codec.FILES.names()


@pytest.mark.slow
def test_the_package_works_from_a_zip_archive(tmp_path: Path) -> None:
    """With plug-ins of others in another one."""
    package = Path(loratool.__file__).parent
    for archive, root in (("loratool.zip", package.parent), ("fakes.zip", FAKES)):
        with zipfile.ZipFile(tmp_path / archive, "w") as target:
            for path in sorted((package if root != FAKES else root).rglob("*.py")):
                target.write(path, path.relative_to(root))
    environment = {
        **os.environ,
        "PYTHONPATH": str(tmp_path / "loratool.zip"),
        PLUGINS: str(tmp_path / "fakes.zip"),
    }
    adapter = FIXTURES / "adapters" / "lora-linear"
    code = f"""
import json, loratool, sys
from loratool.loaders import loader_names
from loratool.names.families import known_families
adapter = {str(adapter)!r}
loratool.convert(adapter, "kohya", "k.fake")
loratool.merge({str(FIXTURES / "bases" / "llama-untied")!r}, [adapter], "merged")
print(json.dumps([
    loratool.__file__,
    loratool.inspect(adapter).as_json(),
    loratool.inspect("k.fake").adapter.scheme,
    loader_names(),
    known_families(),
]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    origin, document, scheme, loaders, names = json.loads(done.stdout)
    assert ".zip" in origin and str(ROOT) not in origin
    assert document == json.loads(json.dumps(loratool.inspect(adapter).as_json()))
    assert scheme == "kohya" and "picky" in loaders and {"braid", "flux"} <= set(names)
    line = [sys.executable, "-m", "loratool", "inspect", str(adapter), "--json"]
    shown = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, check=True)
    assert json.loads(shown.stdout) == document
