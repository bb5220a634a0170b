"""``run``: carry out a recipe."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Final

from loratool.display.document import Document, Lines
from loratool.display.shown import Shown
from loratool.errors import AdapterError, BaseModelError, LoratoolError, OptionError
from loratool.files.places import located
from loratool.files.transfer import describe_write_error
from loratool.jobs.recipe import Recipe, read_recipe
from loratool.jobs.step import Asked, Commands, Places, Step, command_line
from loratool.plan.history import digest_of_all
from loratool.plan.record import Input, matches
from loratool.schemes.detection import find_weights
from loratool.schemes.ranks import files_of

__all__ = ["RunReport", "StepReport", "run"]

AnyPath = str | PathLike[str]
OUTSIDE: Final = "--outside"
UNBOUNDED: Final = ("batch",)
"""Commands that carry out others, which say themselves where they write."""
HINT: Final = "take that line out of the recipe to use it all the same"


@dataclass(frozen=True, slots=True)
class StepReport:
    """What came of a step.

    Attributes:
        words: The command line that it was.
        status: Its exit status.
        document: What the command prints with ``--json``; ``None`` where it printed for people.
        left_out: Why it was not rehearsed; empty where it was carried out.
    """

    words: tuple[str, ...]
    status: int = 0
    document: Any = None
    left_out: str = ""

    def as_json(self) -> dict[str, Any]:
        """Return the step for scripts."""
        told = {"command": list(self.words), "status": self.status, "result": self.document}
        return told | ({"left_out": self.left_out} if self.left_out else {})


@dataclass(frozen=True, slots=True)
class RunReport(Shown):
    """What came of a recipe.

    Attributes:
        steps: Its steps, up to the first that found something wrong.
        is_rehearsed: Whether nothing was written.
    """

    steps: tuple[StepReport, ...]
    is_rehearsed: bool = False

    @property
    def status(self) -> int:
        """The exit status: that of the last step."""
        return self.steps[-1].status if self.steps else 0

    def as_json(self) -> dict[str, Any]:
        """Return a document for scripts."""
        return {
            "schema": 1,
            "dry_run": self.is_rehearsed,
            "steps": [step.as_json() for step in self.steps],
        }

    def document(self) -> Document:
        """Return what people see of it: the steps that could not be rehearsed."""
        left = (s for s in self.steps if s.left_out)
        words = (f"not rehearsed: {' '.join(step.words)}: {step.left_out}" for step in left)
        return Document.of([Lines(tuple(words))])


def run(
    recipe: AnyPath,
    *,
    into: AnyPath | None = None,
    outside: bool = False,
    force: bool = False,
    dry_run: bool = False,
    as_json: bool = True,
    quiet: bool = True,
    on_step: Callable[[int, int, str], None] | None = None,
    commands: Commands | None = None,
) -> RunReport:
    """Carry out the steps of a recipe, as so many command lines would.

    All steps are understood before the first is carried out. A later step may read what an
    earlier one writes. The run ends with the first step that fails, or finds something wrong.

    Args:
        recipe: A TOML file; ``-`` for standard input.
        into: A folder where relative outputs go, instead of the recipe's; made where it is missing.
        outside: Let it write elsewhere than in and below the folder of the recipe, or ``into``.
        force: Replace existing outputs.
        dry_run: Say what would be done, and write nothing.
        as_json: Return the documents of the commands, instead of letting them print.
        quiet: No progress, no summaries.
        on_step: Called before each step, with its number, how many there are, and its verb.
        commands: What carries them out; by default the command line.

    Raises:
        LoratoolError: A step cannot be understood, or fails; the message says which.
    """
    commands = commands or command_line()
    read = read_recipe(Path(recipe))
    flags = {"force": force, "quiet": quiet, "as_json": as_json, "dry_run": dry_run}
    goes = Path(into) if into is not None else None
    planned = list(_understood(read, commands, goes, flags | {"outside": outside}))
    if not outside:
        for step, asked in planned:
            _check_inside(step, asked, [read.folder, *([goes] if goes is not None else [])])
    reports: list[StepReport] = []
    made: set[Path] = set()
    for number, (step, asked) in enumerate(planned, 1):
        if on_step is not None:
            on_step(number, len(planned), step.verb)
        reason = _left_out(asked, made, goes) if dry_run else ""
        if asked.place is not None:
            made.add(asked.place)
        if reason:
            reports.append(StepReport(asked.words, left_out=reason))
            continue
        _check_digests(step, asked)
        if goes is not None and not dry_run and asked.place is not None:
            _make_folder(asked.place, goes)
        documents: list[Any] | None = [] if as_json else None
        try:
            status = commands.carry_out(asked.words, documents=documents)
        except LoratoolError as error:
            error.where = f"{step.where}: {error.where}"
            raise
        reports.append(StepReport(asked.words, status, documents[-1] if documents else None))
        if status:
            break
    return RunReport(tuple(reports), dry_run)


def _understood(
    recipe: Recipe, commands: Commands, into: Path | None, flags: Mapping[str, Any]
) -> Iterator[tuple[Step, Asked]]:
    """Yield every step with what it asks for.

    Raises:
        OptionError: A step cannot be understood, or two write the same.
    """
    made: dict[Path, Path] = {}
    for step in recipe.steps:
        places = Places(recipe.folder, into, dict(made))
        asked = commands.understand(step, places, defaults=flags)
        _check_names(step, asked)
        if asked.output is not None and asked.place is not None:
            name = places.named(asked.output)
            if name in made:
                raise OptionError(step.where, f"{asked.output} is the output of an earlier step")
            made[name] = asked.place
        yield step, asked


def _check_names(step: Step, asked: Asked) -> None:
    """Make sure that digests are of what a step reads.

    Raises:
        OptionError: They are not.
    """
    for digests in (step.digests, step.headers):
        for name, values in digests.items():
            paths = asked.inputs.get(name, ())
            if len(paths) != len(values):
                raise OptionError(
                    step.where, f"has {len(values)} digests of {name!r} for {len(paths)} paths"
                )


def _check_inside(step: Step, asked: Asked, folders: Sequence[Path]) -> None:
    """Make sure that a step writes where somebody who runs it expects that.

    A recipe may come from a stranger, and a folder may be a link that leads elsewhere.

    Raises:
        OptionError: It writes elsewhere, or lets others do so.
    """
    hint = "read what it does, and give --outside to let it"
    if OUTSIDE in asked.words:
        raise OptionError(step.where, f"{OUTSIDE} is for who runs a recipe, and not in one")
    if step.verb in UNBOUNDED:
        raise OptionError(
            step.where, f"lets the jobs of {step.verb} write wherever they say", hint=hint
        )
    roots = [folder.resolve() for folder in folders]
    for path in asked.writes:
        place = path.parent.resolve() / path.name
        if place.name == ".." or not any(root in (place, *place.parents) for root in roots):
            raise OptionError(
                step.where, f"writes {path}, outside of the folder of the recipe", hint=hint
            )


def _make_folder(place: Path, into: Path) -> None:
    """Make the folder of an output, where that is asked to go in or below ``into``.

    Raises:
        OutputError: The system refuses it.
    """
    if into not in place.parents:
        return
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise describe_write_error(place.parent, error) from None


def _left_out(asked: Asked, made: set[Path], into: Path | None) -> str:
    """Return why a step cannot be rehearsed, empty where it can."""
    read = {path for paths in asked.inputs.values() for path in paths}
    earlier = sorted(str(path) for path in read & made)
    if earlier:
        return f"reads {earlier[0]}, which an earlier step writes"
    if not asked.can_rehearse:
        return "has no dry run"
    place = asked.place
    if into is not None and place is not None and into in place.parents:
        return "" if place.parent.is_dir() else f"its folder {place.parent} is to be made first"
    return ""


def _check_digests(step: Step, asked: Asked) -> None:
    """Make sure that inputs are those that the recipe was made with.

    Raises:
        AdapterError: An adapter is another one.
        BaseModelError: A model is.
    """
    for name, values in step.digests.items():
        for path, digest in zip(asked.inputs[name], values, strict=True):
            found = digest_of_all(files_of(find_weights(located(path))[0]))
            if found != digest:
                raise AdapterError(
                    f"{step.where}: {path}",
                    f"is not what the recipe was made with: its SHA-256 is {found}, and "
                    f"{name}_sha256 says {digest}",
                    hint=HINT,
                )
    for name, values in step.headers.items():
        for path, digest in zip(asked.inputs[name], values, strict=True):
            if not matches(Input(path.name, headers_sha256=digest), located(path)):
                raise BaseModelError(
                    f"{step.where}: {path}",
                    "is not what the recipe was made with: its headers have another SHA-256 than "
                    f"{name}_headers_sha256",
                    hint=HINT,
                )
