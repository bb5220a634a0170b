"""What people get wrong, on every command: one line that says what it is, and a hint that works."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from safetensors.torch import load_file, save_file
from samples import FIXTURES

import loratool
from loratool.cli.main import COMMANDS, _run
from loratool.cli.synonyms import COMMAND_SYNONYMS, OPTION_SYNONYMS, SCHEME_SYNONYMS
from loratool.errors import OptionError, OutputError

Capture = pytest.CaptureFixture[str]
READS_ADAPTERS: Final = {
    "validate": "validate {}",
    "convert": "convert {} --to kohya -o OUT.safetensors",
    "compare": "compare {} {}",
    "compose": "compose {} adapter -o OUT",
    "rescale": "rescale {} --scale 2 -o OUT",
    "truncate": "truncate {} --rank 1 -o OUT",
    "merge": "merge base {} -o OUT",
    "verify": "verify base --base base --adapter {}",
}
"""Each command, with the place of an adapter."""
READS_MODELS: Final = {
    "merge": "merge {} adapter -o OUT",
    "extract": "extract {} base --rank 1 -o OUT",
    "extract the other": "extract base {} --rank 1 -o OUT",
    "verify": "verify base --base {} --adapter adapter",
    "validate": "validate adapter --base {}",
    "convert": "convert adapter --to kohya --base {} -o OUT.safetensors",
    "compose": "compose adapter adapter --base {} -o OUT",
    "truncate": "truncate adapter --max-size 3kB --base {} -o OUT",
}
"""Each command, with the place of a model."""
READS_ANYTHING: Final = {"inspect": "inspect {}", **READS_ADAPTERS, **READS_MODELS}
WRITES: Final = {
    "convert": "convert adapter --to peft -o {}",
    "compose": "compose adapter adapter -o {}",
    "rescale": "rescale adapter --scale 2 -o {}",
    "truncate": "truncate adapter --rank 1 -o {}",
    "merge": "merge base adapter -o {}",
    "extract": "extract base tuned --rank 1 -o {}",
    "metadata": "metadata adapter --set a=b -o {}",
}


@dataclass(frozen=True)
class Said:
    """What a command said."""

    status: int
    out: str
    err: str

    @property
    def error(self) -> str:
        return self.err.splitlines()[0].removeprefix("error: ")

    @property
    def hint(self) -> str:
        lines = self.err.splitlines()
        assert len(lines) == 2, self.err
        assert lines[1].startswith("hint: ")
        return lines[1].removeprefix("hint: ")


class Folder:
    """A folder with an adapter, its base and a merged model, and commands that run there."""

    def __init__(self, path: Path, capsys: Capture) -> None:
        self.path, self.capsys = path, capsys

    def run(self, line: str | Sequence[str]) -> Said:
        words = shlex.split(line) if isinstance(line, str) else list(line)
        self.capsys.readouterr()
        status = _run([word.replace("OUT", "out") for word in words], debug=False)
        said = self.capsys.readouterr()
        return Said(status, said.out, said.err)

    def refused(self, line: str | Sequence[str]) -> Said:
        """Run what is wrong: one error line, exit status 2, nothing on stdout, nothing written."""
        before = sorted(self.path.rglob("*"))
        said = self.run(line)
        assert said.status == 2, said
        assert said.out == ""
        first, *rest = said.err.splitlines()
        assert first.startswith("error: ")
        assert len(rest) <= 1
        assert "(a bug)" not in said.err
        assert sorted(self.path.rglob("*")) == before
        return said


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> Folder:
    shutil.copytree(FIXTURES / "adapters" / "lora-linear", tmp_path / "adapter")
    shutil.copytree(FIXTURES / "bases" / "llama-untied", tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    loratool.merge("base", "adapter", "tuned")
    loratool.convert("adapter", "kohya", "kohya.safetensors")
    weights = {k: v for f in Path("base").glob("*.safetensors") for k, v in load_file(f).items()}
    save_file(weights, "model.safetensors")
    return Folder(tmp_path, capsys)


@pytest.mark.parametrize("command", READS_ANYTHING)
def test_the_nearest_name_of_a_path(command: str, folder: Folder) -> None:
    line = READS_ANYTHING[command]
    said = folder.refused(line.format("adaptr", "adapter"))
    assert said.error == "adaptr: no such file or folder"
    assert said.hint == "did you mean adapter?"
    assert folder.refused(line.format("/nothing/like/it", "adapter")).err.count("\n") == 1
    said = folder.refused(line.format("ADAPTER/adapter_model.safetensor", "adapter"))
    assert said.hint == "did you mean adapter/adapter_model.safetensors?"


@pytest.mark.parametrize("command", READS_ADAPTERS)
@pytest.mark.parametrize("model", ["base", "model.safetensors", "base/config.json"])
def test_a_model_where_an_adapter_is_meant(command: str, model: str, folder: Folder) -> None:
    line = READS_ADAPTERS[command].format(model, "adapter")
    if command == "validate":  # what it is asked for is a finding
        said = folder.run(line)
        assert (said.status, said.err) == (1, "")
        assert model.endswith("json") or "is a model, not an adapter" in said.out
        return
    said = folder.refused(line)
    if not model.endswith("json"):
        assert said.error.startswith(f"{model}: is a model, not an adapter")
        assert "loratool extract BASE FINETUNED" in said.hint
        assert folder.run("extract base tuned --rank 16 -o OUT").status == 0


@pytest.mark.parametrize("command", READS_MODELS)
@pytest.mark.parametrize("adapter", ["adapter", "kohya.safetensors"])
def test_an_adapter_where_a_model_is_meant(command: str, adapter: str, folder: Folder) -> None:
    if adapter == "kohya.safetensors" and command in ("convert", "compose"):
        return  # whose names alone are looked at
    said = folder.refused(READS_MODELS[command].format(adapter))
    assert said.error == f"{adapter}: is an adapter, not a model"
    assert said.hint.startswith("give the model that it was trained on")
    assert said.hint.endswith("a BASE comes before the adapters")


@pytest.mark.parametrize("command", READS_ADAPTERS)
def test_an_adapter_in_a_parent_folder(command: str, folder: Folder) -> None:
    shutil.copytree("adapter", "parent/one")
    line = READS_ADAPTERS[command]
    if command in ("validate", "compare"):  # which look at every adapter of a folder
        assert folder.run(line.format("parent", "adapter")).status == 0
        return
    said = folder.refused(line.format("parent", "adapter"))
    assert said.error == "parent: holds no adapter itself, and one in the folder 'one' in it"
    assert said.hint == "name that: parent/one"
    shutil.move("parent", "above")
    Path("parent").mkdir()
    shutil.move("above", "parent/checkpoint 1")
    said = folder.refused(line.format("parent", "adapter"))
    assert shlex.split(said.hint.removeprefix("name that: ")) == ["parent/checkpoint 1/one"]
    shutil.copytree("adapter", "parent/two")
    shutil.copytree("adapter", "parent/three")
    said = folder.refused(line.format("parent", "adapter"))
    assert said.error == "parent: holds several adapters, each in a folder: three, two"
    assert said.hint == "name one, such as parent/three"
    followed = folder.run(line.format("parent/three", "adapter"))
    assert followed.status in (0, 1) and "error:" not in followed.err


@pytest.mark.parametrize("command", ["inspect", *READS_ADAPTERS])
def test_a_name_where_an_adapter_has_none(command: str, folder: Folder) -> None:
    """``--adapter-name`` chooses among several, and says where there is nothing to choose."""
    line = READS_ADAPTERS.get(command, "inspect {}") + " --adapter-name {}"
    count = line.count("{}") - 1
    said = folder.run(line.format(*["adapter"] * count, "mine"))
    assert said.status in (0, 1), said
    is_told = "--adapter-name 'mine' chose nothing" in said.out + said.err
    assert is_told or command == "verify"  # which says what is wrong, and nothing else
    for name in ("default", "adapter"):
        said = folder.run(line.format(*["adapter"] * count, name).replace("OUT", f"to-{name}"))
        assert "chose nothing" not in said.out + said.err
    shutil.copytree("adapter", "adapter/style")
    said = folder.run(line.format(*["adapter"] * count, "stlye").replace("OUT", "no"))
    assert said.status != 0 and not Path("no").exists() and not Path("no.safetensors").exists()
    assert "no adapter 'stlye': it holds default, style" in said.out + said.err
    assert "did you mean --adapter-name style?" in said.out + said.err
    assert "chose" not in folder.run("inspect adapter --adapter-name style").err


def test_a_name_of_the_output_chooses_nothing_and_is_no_mistake(folder: Folder) -> None:
    said = folder.run("convert adapter --to prefixed --adapter-name mine -o OUT.pt")
    assert said.status == 0 and "chose nothing" not in said.out + said.err
    assert loratool.open_adapter("out.pt", adapter_name="mine").name == "mine"


@pytest.mark.parametrize("command", ["merge base adapter", "compose adapter", "rescale adapter"])
def test_weights_that_are_none(command: str, folder: Folder) -> None:
    for given, meant in (("0.8,0.6", "-w 0.8 -w 0.6"), ("te1=1;unet=2", "-w te1=1 -w unet=2")):
        said = folder.refused(f"{command} -o OUT -w '{given}'")
        assert said.hint == f"give -w for each: {meant}"
    assert folder.refused(f"{command} -o OUT -w q_proj:0.5").hint == "did you mean -w q_proj=0.5?"
    assert folder.run(f"{command} -o OUT -w q_proj=0.5").status == 0
    said = folder.refused(f"{command} -o OUT2 -w 1 -w 2")
    assert said.error == "-w: 2 weights for 1 adapter"
    assert folder.refused(f"{command} -o OUT2 -w strong").hint.startswith("such as -w 0.8")


def test_weights_without_their_option(folder: Folder) -> None:
    said = folder.refused("merge base adapter adapter -w 0.8 0.6 -o OUT")
    assert said.hint == "is it a weight? Give -w before each: -w 0.6"
    assert folder.run("merge base adapter adapter -w 0.8 -w 0.6 -o OUT").status == 0


@pytest.mark.parametrize("word", COMMAND_SYNONYMS)
def test_other_names_of_commands_lead_to_the_command(word: str, folder: Folder) -> None:
    meant = COMMAND_SYNONYMS[word]
    said = folder.refused([word, "adapter"])
    if meant in COMMANDS:
        assert said.error == f"loratool: no such command '{word}'; it is called '{meant}' here"
        assert said.hint == f"loratool {meant} --help"
        assert folder.run(said.hint.removeprefix("loratool ")).status == 0


def test_misspelled_commands_and_help(folder: Folder) -> None:
    said = folder.refused("trunkate adapter")
    assert (said.error, said.hint) == (
        "loratool: no such command 'trunkate'; did you mean 'truncate'?",
        "loratool truncate --help",
    )
    assert folder.refused("help").hint == "loratool --help"
    assert folder.refused("help merge").hint == "loratool merge --help"
    assert folder.refused("xyzzy").hint == "loratool --help"


def test_other_names_of_options_lead_to_the_option(folder: Folder) -> None:
    pairs = {
        ("merge base adapter", "--scale 2"): "--weight",
        ("merge base adapter", "--output-dir x"): "--output",
        ("merge base adapter", "--output_dir x"): "--output",
        ("merge base adapter", "--adapter_name x"): "--adapter-name",
        ("convert adapter", "--format kohya"): "--to",
        ("truncate adapter", "--new-rank 4"): "--rank",
        ("truncate adapter", "--rnak 4"): "--rank",
        ("validate adapter", "--model base"): "--base",
        ("rescale adapter", "--ratio 3"): "--weight",
    }
    for (line, given), meant in pairs.items():
        said = folder.refused(f"{line} {given}")
        assert f"; did you mean {meant}" in said.error, said
    assert all(name.startswith("--") for names in OPTION_SYNONYMS.values() for name in names)


def test_other_names_of_schemes_lead_to_the_scheme(folder: Folder) -> None:
    names = {scheme.name for scheme in loratool.schemes()}
    for given, meant in SCHEME_SYNONYMS.items():
        assert meant in names
        said = folder.refused(f"convert adapter --to {given} -o OUT")
        assert (said.error, said.hint) == (
            f"--to: '{given}' is called {meant} here",
            f"--to {meant}",
        )
    assert folder.refused("convert adapter --to khoya -o OUT").hint == "did you mean --to kohya?"
    assert folder.refused("convert adapter --from pft --to kohya -o O").hint.endswith("peft?")
    said = folder.refused("convert adapter --to kohya --family sdx -o OUT")
    assert said.hint == "did you mean --family sdxl?"
    said = folder.refused("convert adapter --to kohya --component text_encoder2 -o OUT")
    assert said.hint == "did you mean --component text_encoder_2?"
    assert folder.refused("validate adapter --for vlm").hint == "did you mean --for vllm?"
    assert folder.refused("merge base adapter -o O --device gpu").hint == "--device cuda"
    assert folder.refused("merge base adapter -o O --dtype half").hint == "--dtype float16"
    assert folder.refused("merge base adapter -o O --quantized kep").hint.endswith("keep?")


def test_numbers_that_are_none(folder: Folder) -> None:
    assert "not a valid whole number" in folder.refused("truncate adapter --rank 8.5 -o O").error
    said = folder.refused("truncate adapter -o OUT")
    assert said.hint == "such as --rank 16, or --max-error 0.05"
    assert folder.run("truncate adapter --rank 16 -o OUT").status == 0
    assert folder.refused("convert adapter -o OUT2").hint.startswith("such as --to kohya")
    assert "it is empty" in folder.refused(["merge", "", "adapter", "-o", "OUT2"]).error
    assert "it is empty" in folder.refused(["merge", "base", "adapter", "-o", ""]).error
    assert folder.refused("merge base adapter -o").error.startswith("loratool merge: ")


@pytest.mark.parametrize("command", WRITES)
def test_outputs_that_cannot_be(command: str, folder: Folder) -> None:
    line = WRITES[command]
    said = folder.refused(line.format("-"))
    assert said.error.startswith("-o -: an output cannot go to a pipe")
    assert folder.refused(f"{line.format('-')} --dry-run").error == said.error
    said = folder.refused(line.format("some/where/new"))
    assert said.error == "some/where/new: its folder does not exist"
    assert said.hint == f"mkdir -p {Path.cwd() / 'some/where'}"
    said = folder.refused(line.format("base"))
    assert "would overwrite the input" in said.error or "exists already" in said.error
    Path("taken").mkdir()
    assert folder.refused(line.format("taken")).hint == "choose another name, or give --force"


def test_free_space_is_told_in_units_that_say_something(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loratool.files import atomic

    usage = shutil.disk_usage(".")
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda path: usage._replace(free=1234))
    said = folder.refused("merge base adapter -o OUT")
    assert "kB, but only 1.23 kB are free there" in said.error


def notes(folder: Folder, line: str) -> list[str]:
    said = folder.run(f"{line} --json")
    assert said.status == 0, said
    found: list[str] = json.loads(said.out)["notes"]
    return found


@pytest.mark.parametrize("more", ["", " --dry-run"])
@pytest.mark.parametrize("command", ["truncate adapter", "compose adapter", "extract base tuned"])
def test_two_limits_tell_which_of_them_ruled(command: str, more: str, folder: Folder) -> None:
    if command.startswith("extract") and more:
        return  # which computes nothing
    for name, limits, words in (
        ("OUT1", "--energy 0.999 --rank 1", "--rank 1 ruled in 6 of 6 modules, which keep "),
        ("OUT2", "--energy 0.5 --rank 2", "--energy 0.5 ruled in all modules, --rank 2 in none"),
        ("OUT3", "--max-error 0.45 --rank 1", "and --max-error 0.45 in the others"),
    ):
        found = [n for n in notes(folder, f"{command} {limits} -o {name}{more}") if "ruled" in n]
        assert len(found) == 1 and words in found[0], found
        assert "of ‖delta‖² is kept in all" in found[0]
    assert not [n for n in notes(folder, f"{command} --energy 0.5 -o OUT4{more}") if "ruled" in n]


def test_what_the_limits_keep_is_what_is_kept(folder: Folder) -> None:
    report = loratool.truncate("adapter", "OUT", energy=0.999, rank=1)
    kept = 1 - report.relative_error**2
    (note,) = (note for note in report.notes if "ruled" in note)
    assert f"{kept:.1%} of ‖delta‖² is kept in all" in note
    shares = [1 - module.relative_error**2 for module in report.modules]
    assert f"keep {min(shares):.1%} to {max(shares):.1%}" in note
    assert not any("miss --max-error" in note for note in report.notes)


def test_keys_without_a_configuration_are_the_same_to_validate_and_merge(folder: Folder) -> None:
    Path("bare").mkdir()
    shutil.copy("adapter/adapter_model.safetensors", "bare")
    found = loratool.validate("bare", base="base")
    assert {finding.code for finding in found} == {"LT009", "LT015"}
    assert not any(finding.is_error for finding in found)
    report = loratool.merge("base", "bare", "OUT")
    assert any("alpha is not recorded" in note for note in report.notes)


def test_alphas_are_no_parameters(folder: Folder) -> None:
    count = loratool.inspect("adapter").as_json()["parameters"]
    assert loratool.inspect("kohya.safetensors").as_json()["parameters"] == count


def test_one_path_may_stand_for_several(folder: Folder) -> None:
    shutil.copytree("adapter", "a8")
    for given in ("a8", Path("a8"), ["a8"], (Path("a8"),)):
        assert loratool.merge("base", given, "OUT", force=True).merged == 6
        assert loratool.compose(given, "OUT2", force=True).modules
        assert not loratool.verify("OUT", base="base", adapters=given)
        assert loratool.plan_merge("base", given).merged == 6
    assert loratool.merge(Path("base"), "a8", Path("OUT"), skip="mlp", force=True).unused
    assert loratool.convert("a8", "kohya", "x.safetensors", skip="mlp").plan.parts


def test_dtypes_may_be_called_as_people_call_them(folder: Folder) -> None:
    given: Any
    for given in ("bf16", "bfloat16", torch.bfloat16):
        report = loratool.truncate("adapter", "OUT", rank=1, dtype=given, dry_run=True)
        assert {spec.dtype for spec in report.plan.specs} == {"BF16"}
        assert loratool.merge("base", "adapter", "OUT", dtype=given, dry_run=True).merged == 6
    with pytest.raises(OptionError, match="is none of float32"):
        loratool.convert("adapter", "kohya", "OUT", dtype="int8")


def test_every_writing_function_has_a_dry_run_with_the_same_report(folder: Folder) -> None:
    calls: dict[str, Any] = {
        "convert": lambda **more: loratool.convert("adapter", "mlx", "OUT", **more),
        "compose": lambda **more: loratool.compose(["adapter"], "OUT", **more),
        "rescale": lambda **more: loratool.rescale("adapter", "OUT", scale=2, **more),
        "truncate": lambda **more: loratool.truncate("adapter", "OUT", rank=1, **more),
        "extract": lambda **more: loratool.extract("base", "tuned", "OUT", rank=1, **more),
        "merge": lambda **more: loratool.merge("base", "adapter", "OUT", **more),
    }
    for name, call in calls.items():
        planned = call(dry_run=True)
        assert not Path("OUT").exists()
        assert (planned.is_written, planned.output) == (False, Path("OUT")), name
        written = call()
        assert type(planned) is type(written)
        assert (written.is_written, written.output) == (True, Path("OUT"))
        plan, done = planned.as_json(), written.as_json()
        assert (plan["dry_run"], done["dry_run"]) == (True, False)
        assert plan["output"] == done["output"] == "OUT"
        assert done.keys() - plan.keys() <= {"bytes_written"}
        assert plan.keys() - done.keys() <= {"bytes_to_write", "steps"}
        assert plan["files"] and plan["peak_memory"] >= 0 if "peak_memory" in plan else True
        with pytest.raises(OutputError):
            call(dry_run=False)
        shutil.rmtree("OUT")


def test_a_readme_is_not_dropped(folder: Folder) -> None:
    """Files beside the weights are named by themselves; what is dropped are tensors and modules."""
    Path("adapter/README.md").write_text("# a card")
    Path("adapter/training.log").write_text("step 1")
    for line, left in (
        ("convert adapter --to kohya -o OUT.safetensors", {"training.log"}),
        ("convert adapter --to peft -o OUT1", {"training.log"}),
        ("truncate adapter --rank 1 -o OUT2", {"training.log"}),
        ("rescale adapter --scale 2 -o OUT3", {"training.log"}),
        ("rescale adapter --fold -o OUT4", {"training.log"}),
    ):
        said = folder.run(f"{line} --dry-run --json")
        document = json.loads(said.out)
        assert document["dropped"] == []
        assert {item["name"] for item in document["left_behind"]} == left, line
        said = folder.run(line)
        assert "training.log" in said.err
        assert "1 dropped" not in said.out and "2 dropped" not in said.out
    assert Path("out1/README.md").read_text().count("# a card") == 1
