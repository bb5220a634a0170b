"""The plan of a model: what every output tensor is made of, decided from headers alone."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, Final

from loratool.adapter.model import HISTORY_KEY, Adapter, Site
from loratool.base.region import Region
from loratool.codecs.codec import CodedTensor
from loratool.codecs.weights import Weight
from loratool.display.shown import Shown
from loratool.errors import MergeError
from loratool.files.container import Layout, WeightsFile
from loratool.files.containers import container_of
from loratool.files.inputs import Stamp
from loratool.files.places import hub_as_json
from loratool.files.sources import Source, ranged, unfetched
from loratool.files.spec import StoredTensor, TensorSpec
from loratool.plan.card import Card
from loratool.plan.history import History
from loratool.plan.lanes import Spot, Task
from loratool.plan.outcome import Outcome
from loratool.plan.run import FileWork
from loratool.plan.sidecar import Sidecar, files_read, read_whole
from loratool.plan.telling import card_file, record_file

if TYPE_CHECKING:
    from loratool.display.document import Document

__all__ = [
    "PROCESS_BYTES",
    "AddDelta",
    "AddTensor",
    "Blend",
    "ChangeWeight",
    "Decompose",
    "Edit",
    "ModelPlan",
    "OutputFile",
    "Recoded",
    "Residual",
    "SetRows",
    "Step",
    "refuse_empty",
    "task_of",
]


@dataclass(frozen=True, slots=True)
class AddDelta:
    """Add ``scale · B @ A`` of ``site``, or some rows of it, from ``first`` on.

    The scale includes the adapter's weight.
    """

    site: Site
    scale: float
    region: Region
    first: int = 0

    @property
    def words(self) -> str:
        return f"+ {self.scale:g} · B @ A, rank {self.site.rows // self.region.experts}"


@dataclass(frozen=True, slots=True)
class Decompose:
    """Apply the DoRA site: add its delta, then rescale rows (or columns) to its magnitudes.

    Attributes:
        site: The site, with a magnitude.
        scale: What multiplies its delta.
        weight: How much of the change to make.
        region: Where it goes.
        is_by_input: Whether it has a magnitude for each input, instead of each output.
        first: Which of its outputs is the first of the region.
        outputs: How many it has, where the region has not all of them.
    """

    site: Site
    scale: float
    weight: float
    region: Region
    is_by_input: bool = False
    first: int = 0
    outputs: int | None = None

    @property
    def words(self) -> str:
        axis = ", magnitudes of the inputs" if self.is_by_input else ""
        return f"DoRA, scale {self.scale:g}, rank {self.site.rank}{axis}"


@dataclass(frozen=True, slots=True)
class ChangeWeight:
    """Make of a weight, or of its bias, what the site's variant makes of it.

    Attributes:
        site: The site.
        scale: What multiplies its delta.
        weight: How much of the change to make.
        region: Where it goes.
        is_bias: Whether it is the bias.
        first: Which of its outputs is the first of the region.
        outputs: How many it has, where the region has not all of them.
        beside: The weight beside a bias that changes with it, and where in that it lies.
    """

    site: Site
    scale: float
    weight: float
    region: Region
    is_bias: bool = False
    first: int = 0
    outputs: int | None = None
    beside: tuple[Weight, Region] | None = None

    @property
    def words(self) -> str:
        share = "" if self.weight == 1 else f", {self.weight:g} of the way"
        return f"{self.site.variant.name}{share}"


@dataclass(frozen=True, slots=True)
class Residual:
    """Take out of the base what the adapter's initialisation took out of it.

    The kind is ``pissa``, ``olora`` or ``kasa``.
    """

    kind: str
    rank: int
    scale: float
    weight: float

    @property
    def words(self) -> str:
        return f"{self.kind} residual of rank {self.rank}"


@dataclass(frozen=True, slots=True)
class Blend:
    """Put a saved tensor in place of the base's, or move ``weight`` of the way to it.

    With ``only_if_different`` the saved tensor is a copy of the base's in its own dtype; the
    base's values stay wherever they round to it.
    """

    tensor: StoredTensor
    weight: float
    only_if_different: bool = False

    @property
    def words(self) -> str:
        if self.only_if_different:
            return "on the adapter's copy of the base weight"
        return "replaced" if self.weight == 1 else f"{self.weight:g} of the way to a saved tensor"


@dataclass(frozen=True, slots=True)
class SetRows:
    """Give some rows new values."""

    indices: tuple[int, ...]
    tensor: StoredTensor
    weight: float

    @property
    def words(self) -> str:
        return f"{len(self.indices)} rows replaced"


@dataclass(frozen=True, slots=True)
class AddTensor:
    """Add a stored tensor, or some of its rows from ``first`` on: a bias, a whole difference.

    As a matrix it has the columns of the region, or its rows where the region is transposed.
    """

    tensor: StoredTensor
    scale: float
    region: Region
    first: int = 0

    @property
    def words(self) -> str:
        what = "a stored difference" if self.region.columns > 1 else "a stored vector"
        return f"+ {self.scale:g} · {what}"


PROCESS_BYTES: Final = 90_000_000
"""What an interpreter with numpy takes, with the blocks of eight threads."""

Edit = AddDelta | Decompose | ChangeWeight | Residual | Blend | SetRows | AddTensor


@dataclass(frozen=True, slots=True)
class Recoded:
    """A coded weight whose codes are written again.

    Attributes:
        weight: The weight.
        names: The output tensors by the role of the part that each is; one step writes them all.
    """

    weight: CodedTensor
    names: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Step:
    """How one output tensor comes about.

    Attributes:
        spec: What is written.
        source: What is read: the base's tensor, or an adapter's where it replaces or adds one.
        edits: What is done to it, in order.
        base: The base's tensor, where the source is another one that replaces it.
        added: Whether the base has no tensor of this name.
        replaced: Whether an adapter's tensor takes the place of the base's.
        recoded: Of which coded weight it is a part, where that is written in its own codes.
    """

    spec: TensorSpec
    source: Weight
    edits: tuple[Edit, ...] = ()
    base: Weight | None = None
    added: bool = False
    replaced: bool = False
    recoded: Recoded | None = None

    @property
    def leads(self) -> bool:
        """Whether it is the one, of all parts of a coded weight, that has them written."""
        return self.recoded is None or self.spec.name == next(iter(self.recoded.names.values()))

    @property
    def copied(self) -> StoredTensor | None:
        """The source, where its bytes are written as they are."""
        source = self.source
        if self.edits or not isinstance(source, StoredTensor) or not source.is_run:
            return None
        is_same = (self.spec.dtype, self.spec.shape) == (source.spec.dtype, source.spec.shape)
        return source if is_same else None

    @property
    def is_copy(self) -> bool:
        """Whether the bytes of the source are written as they are."""
        return self.copied is not None

    @property
    def is_changed(self) -> bool:
        """Whether the values differ from the base's for another reason than the dtype."""
        if self.edits or self.added or self.replaced:
            return True
        return self.recoded is None and self.spec.shape != self.source.spec.shape

    @property
    def has_delta(self) -> bool:
        """Whether something is added that rounding can eat."""
        return any(
            isinstance(edit, AddDelta | Decompose | ChangeWeight | AddTensor) for edit in self.edits
        )

    @property
    def words(self) -> str:
        """What is done, in a few words."""
        parts = ["added"] if self.added else ["replaced"] if self.replaced else []
        return "; ".join([*parts, *(edit.words for edit in self.edits)]) or "copied"


@dataclass(frozen=True)
class OutputFile:
    """One weights file of the output.

    Attributes:
        name: Its name in the output folder.
        layout: Where everything lies in it.
        steps: Its tensors in the order of their data.
        metadata: What its header says of it as a whole.
        original: The base's file, where header and layout are those of it.
        prefix: What the names of the tensors begin with here, and in the file do not.
        history: How it came to be, where its header says that.
    """

    name: str
    layout: Layout
    steps: tuple[Step, ...]
    metadata: Mapping[str, str]
    original: WeightsFile | None = None
    prefix: str = ""
    history: History | None = None

    @property
    def size(self) -> int:
        """Size of the file in bytes."""
        return self.layout.size

    def spots(self, number: int) -> Iterator[Spot]:
        """Yield where each tensor goes, as the output file of this number."""
        places = self.layout.offsets
        for step in self.steps:
            yield Spot(step.spec, number, places[step.spec.name.removeprefix(self.prefix)])

    def work(self, number: int, spots: Mapping[str, Spot], outcome: Outcome) -> FileWork:
        """Return what is to be done for it.

        Args:
            number: Which of the output files it is.
            spots: Where the tensors of all files go, by name.
            outcome: What is found on the way, such as hashes for its history.
        """
        moves = [(spots[s.spec.name], s.copied) for s in self.steps if s.copied is not None]
        found = (task_of(step, spots) for step in self.steps)
        tasks = [task for task in found if task is not None]
        original = self.original.path if self.original is not None else None
        seal = partial(self.seal, outcome) if self.history is not None else None
        return FileWork(self.name, self.size, self.layout.header, moves, tasks, original, seal)

    def seal(self, outcome: Outcome, path: Path) -> None:
        """Write the header again, now that the hashes in it are known."""
        assert self.history is not None
        metadata = {**self.metadata, HISTORY_KEY: self.history.text(outcome.digests)}
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            self.layout.seal(descriptor, metadata, path=path)
        finally:
            os.close(descriptor)

    @staticmethod
    def lay_out(
        name: str,
        steps: Sequence[Step],
        metadata: Mapping[str, str],
        original: WeightsFile,
        prefix: str = "",
        history: History | None = None,
    ) -> OutputFile:
        """Return the file that holds ``steps``: as the base lays it out where nothing moves.

        Args:
            name: Its name; the container is told by its ending.
            steps: Its tensors.
            metadata: Of its header.
            original: The base's file that it takes the place of.
            prefix: What the names of the tensors begin with here, and in the file do not.
            history: How it comes to be, where its header is to say that.
        """
        container = container_of(PurePath(name))
        if prefix:
            specs = [replace(s.spec, name=s.spec.name.removeprefix(prefix)) for s in steps]
        else:
            specs = [step.spec for step in steps]
        if not container.keeps_codes:  # there what the base says is kept as it is
            metadata = {**metadata, "format": "pt"}
        else:
            history = None
        if history is not None:
            metadata = {**metadata, HISTORY_KEY: history.text({})}
        layout = container.lay_out(specs, metadata, name, original)
        places = layout.offsets
        ordered = sorted(steps, key=lambda step: places[step.spec.name.removeprefix(prefix)])
        kept = original if layout.header and layout.header is original.header else None
        return OutputFile(name, layout, tuple(ordered), metadata, kept, prefix, history)


def task_of(step: Step, spots: Mapping[str, Spot]) -> Task | None:
    """Return what computes a tensor.

    Args:
        step: How it comes about.
        spots: Where tensors go, by name: it, and what is written with it.

    Returns:
        ``None`` where bytes are copied, where there are none, or where another step writes them.
    """
    if step.copied is not None or not step.leads:
        return None
    if step.recoded is None:
        from loratool.plan.patches import Patch

        return Patch(step, spots[step.spec.name]) if step.spec.nbytes else None
    from loratool.plan.recoding import Recoding

    weight, names = step.recoded.weight, step.recoded.names
    whole = replace(step, spec=replace(weight.spec, name=step.spec.name), recoded=None)
    return Recoding(whole, weight, {role: spots[name] for role, name in names.items()})


def _working_bytes(step: Step) -> int:
    total = 0
    for edit in step.edits:
        match edit:
            case AddDelta() | Decompose():
                total += sum(2 * 4 * stored.spec.elements for stored in edit.site.tensors)
            case ChangeWeight():
                total += sum(8 * stored.spec.elements for stored in edit.site.tensors)
                if edit.site.variant.needs_whole:
                    total += 4 * 8 * step.spec.elements
            case Residual():
                total += 5 * 8 * step.spec.elements
            case SetRows():
                total += 4 * edit.tensor.spec.elements
            case AddTensor() if edit.region.transposed:
                total += 4 * edit.tensor.spec.elements
            case AddTensor() | Blend():
                pass
    return total


def refuse_empty(adapters: Sequence[str], outcome: Outcome, *, is_changed: bool) -> None:
    """Refuse a merge that has changed nothing.

    Args:
        adapters: What they are called.
        outcome: What came out.
        is_changed: Whether a tensor was added or replaced.

    Raises:
        MergeError: Every delta is exactly zero.
    """
    if outcome.weights.is_empty and not is_changed:
        raise MergeError(
            ", ".join(adapters),
            "every delta is exactly zero (an untrained adapter, or alpha 0), so the merge "
            "would change nothing",
            code="LT018",
        )


@dataclass(frozen=True)
class ModelPlan(Shown):
    """Everything that a run will write, and everything that it will not use.

    Attributes:
        files: Weights files.
        sidecars: Other files.
        is_folder: Whether the output is a folder (else it is the one weights file).
        adapters: The adapters.
        unused: Adapter keys that were skipped on request.
        notes: What a user should know, one sentence each.
        left_behind: Files of the base that are not carried over, with the reason.
        stamps: What the weights files were when their headers were read.
        base: The model that everything is merged into.
        history: How it came to be.
        card: What its card says, where it has one.
    """

    files: tuple[OutputFile, ...]
    sidecars: tuple[Sidecar, ...]
    is_folder: bool
    adapters: tuple[Adapter, ...]
    unused: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    left_behind: tuple[tuple[str, str], ...] = field(default=())
    stamps: Mapping[Path, Stamp] = field(default_factory=dict)
    base: Path = Path()
    history: History | None = None
    card: Card | None = None

    @property
    def hub(self) -> Mapping[str, Any] | None:
        """Models and commits of what came from the hub; ``None`` where nothing did."""
        return hub_as_json({"base": self.base}, [adapter.path for adapter in self.adapters])

    @property
    def unfetched(self) -> Sequence[Source]:
        """The files of the hub or of stores that would have to be fetched first."""
        hashed = self.history.hashed if self.history is not None else ()
        return unfetched(read_whole(self.stamps, hashed, self.sidecars))

    def as_json(self) -> dict[str, Any]:
        """Return the keys that the command line's JSON promises."""
        missing = self.unfetched
        return {
            "schema": 1,
            "dry_run": True,
            "tensors": sum(1 for _ in self.steps()),
            "merged": self.merged,
            "copied": self.copied,
            "added": self.added,
            "unused": list(self.unused),
            "bytes_to_write": self.nbytes,
            **({"bytes_to_fetch": sum(file.size for file in missing)} if missing else {}),
            "peak_memory": self.peak_memory,
            "files": [{"name": file.name, "bytes": file.size} for file in self.files],
            "steps": [
                {"tensor": step.spec.name, "what": step.words}
                for step in self.steps()
                if step.is_changed
            ],
            "sidecars": [{"name": item.name, "why": item.why} for item in self.others()],
            "left_behind": [{"name": name, "why": why} for name, why in self.left_behind],
            "notes": list(self.notes),
            **({"hub": hub} if (hub := self.hub) else {}),
        }

    def document(self) -> Document:
        """Return what people see of it."""
        from loratool.plan.shown import model_document

        return model_document(self)

    def steps(self) -> Iterator[Step]:
        """Yield every step of every file."""
        for file in self.files:
            yield from file.steps

    def works(self, outcome: Outcome) -> list[FileWork]:
        """Return what is to be done for each of the files."""
        spots = {
            spot.spec.name: spot
            for number, file in enumerate(self.files)
            for spot in file.spots(number)
        }
        return [file.work(number, spots, outcome) for number, file in enumerate(self.files)]

    def beside(self) -> Iterator[Sidecar]:
        """Yield the other files."""
        yield from self.sidecars

    def telling(self, outcome: Outcome) -> Iterator[Sidecar]:
        """Yield the card, and how it came to be, for files of weights stay as they are."""
        if self.is_folder and self.history is not None:
            if self.card is not None:
                yield card_file(self.card, self.history, outcome)
            yield record_file(self.history, outcome)

    def others(self) -> Iterator[Sidecar]:
        """Yield all files that are no weights, those that tell what was done as far as known."""
        yield from self.beside()
        yield from self.telling(Outcome())

    def check(self, outcome: Outcome) -> None:
        """Refuse a merge that has changed nothing.

        Raises:
            MergeError: Every delta is exactly zero.
        """
        is_changed = any(step.added or step.replaced for step in self.steps())
        paths = [str(adapter.path) for adapter in self.adapters]
        refuse_empty(paths, outcome, is_changed=is_changed)

    def inputs(self) -> Iterator[Path]:
        """Yield every file that is read."""
        yield from files_read(self.stamps, self.sidecars)

    @property
    def nbytes(self) -> int:
        """Bytes of all weights files."""
        return sum(file.size for file in self.files)

    @property
    def peak_memory(self) -> int:
        """Bytes of memory that carrying it out takes at most, roughly.

        The interpreter, the blocks in work, what is read ahead from a store, and the largest set of
        factors (or the whole weight, where one is decomposed).
        """
        windows = 0
        if any(map(ranged, self.stamps)):
            from loratool.files.windows import MOST_BYTES

            windows = MOST_BYTES
        largest = max((_working_bytes(step) for step in self.steps()), default=0)
        return PROCESS_BYTES + windows + largest

    @property
    def merged(self) -> int:
        """Tensors of the base that change."""
        return sum(step.is_changed and not step.added for step in self.steps())

    @property
    def added(self) -> int:
        """Tensors that the base does not have."""
        return sum(step.added for step in self.steps())

    @property
    def copied(self) -> int:
        """Tensors whose values stay as they are."""
        return sum(not step.is_changed for step in self.steps())
