"""What commands print with ``--json`` is what the published schemas say, in every situation."""

from __future__ import annotations

import copy
import json
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Final

import click
import jsonschema
import pytest
from samples import FIXTURES

from loratool.cli.json_schemas import json_schema
from loratool.cli.main import COMMANDS, _run, cli
from loratool.errors import FileFormatError
from loratool.shards.folder import PartsFolder

GOLDENS: Final = Path(__file__).parents[1] / "verbs" / "goldens"
BASE: Final = FIXTURES / "bases" / "llama-untied"
ADAPTERS: Final = FIXTURES / "adapters"
PROMISED: Final = {
    "inspect": "kind path scheme base_model parameters bytes modules extras metadata",
    "model": "kind parameters bytes tensors dtypes shards quantization",
    "validate": "ok findings",
    "verify": "ok findings",
    "schemes": "schemes",
    "compare": "cosine relative_distance modules",
    "compose": "modules relative_error",
    "truncate": "modules relative_error",
    "extract": "modules relative_error",
    "merge": "tensors merged copied added unused bytes_written retention",
}
"""The keys that scripts rely on."""


def with_json() -> Iterator[str]:
    """Yield the commands that print documents."""
    for name in COMMANDS:
        command = cli.get_command(click.Context(cli), name)
        assert command is not None
        if any(param.name == "as_json" for param in command.params):
            yield name


@cache
def validator(command: str) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(json_schema(command))


def check(command: str, document: Any) -> None:
    validator(command).validate(document)


def golden_documents() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for file in sorted(GOLDENS.glob("*.json")):
        golden = json.loads(file.read_text().replace('"<bytes>"', "1"))
        if golden["document"] is None:  # it fails, which is tried below
            continue
        command = golden["command"]
        words = shlex.split(command) if isinstance(command, str) else command
        yield file.stem, next(word for word in words if word in COMMANDS), golden["document"]


@pytest.mark.parametrize("command", list(with_json()))
def test_every_command_publishes_a_sound_schema(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    schema = json_schema(command)
    jsonschema.Draft202012Validator.check_schema(schema)
    assert _run([command, "--json-schema"], debug=False) == 0
    assert json.loads(capsys.readouterr().out) == schema
    assert not re.search(r'"additionalProperties": ?false', json.dumps(schema))


def untold(schema: dict[str, Any], before: str = "") -> Iterator[str]:
    """Yield the keys of a schema that nothing is said about."""
    for key, value in schema.get("properties", {}).items():
        if not value.get("description", "").endswith("."):
            yield before + key
        yield from untold(value, f"{before}{key}.")
    for inside in ("items", "additionalProperties"):
        if isinstance(value := schema.get(inside), dict):
            yield from untold(value, before)
    for each in schema.get("anyOf", ()):
        yield from untold(each, before)


@pytest.mark.parametrize("command", list(with_json()))
def test_every_key_is_explained(command: str) -> None:
    assert not list(untold(json_schema(command)))


@pytest.mark.parametrize(("name", "command", "document"), list(golden_documents()))
def test_goldens_are_what_the_schemas_say(
    name: str, command: str, document: dict[str, Any]
) -> None:
    check(command, document)
    check(command, document | {"some later key": 1})
    with pytest.raises(jsonschema.ValidationError):
        check(command, document | {"schema": 2})
    asked = document["kind"] if document.get("kind") == "model" else command
    promised = set(PROMISED.get(asked, "").split()) & document.keys()
    for key in promised:
        broken = copy.deepcopy(document)
        del broken[key]
        with pytest.raises(jsonschema.ValidationError):
            check(command, broken)


def test_the_promised_keys_are_in_goldens() -> None:
    seen: dict[str, set[str]] = {}
    for _, command, document in golden_documents():
        asked = document["kind"] if document.get("kind") == "model" else command
        seen.setdefault(asked, set()).update(document)
    for command, keys in PROMISED.items():
        assert set(keys.split()) <= seen[command], command


SITUATIONS: Final = [
    *(f"inspect {path}" for path in ("lora-linear", "dora-linear", "loha", "modules-to-save")),
    "inspect lora-linear --spectrum",
    "inspect lora-linear --modules",
    f"inspect {BASE}",
    "inspect lora-linear --hashes",
    "inspect lora-linear dora-linear nothing --duplicates",
    f"inspect {ADAPTERS}",
    "validate lora-linear factor-missing nothing",
    "inspect nothing nowhere",
    f"validate {BASE} nowhere",
    *(f"inspect {path}" for path in sorted(FIXTURES.glob("bases/*"))),
    *(f"inspect {path}" for path in sorted(ADAPTERS.iterdir())),
    *(f"validate {path} --deep" for path in sorted(ADAPTERS.iterdir())),
    f"validate lora-linear --base {BASE} --for vllm",
    "schemes",
    "compare lora-linear dora-linear",
    "compare lora-linear lora-linear rank-alpha-patterns",
    f"merge {BASE} lora-linear -o OUT",
    f"merge {BASE} lora-linear -o OUT --dry-run",
    f"merge {BASE} modules-to-save -o OUT --dtype fp16",
    f"merge {BASE} lora-linear rank-alpha-patterns -w 0.5 -w -1 -o OUT",
    "convert lora-linear --to kohya -o OUT.safetensors",
    "convert lora-linear --to mlx -o OUT --dry-run",
    f"convert dora-linear --to peft --to-lora --base {BASE} --rank 2 -o OUT",
    "compose lora-linear rank-alpha-patterns --method ties -o OUT",
    "compose lora-linear lora-linear -w 1 -w -1 -o OUT",
    "truncate lora-linear --rank 1 -o OUT",
    "truncate rank-alpha-patterns --max-size 3kB -o OUT",
    "truncate rank-alpha-patterns --energy 0.5 -o OUT --dry-run",
    "rescale lora-linear --scale 0 -o OUT",
    "rescale lora-linear --alpha 3 --keep delta -o OUT --dry-run",
    f"extract {BASE} {BASE} --rank 1 -o OUT",
    f"verify {BASE} --base {BASE} --adapter lora-linear",
    "metadata lora-linear",
    f"metadata {BASE}",
    "metadata lora-linear --set a=b -o OUT",
    "metadata lora-linear --set a=b --dry-run",
    "recipe lora-linear",
    "run nothing.toml",
    "batch nothing.jsonl -o OUT",
    f"verify {BASE}",
    # and what fails, in each of the ways there are
    "inspect nothing-there",
    "inspect",
    "inspect lora-linear --threads 0",
    "inspect lora-linear --nonsense",
    "frobnicate",
    f"merge lora-linear {BASE} -o OUT",
    f"merge {BASE} lora-linear -o OUT/in/nothing",
    f"merge {BASE} lora-linear -o {FIXTURES}",
    f"merge {BASE} lora-linear -o OUT -w 1 -w 2",
    "convert lora-linear --to nonsense -o OUT",
    "convert dora-linear --to cloneofsimo -o OUT.safetensors",
    "truncate lora-linear -o OUT",
    "compose factor-missing lora-linear -o OUT",
    "compare lora-linear",
    f"verify nothing --base {BASE} --adapter lora-linear",
]


@pytest.mark.parametrize("line", SITUATIONS)
def test_live_documents_are_what_the_schemas_say(
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(ADAPTERS)
    words = [word.replace("OUT", str(tmp_path / "out")) for word in shlex.split(line)]
    status = _run([*words, "--json"], debug=False)
    said = capsys.readouterr()
    document = json.loads(said.out)  # exactly one
    check(words[0] if words[0] in COMMANDS else "inspect", document)
    assert ("error" in document) == (status == 2), line
    if status == 2:
        error, *hint = said.err.splitlines()
        told = document["error"]
        assert error == f"error: {told['where']}: {told['message']}"
        assert hint == ([f"hint: {told['hint']}"] if told["hint"] else [])
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words",
    [
        ["compare", "lora-linear", "rank-alpha-patterns", "--random"],
        ["compare", "lora-linear", "rank-alpha-patterns", "lora-linear"],
        ["compare", "lora-linear", "--random"],
        ["compare", "experts-gpt-oss", "--layers"],
        ["inspect", "conv", "--spectrum"],
        ["inspect", "dora-linear", "--spectrum"],
    ],
)
def test_what_options_add_is_in_the_schemas(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ADAPTERS)
    assert _run([*words, "--json"], debug=False) == 0
    document = json.loads(capsys.readouterr().out)
    check(words[0], document)
    named = [schema for schema in json_schema(words[0])["anyOf"] if "properties" in schema]
    new = {"advice"} if words[0] == "inspect" else document.keys()
    assert any(new <= schema["properties"].keys() for schema in named)


@pytest.mark.parametrize("verb", ["merge", "verify", "extract"])
def test_shares_and_how_far_they_are_are_what_the_schemas_say(
    verb: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    merging = ["merge", str(BASE), str(ADAPTERS / "lora-linear"), "-o", "merged"]
    output, *words = {
        "merge": ["merged", *merging],
        "verify": [
            "merged",
            "verify",
            "merged",
            "--base",
            str(BASE),
            "--adapter",
            str(ADAPTERS / "lora-linear"),
        ],
        "extract": ["out", "extract", str(BASE), "merged", "-o", "out", "--rank", "2"],
    }[verb]
    if verb != "merge":
        assert _run([*merging, "--quiet"], debug=False) == 0
        capsys.readouterr()

    def said(*line: str, status: int = 0) -> dict[str, Any]:
        assert _run([*line, "--json"], debug=False) == status
        document: dict[str, Any] = json.loads(capsys.readouterr().out)
        check(line[0], document)
        return document

    def only(name: str, document: dict[str, Any]) -> None:
        named = next(s for s in json_schema(verb)["anyOf"] if name in s.get("properties", {}))
        assert document.keys() <= named["properties"].keys()

    share = said(*words, "--shards", "1/2")
    assert (share["shards"], share["left"]) == ("1/2", 1)
    only("shards", share)
    assert said("status", output)["finished"] is False
    assert "error" in said(*words, "--finish", status=2)
    told = said("status", output)
    assert (told["done"], told["waiting"]) == (1, 1)
    assert said(*words, "--shards", "auto")["left"] == 0
    assert said("status", output)["done"] == 2
    assert "shards" not in said(*words, "--finish")
    assert said("status", output)["finished"] is True
    said(*words, "--finish", status=2 if verb == "verify" else 0)


def test_a_part_that_failed_is_told_as_the_schema_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = PartsFolder(tmp_path / "out")
    document = {"plan": 1, "digest": "d", "begun": 0.0, "verb": "merge", "loratool": "1"}
    folder.begin({**document, "parts": [["a", 1], ["b", 2]]})
    error = FileFormatError("base", "is not there", hint="look").as_json()
    folder.write_failure(1, {"error": error, "part": 1, "name": "a", "host": "here"})
    claim = folder.claim(2)
    assert claim is not None
    assert _run(["status", "out", "--json"], debug=False) == 0
    told = json.loads(capsys.readouterr().out)
    check("status", told)
    assert (told["failed"], told["running"]) == (1, 1)
    assert told["parts"][0]["error"] == error
    folder.release(claim)
