"""Recipes: every output carries one, and it makes the same bytes again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Final

import pytest
from click.testing import CliRunner, Result
from samples import FIXTURES

import loratool
from loratool.cli.main import cli
from loratool.errors import (
    AdapterError,
    BaseModelError,
    FileFormatError,
    LoratoolError,
    OptionError,
    UnsupportedError,
)

INPUTS: Final = {
    "base": "bases/llama-untied",
    "one": "adapters/lora-linear",
    "two": "adapters/rank-alpha-patterns",
    "dora": "adapters/dora-linear",
    "loha": "adapters/loha",
    "heads": "adapters/modules-to-save",
}
CASES: Final = {
    "convert": "convert two --to kohya -o OUT.safetensors --family sd1",
    "convert-folder": "convert one --to mlx -o OUT",
    "convert-pickle": "convert one --to prefixed --name mine -o OUT",
    "convert-base": "convert dora --to peft --to-lora --base base --rank 3 --dtype bf16 -o OUT",
    "convert-loader": "convert two --for vllm -o OUT",
    "convert-drop": "convert heads --to module-path --drop lm_head --drop score --skip norm -o OUT",
    "compose": "compose one two -w 0.5 -w -2 -w v_proj=0.25 -o OUT",
    "compose-random": "compose one two --method dare --density 0.25 --seed 7 --rank 2 -o OUT",
    "compose-heads": "compose one heads --extras first -o OUT",
    "truncate": "truncate two --rank 2 --rank-multiple 2 -o OUT",
    "truncate-energy": "truncate two --energy 0.9 --dtype bfloat16 -o OUT",
    "truncate-size": "truncate two --max-size 4KB -o OUT",
    "truncate-loha": "truncate loha --rank 2 -o OUT",
    "rescale": "rescale two --scale 0.5 -w k_proj=2 -o OUT",
    "rescale-alpha": "rescale two --alpha 8 --keep delta -o OUT",
    "rescale-fold": "rescale two --fold -o OUT",
    "extract": "extract base tuned --rank 2 --seed 3 --exclude down_proj -o OUT",
    "extract-auto": "extract base tuned --rank auto --to kohya -o OUT.safetensors",
    "merge": "merge base one two -w 0.5 -w -1 -w down_proj=2 --dtype bfloat16 -o OUT",
    "merge-skip": "merge base heads --skip lm_head --skip score -o OUT",
    "merge-file": "merge file.safetensors one -o OUT.safetensors",
}
"""One of each kind of option, for every verb that writes."""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with inputs, which is the working folder."""
    for name, source in INPUTS.items():
        shutil.copytree(FIXTURES / source, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*words: str, text: str | None = None) -> Result:
    return CliRunner().invoke(cli, list(words), input=text)


def contents(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
    return {str(each.relative_to(path.parent)): each.read_bytes() for each in files}


def prepared(line: str) -> list[str]:
    """Make what a command line reads beside the fixtures, and return its words."""
    if "tuned" in line:
        loratool.merge("base", ["one"], "tuned", dtype="float32")
    if "file.safetensors" in line:
        loratool.merge("base", ["two"], "cut")
        from safetensors.torch import load_file, save_file

        tensors = {
            k: v for file in Path("cut").glob("*.safetensors") for k, v in load_file(file).items()
        }
        save_file(tensors, "file.safetensors", {"format": "pt"})
        shutil.rmtree("cut")
    return line.replace("OUT", "made").split()


@pytest.mark.parametrize("case", CASES)
def test_a_recorded_recipe_makes_the_same_bytes(case: str, here: Path) -> None:
    words = prepared(CASES[case])
    output = here / words[words.index("-o") + 1]
    made = run(*words, "--quiet")
    assert made.exit_code == 0, made.output
    text = run("recipe", str(output))
    assert text.exit_code == 0 and "not found" not in text.output, text.output
    (here / "again").mkdir()
    # In a file of its own, from standard input, and as a function.
    (here / "r.toml").write_text(text.output)
    result = run("run", "r.toml", "--into", "again", "--quiet")
    assert result.exit_code == 0, result.output
    assert contents(here / "again" / output.name) == contents(output)
    result = run("run", "-", "--force", "-q", text=text.output)
    assert result.exit_code == 0, result.output
    assert contents(here / "again" / output.name) == contents(output)


def test_every_verb_that_writes_is_among_the_cases() -> None:
    from loratool.cli.main import COMMANDS

    writing = {
        name
        for name in COMMANDS
        if any(p.name == "output" for p in cli.get_command(None, name).params)  # type: ignore[arg-type, union-attr]
    }
    assert writing - {"metadata", "batch"} == {line.split()[0] for line in CASES.values()}


def test_what_is_recorded_names_arguments_as_the_functions_do() -> None:
    import inspect

    from loratool.plan.recipe_text import ARGUMENTS

    for verb, names in ARGUMENTS.items():
        parameters = list(inspect.signature(getattr(loratool, verb)).parameters)
        assert parameters[: len(names)] == list(names)


def test_a_merge_is_verified_by_what_it_records(here: Path) -> None:
    loratool.merge("base", ["one", "two"], "out", weights=[0.5, "k_proj=2"], dtype="bfloat16")
    assert loratool.verify("out") == ()
    assert run("verify", "out").exit_code == 0
    # Elsewhere, too, and with what has moved named.
    (here / "deep" / "down").mkdir(parents=True)
    shutil.move("one", "deep/down/one")
    assert loratool.verify("out") == ()
    shutil.move("base", here.parent / f"{here.name}-base")
    with pytest.raises(BaseModelError, match="not found") as failure:
        loratool.verify("out")
    assert "--base" in str(failure.value.hint)
    assert loratool.verify("out", base=here.parent / f"{here.name}-base") == ()


def test_another_adapter_of_the_name_is_not_taken(here: Path) -> None:
    loratool.merge("base", ["one"], "out")
    shutil.rmtree("one")
    shutil.copytree("two", "one")
    with pytest.raises(FileFormatError, match="other contents"):
        loratool.verify("out")
    shutil.copytree(FIXTURES / INPUTS["one"], "kept/one")
    assert loratool.verify("out") == ()


def test_a_changed_weight_is_found(here: Path) -> None:
    loratool.merge("base", ["one"], "out")
    shard = next(Path("out").glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert any(finding.is_error for finding in loratool.verify("out"))


def test_what_nobody_recorded_is_said(here: Path) -> None:
    with pytest.raises(UnsupportedError, match="does not say how it was made"):
        loratool.recipe("one")
    with pytest.raises(UnsupportedError, match="does not say") as failure:
        loratool.verify("base")
    assert "--adapter" in str(failure.value.hint)
    loratool.truncate("one", "small", rank=1)
    with pytest.raises(UnsupportedError, match="'truncate', and not merged"):
        loratool.verify("small")


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "[]",
        '{"command": 1, "version": "1", "inputs": [], "options": {}}',
        '{"command": "merge", "version": "1", "inputs": [{}], "options": {}}',
        '{"command": "x", "version": "1", "inputs": [{"name": "x", "sha256": 1}], "options": {}}',
        '{"command": "merge", "version": "1", "inputs": [], "options": []}',
    ],
)
def test_a_damaged_record_is_said(text: str, here: Path) -> None:
    Path("out").mkdir()
    Path("out/loratool.json").write_text(text)
    with pytest.raises(FileFormatError):
        loratool.recipe("out")


@pytest.mark.parametrize("name", ["../two", "/etc", "..", ".", "", "a\0b"])
def test_a_record_leads_nowhere_else(name: str, here: Path) -> None:
    loratool.merge("base", ["one"], "out")
    record = json.loads(Path("out/loratool.json").read_text())
    record["inputs"][1] = {"name": name}
    Path("out/loratool.json").write_text(json.dumps(record))
    assert name in loratool.recipe("out").missing
    with pytest.raises(BaseModelError):
        loratool.verify("out")


def test_hostile_names_are_texts(here: Path) -> None:
    import tomllib

    name = 'x"\n[[step]]\nverb = "\x1b[31m\u202e'
    shutil.copytree("one", name)
    loratool.truncate(name, "out", rank=1)
    found = loratool.recipe("out")
    assert tomllib.loads(found.toml)["step"][0]["adapter"] == name
    assert "\x1b" not in found.toml and "\u202e" not in found.toml
    assert "\x1b" not in Path("out/README.md").read_text()


def test_steps_read_what_earlier_ones_write(here: Path) -> None:
    Path("recipes").mkdir()
    Path("recipes/r.toml").write_text(
        """
        [[step]]
        verb = "compose"
        adapters = ["../one", "../two"]
        weight = [1, 0.5]
        rank = 2
        output = "sum"

        [[step]]
        verb = "merge"
        base = "../base"
        adapters = "./sum"
        output = "merged"

        [[step]]
        command = ["verify", "merged", "--base", "../base", "--adapter", "sum"]
        """
    )
    rehearsed = loratool.run("recipes/r.toml", dry_run=True)
    assert [bool(step.left_out) for step in rehearsed.steps] == [False, True, True]
    assert not Path("recipes/sum").exists()
    report = loratool.run("recipes/r.toml")
    assert [step.status for step in report.steps] == [0, 0, 0]
    assert report.as_json()["steps"][2]["result"]["ok"] is True
    loratool.compose(["one", "two"], "sum", weights=[1, 0.5], rank=2)
    assert contents(here / "sum") == contents(here / "recipes" / "sum")
    Path("x").mkdir()
    loratool.run("recipes/r.toml", into="x")
    assert contents(here / "x" / "merged") == contents(here / "recipes" / "merged")
    result = run("run", "recipes/r.toml")
    assert isinstance(result.exception, LoratoolError)
    assert "step 1 (compose)" in str(result.exception) and "exists" in str(result.exception)


def test_what_a_step_finds_ends_the_run(here: Path) -> None:
    loratool.merge("base", ["one"], "out")
    Path("r.toml").write_text(
        '[[step]]\nverb = "verify"\nmerged = "out"\nbase = "base"\nadapter = "two"\n'
        '[[step]]\nverb = "inspect"\npath = "one"\n'
    )
    report = loratool.run("r.toml")
    assert report.status == 1 and len(report.steps) == 1
    assert report.as_json()["steps"][0]["result"]["ok"] is False


BAD: Final = {
    "": "has no steps",
    "x = 1": "belongs to no step",
    "schema = 2": "schema 2",
    "[[step]]\nrank = 1": "lacks 'verb'",
    '[[step]]\nverb = "marge"': "did you mean 'merge'",
    '\n\n[[step]]\nverb = "truncate"\nadapter = "one"\nrnk = 1\noutput = "o"': (
        "line 3, step 1 .truncate.: there is no option 'rnk'; did you mean 'rank'"
    ),
    '[[step]]\nverb = "truncate"\nadapter = "one"\nrank = "x"\noutput = "o"': "--rank",
    '[[step]]\nverb = "truncate"\nadapter = "one"\nrank = [1]\noutput = "o"': "expected one value",
    '[[step]]\nverb = "truncate"\nadapter = "one"\nrank = true\noutput = "o"': "expected one value",
    '[[step]]\nverb = "rescale"\nadapter = "one"\nfold = "yes"\noutput = "o"': "true or false",
    '[[step]]\nverb = "merge"\nbase = "base"\nadapters = [["one"]]\noutput = "o"': "list of values",
    '[[step]]\nverb = "truncate"\nadapter = "one"\nrank = 1': "lacks 'output'",
    '[[step]]\nverb = "convert"\nadapter = "one"\nto = "pfet"\noutput = "o"': "pfet",
    '[[step]]\nverb = "truncate"\nadapter = "one"\nrank = 1\n"rank" = 2': "not valid TOML",
    '[[step]]\nverb = "merge"\nbase = "base"\nadapters = "one"\nw = 1\nweights = 2\noutput = "o"': (
        "are one option"
    ),
    '[[step]]\ncommand = "inspect one"': "list of words",
    '[[step]]\ncommand = ["inspect", "one", "--spectra"]': "--spectra",
    '[[step]]\ncommand = ["inspect"]\nverb = "inspect"': "one of the two says all",
    '[[step]]\nverb = "inspect"\npath = "one"\npath_sha256 = "ab"': "SHA-256",
    f'[[step]]\nverb = "inspect"\npath = "one"\nbase_sha256 = "{"0" * 64}"': "1 digests of 'base'",
    '[[step]]\nverb = "truncate"\nadapter = "one"\nrank = 1\noutput = "o"\n' * 2: "earlier step",
    "a = [": "not valid TOML",
}


@pytest.mark.parametrize("text", BAD)
def test_a_recipe_that_is_none_is_said_before_anything_is_done(text: str, here: Path) -> None:
    before = set(here.iterdir())
    Path("r.toml").write_text(text)
    with pytest.raises((OptionError, FileFormatError), match=BAD[text]):
        loratool.run("r.toml")
    assert set(here.iterdir()) - before == {here / "r.toml"}


def test_another_input_than_the_recipe_was_made_with_is_refused(here: Path) -> None:
    loratool.merge("base", ["one"], "out")
    text = loratool.recipe("out").toml
    Path("r.toml").write_text(text)
    shutil.rmtree("one")
    shutil.copytree("two", "one")
    with pytest.raises(AdapterError, match=r"step 1 \(merge\).*SHA-256"):
        loratool.run("r.toml", force=True)
    shutil.rmtree("one")
    shutil.copytree(FIXTURES / INPUTS["one"], "one")
    shutil.rmtree("base")
    shutil.copytree(FIXTURES / "bases/llama-tied", "base")
    with pytest.raises(BaseModelError, match="headers"):
        loratool.run("r.toml", force=True)


def test_a_recipe_without_tables_is_one_step(here: Path) -> None:
    Path("r.toml").write_text('verb = "inspect"\npath = "one"\nspectrum = true\n')
    (step,) = loratool.run("r.toml").steps
    assert step.document["kind"] == "adapter" and step.document["modules"][0]["singular_values"]
    assert step.words[0] == "inspect" and step.words[-2:] == ("--", "one")


def test_documents_are_what_the_schemas_say(here: Path) -> None:
    import jsonschema

    from loratool.cli.json_schemas import json_schema

    loratool.merge("base", ["one"], "out")
    jsonschema.validate(loratool.recipe("out").as_json(), json_schema("recipe"))
    Path("r.toml").write_text(loratool.recipe("out").toml)
    Path("again").mkdir()
    for options in ({"dry_run": True}, {}):
        report = loratool.run("r.toml", into="again", **options)  # type: ignore[arg-type]
        jsonschema.validate(report.as_json(), json_schema("run"))
        jsonschema.validate(report.steps[0].document, json_schema("merge"))
    jobs = [{"verb": "inspect", "path": path} for path in ("one", "nothing")]
    jsonschema.validate(loratool.batch(jobs).as_json(), json_schema("batch"))


def test_inputs_from_the_hub_are_found_again_by_their_commit(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hub_cache import COMMIT, in_cache

    monkeypatch.setenv("HF_HUB_CACHE", str(here / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    in_cache(here / "cache", "some/base", here / "base")
    in_cache(here / "cache", "some/style", here / "one")
    loratool.merge("some/base", ["some/style", "two"], "out")
    for name in ("base", "one"):
        shutil.rmtree(here / name)
    found = loratool.recipe("out")
    assert found.missing == () and found.step["base"] == f"some/base@{COMMIT}"
    assert loratool.verify("out") == ()
    (here / "deep").mkdir()
    (here / "deep" / "r.toml").write_text(found.toml.replace('"two"', '"../two"'))
    loratool.run("deep/r.toml")
    assert contents(here / "deep" / "out") == contents(here / "out")


OUTSIDE: Final = {
    "above": 'verb = "rescale"\nadapter = "one"\nscale = 2\noutput = "../out"',
    "through": 'verb = "rescale"\nadapter = "one"\nscale = 2\noutput = "x/../../out"',
    "absolute": 'verb = "rescale"\nadapter = "one"\nscale = 2\noutput = "ELSEWHERE/out"',
    "link": 'verb = "rescale"\nadapter = "one"\nscale = 2\noutput = "link/out"',
    "parent": 'verb = "rescale"\nadapter = "one"\nscale = 2\noutput = ".."\nforce = true',
    "picture": 'command = ["inspect", "one", "--plot", "../out.svg"]',
    "page": 'verb = "inspect"\npaths = ["one"]\nreport = "ELSEWHERE/out.html"',
    "in place": 'verb = "metadata"\npath = "../other"\nset = ["a=b"]\nin_place = true',
    "into": 'verb = "run"\nrecipe = "inner.toml"\ninto = "ELSEWHERE"',
    "jobs": 'verb = "batch"\njobs = "jobs.jsonl"',
    "flag": 'verb = "run"\nrecipe = "inner.toml"\noutside = true',
    "word": 'command = ["run", "inner.toml", "--outsi"]',
}


@pytest.mark.parametrize("case", OUTSIDE)
def test_a_recipe_writes_in_its_own_folder(case: str, here: Path) -> None:
    recipes = here / "recipes"
    recipes.mkdir()
    shutil.copytree("one", recipes / "one")
    shutil.copytree("one", "other")
    (recipes / "link").symlink_to(here)
    (recipes / "inner.toml").write_text('verb = "inspect"\npaths = ["one"]\n')
    (recipes / "jobs.jsonl").write_text('{"command": ["inspect", "one"]}\n')
    safe = '[[step]]\nverb = "rescale"\nadapter = "one"\nscale = 2\noutput = "fine"\n'
    step = OUTSIDE[case].replace("ELSEWHERE", str(here))
    (recipes / "it.toml").write_text(f"{safe}[[step]]\n{step}\n")
    before = sorted(map(str, here.rglob("*")))
    for words in ([], ["--dry-run"]):
        done = run("run", str(recipes / "it.toml"), *words)
        assert isinstance(done.exception, LoratoolError), done.output
        assert "step 2" in str(done.exception)
    assert sorted(map(str, here.rglob("*"))) == before
    if case not in ("parent", "through", "flag", "word"):
        assert run("run", str(recipes / "it.toml"), "--outside").exit_code == 0


def test_outputs_below_the_folder_or_into_are_written(here: Path) -> None:
    (here / "recipes").mkdir()
    step = '[[step]]\nverb = "rescale"\nadapter = "../one"\nscale = 2\noutput = '
    Path("recipes/it.toml").write_text(f'{step}"out"\n{step}"{here}/recipes/absolute"\n')
    assert run("run", "recipes/it.toml").exit_code == 0
    assert Path("recipes/out").is_dir() and Path("recipes/absolute").is_dir()
    Path("recipes/it.toml").write_text(f'{step}"deep/er/out"\n')
    done = run("run", "recipes/it.toml", "--into", "new/folder", "--dry-run")
    assert done.exit_code == 0 and "is to be made first" in done.output, done.output
    assert not Path("new").exists()
    assert run("run", "recipes/it.toml", "--into", "new/folder").exit_code == 0
    assert Path("new/folder/deep/er/out").is_dir()


def test_values_of_metadata_are_read_once_and_from_beside_the_recipe(here: Path) -> None:
    (here / "recipes").mkdir()
    Path("recipes/note").write_text("beside")
    Path("note").write_text("elsewhere")
    Path("recipes/it.toml").write_text(
        'verb = "metadata"\npath = "../one"\nset = ["a=@note", "b=-", "c=@@x"]\noutput = "out"\n'
    )
    done = run("run", "recipes/it.toml", text="piped")
    assert done.exit_code == 0, done.output
    (file,) = loratool.metadata("recipes/out").files
    assert {key: file.metadata[key] for key in "abc"} == {"a": "beside", "b": "piped", "c": "@x"}


@pytest.mark.parametrize(
    ("path", "kind", "match"),
    [
        ("on", FileNotFoundError, "no such file or folder"),
        ("nothing/at/all", FileNotFoundError, "no such file or folder"),
        ("parent", AdapterError, "one in the folder 'one'"),
        ("one", UnsupportedError, "does not say how it was made"),
        ("base", UnsupportedError, "does not say how it was made"),
    ],
)
def test_a_recipe_of_what_is_none(path: str, kind: type[Exception], match: str, here: Path) -> None:
    Path("parent").mkdir()
    shutil.copytree("one", "parent/one")
    with pytest.raises(kind, match=match):
        loratool.recipe(path)
    if kind is FileNotFoundError:
        for call in (loratool.run, loratool.verify, loratool.batch):
            with pytest.raises(FileNotFoundError):
                call(path)


def test_formats_without_metadata_say_where_a_recipe_would_be(here: Path) -> None:
    loratool.convert("one", "loralib", "out.pt", to_lora=True)
    with pytest.raises(UnsupportedError) as caught:
        loratool.recipe("out.pt")
    assert caught.value.hint is not None and ".safetensors" in caught.value.hint
