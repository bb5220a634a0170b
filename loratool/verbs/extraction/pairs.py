"""Which tensors of two checkpoints belong together, and what can become of their difference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from loratool.adapter.keys import transposed
from loratool.adapter.model import FUSED_PARAMETERS, Kind
from loratool.adapter.selectors import PartlyMeantError, Selector, selector
from loratool.base.joined import is_joined, joined
from loratool.base.model import Model
from loratool.base.place import Piece, Place
from loratool.codecs.weights import Weight, is_alias
from loratool.files.dtypes import DTYPES
from loratool.files.spec import StoredTensor
from loratool.names.conv1d import CONV1D_LEAVES
from loratool.names.embeddings import is_embedding, is_router
from loratool.names.experts import TRANSPOSED_MODEL_TYPES
from loratool.names.pipelines import UNTRAINED
from loratool.names.spellings import spellings_of_path
from loratool.values.expr import widest

__all__ = ["Leftover", "Pairing", "Selection", "Target", "pair"]

BIAS: Final = "bias"
FUSED_LEAVES: Final = ("in_proj_weight", "in_proj_bias")
"""Parameters that hold several modules of libraries."""
STACKED_LEAVES: Final = ("input_linear", "output_linear")
"""Modules whose three-dimensional weight stacks experts, not kernels."""


@dataclass(frozen=True, slots=True)
class Target:
    """A weight whose difference becomes factors.

    Attributes:
        name: Of the module, or of the parameter for fused experts.
        module: The module.
        kind: Linear, conv or embedding.
        base: The base's tensor.
        tuned: The finetuned one, of the same shape.
        out: Rows of the delta.
        into: Shape of A without its rank.
        is_transposed: Whether the weight is stored as the delta's transpose.
        experts: How many deltas the weight stacks along its first axis; 1 for none.
        is_parameter: Whether it is a raw parameter (``target_parameters``).
        nesting: How deep PEFT nests it beside other parameters of its module.
    """

    name: str
    module: str
    kind: Kind
    base: Weight
    tuned: Weight
    out: int
    into: tuple[int, ...]
    is_transposed: bool = False
    experts: int = 1
    is_parameter: bool = False
    nesting: int = 0

    @property
    def columns(self) -> int:
        """Columns of the delta, kernels flattened."""
        return math.prod(self.into)

    @property
    def smallest_side(self) -> int:
        """The rank that the delta cannot exceed."""
        return min(self.out, self.columns)

    @property
    def dtype(self) -> str:
        """The dtype that holds the digits of both weights, and so those of their difference."""
        return widest([self.base.spec.dtype, self.tuned.spec.dtype])

    @property
    def nbytes(self) -> int:
        """Bytes that have to be read."""
        return self.base.spec.nbytes + self.tuned.spec.nbytes


@dataclass(frozen=True, slots=True)
class Leftover:
    """A tensor whose difference no factors express, or that was not selected.

    Attributes:
        name: Its name.
        why: Why it is left over.
        base: The base's tensor, if it has one.
        tuned: The finetuned one, if there is one.
        can_be_carried: Whether an adapter can hold the finetuned tensor whole.
        called: What libraries call it, where they call it otherwise.
    """

    name: str
    why: str
    base: Weight | None
    tuned: Weight | None
    can_be_carried: bool = True
    called: str = ""

    @property
    def key(self) -> str:
        """What an adapter calls it."""
        return self.called or self.name

    @property
    def is_comparable(self) -> bool:
        """Whether a difference can be told as a number."""
        one, other = self.base, self.tuned
        return (
            one is not None
            and other is not None
            and one.spec.shape == other.spec.shape
            and DTYPES[one.spec.dtype].is_mergeable
            and DTYPES[other.spec.dtype].is_mergeable
        )


@dataclass(frozen=True, slots=True)
class Selection:
    """Which modules to extract.

    Attributes:
        include: Patterns; a module must match one, if there are any.
        exclude: Patterns; a module must match none.
        embeddings: Whether embeddings and the output head are extracted as factors.
        save: Modules (paths or dotted suffixes) that are saved whole.
    """

    include: tuple[Selector, ...] = ()
    exclude: tuple[Selector, ...] = ()
    embeddings: bool = False
    save: tuple[str, ...] = ()

    @staticmethod
    def of(
        include: Sequence[str], exclude: Sequence[str], save: Sequence[str], *, embeddings: bool
    ) -> Selection:
        """Return the selection of these patterns; bare ones are regular expressions.

        Raises:
            OptionError: Something is no pattern.
        """
        return Selection(
            tuple(selector(text, "--include", bare_is_expression=True) for text in include),
            tuple(selector(text, "--exclude", bare_is_expression=True) for text in exclude),
            embeddings,
            tuple(save),
        )

    def refuses(self, module: str, *, is_tied: bool = False) -> str | None:
        """Return why ``module`` is not selected, or ``None`` if it is.

        Args:
            module: Its path.
            is_tied: Whether it shares its weight with an embedding.
        """
        other = UNTRAINED.get(module.partition(".")[0])
        if self.include and not any(_means(pattern, module) for pattern in self.include):
            return "not among --include"
        if any(_means(pattern, module) for pattern in self.exclude):
            return "excluded by --exclude"
        if other is not None and not self.include:
            return f"of {other}; --include selects it by its path, {module!r}"
        if not self.embeddings and (is_embedding(module) or is_tied):
            words = "a head tied to the embedding" if is_tied else "an embedding"
            return f"{words}; --embeddings selects it"
        return None

    def saves(self, module: str) -> bool:
        """Whether ``module`` is to be saved whole."""
        return any(module == name or module.endswith(f".{name}") for name in self.save)


@dataclass
class Pairing:
    """What two checkpoints have in common and what not.

    Attributes:
        targets: Weights to decompose.
        leftovers: Everything else that may differ.
        saved: Tensors of modules that are saved whole on request.
        same: How many tensors are shared by name, shape and kind, selected or not.
        notes: What a user should know.
    """

    targets: list[Target] = field(default_factory=list)
    leftovers: list[Leftover] = field(default_factory=list)
    saved: list[Leftover] = field(default_factory=list)
    same: int = 0
    notes: list[str] = field(default_factory=list)


def _means(pattern: Selector, module: str) -> bool:
    """Whether a pattern means a module; a bare one by its path alone."""
    if not pattern.is_marked:
        return pattern.matches(module)
    try:
        return pattern.means(spellings_of_path(module))
    except PartlyMeantError as error:
        raise error.refusal(pattern, "the model", "select") from None


def pair(base: Model, tuned: Model, selection: Selection) -> Pairing:
    """Pair the tensors of two models, from their headers alone.

    Names go by those of the finetuned model, for that is the model that was trained; they
    are matched with the base's as in a merge.

    Raises:
        BaseModelError: A name could mean several of the base's tensors.
    """
    found = Pairing()
    used: set[str] = set()
    renamed = 0
    first, second = _tied_twins(base), _tied_twins(tuned)
    for name, stored in tuned.tensors.items():
        if is_alias(stored) or name in second:
            used.add(name)
            continue
        unlike = tuned.layout.unlike(tuned.path_of(name), tuned.config)
        if unlike is not None:
            used.add(name)
            other = base.tensors.get(name)
            found.leftovers.append(Leftover(name, unlike, other, stored, can_be_carried=False))
            continue
        matches = _matches(name, stored, tuned, base)
        if isinstance(matches, str):
            called = tuned.name_in_libraries(name)
            found.leftovers.append(Leftover(name, matches, None, stored, called=called))
            continue
        for match in matches:
            renamed += match.name != name
            used.add(match.name)
            _sort(match, name, tuned, base, selection, found)
    for name, stored in base.tensors.items():
        if name not in used and not is_alias(stored) and name not in first:
            why = "the finetuned model has no such tensor"
            found.leftovers.append(Leftover(name, why, stored, None, can_be_carried=False))
    if renamed:
        found.notes.append(f"{renamed} tensors have other names in the base, matched as in a merge")
    _nest(found.targets)
    return found


def _tied_twins(model: Model) -> set[str]:
    """Return names of stored tensors that only repeat the one they are tied to."""
    return {name for tie in model.ties for name in tie.stored if name != tie.source}


@dataclass(frozen=True, slots=True)
class Match:
    """A weight of the finetuned model, or some rows of one, and what it is in the base.

    Attributes:
        name: The base's tensor.
        path: The module that libraries have for it.
        base: The base's weight.
        tuned: The finetuned one.
        leaf: Which of its parameters it is, where the finetuned tensor's name does not tell.
    """

    name: str
    path: str
    base: Weight
    tuned: Weight
    leaf: str = ""


def _matches(name: str, stored: Weight, tuned: Model, base: Model) -> list[Match] | str:
    """Return what the finetuned tensor called ``name`` is in the base, or why it is nothing.

    It is several things where one of the two models has several projections in one tensor and
    the other has not, or libraries have not.
    """
    path, leaf = tuned.path_of(name), name.rpartition(".")[2]
    is_weight = tuned.modules.get(path) == name
    parts = _apart(path, leaf, tuned)
    if parts is not None:
        return _in_parts(parts, tuned, base, is_bias=not is_weight)
    live = tuned.live.path(path, leaf)
    is_ordered = not is_weight and leaf != BIAS
    is_ordered = is_ordered or (not base.is_exchanged(path) and not tuned.is_exchanged(path))
    if name in base.tensors and base.path_of(name) == path and is_ordered:
        return [Match(name, live, base.tensors[name], stored)]
    place = base.find(path, family=tuned.family) if is_weight or leaf == BIAS else None
    if place is not None and not (place.is_whole and leaf == BIAS):
        names = dict.fromkeys(piece.name for piece in place.pieces)
        paths = [path] if len(names) == 1 else [base.path_of(one) for one in names]
        return _in_parts(paths, tuned, base, is_bias=not is_weight)
    own = base.parameter(path, leaf, family=tuned.family) if path else None
    if own is not None:
        return [Match(own, live, base.weight(own), stored)]
    stack = base.find(name) if leaf in FUSED_PARAMETERS else None
    return _experts(stack, stored, base) if stack is not None else "the base has no such tensor"


def _apart(path: str, leaf: str, tuned: Model) -> Sequence[str] | None:
    """Return the modules of libraries that a fused projection of the files is, if they have these.

    Not those of a family of diffusion models, of which an adapter may have either.
    """
    fused = tuned.layout.fused(path, tuned.config) if leaf in FUSED_LEAVES else None
    if fused is None and leaf in ("weight", BIAS):
        fused = tuned.live.fused(path)
        if fused is not None and fused.whole in tuned.live.modules:
            return None
    return fused.parts if fused is not None and fused.whole == path else None


def _experts(place: Place, stored: Weight, base: Model) -> list[Match] | str:
    """Return a stack of experts in the parts that the base has, each by itself."""
    found = []
    for piece in place.pieces:
        region, weight = piece.region, piece.tensor
        is_plain = region.expert is not None and not region.transposed and not region.exchanged
        view = None
        if is_plain and isinstance(stored, StoredTensor):
            view = stored.rows(place.start(piece), region.rows, region.columns)
        if view is None:
            return "the base has its experts in another order"
        found.append(Match(piece.name, base.path_of(piece.name), weight, view, leaf="weight"))
    return found


def _in_parts(
    paths: Sequence[str], tuned: Model, base: Model, *, is_bias: bool
) -> list[Match] | str:
    """Return projections one by one, or their biases."""
    found: list[Match] = []
    for path in paths:
        mine, other = (model.find(path, family=tuned.family) for model in (tuned, base))
        if mine is None or other is None:
            return f"the base has no {path!r}"
        if mine.is_transposed != other.is_transposed and not is_bias:
            turned = _turned(path, mine, other)
            if turned is None:
                return "the base has it the other way round"
            found.append(turned)
            continue
        own = _whole(other, base, is_bias=is_bias)
        view = _whole(mine, tuned, is_bias=is_bias)
        if own is None or view is None:
            return "the base has no bias" if is_bias else "the base has it in another order"
        leaf = BIAS if is_bias else "weight"
        found.append(Match(own[0], tuned.live.path(path), own[1], view[1], leaf))
    return found


def _whole(place: Place, model: Model, *, is_bias: bool) -> tuple[str, Weight] | None:
    """Return the first tensor that holds a module's weight, or its bias, and the whole of it."""
    rows = [_rows(place, piece, model, is_bias=is_bias) for piece in place.pieces]
    parts = [each for each in rows if each is not None]
    if len(parts) < len(rows) or len(parts) == 1:
        return parts[0] if parts and len(parts) == len(rows) else None
    stored = [weight for _, weight in parts if isinstance(weight, StoredTensor)]
    shape = place.shape[:1] if is_bias else place.shape
    one = joined(parts[0][0], shape, stored) if len(stored) == len(parts) else None
    return (parts[0][0], one) if one is not None else None


def _turned(path: str, mine: Place, other: Place) -> Match | None:
    """Return a whole matrix that one of the two models stores as the transpose of the other's."""
    weight = other.pieces[0].tensor
    is_whole = mine.is_whole and other.is_whole and len(weight.spec.shape) == 2
    if not is_whole or not isinstance(weight, StoredTensor):
        return None
    return Match(other.pieces[0].name, path, transposed(weight), mine.pieces[0].tensor)


def _rows(place: Place, piece: Piece, model: Model, *, is_bias: bool) -> tuple[str, Weight] | None:
    """Return the tensor that holds a piece of a module, or of its bias, and just that."""
    region = piece.region
    if is_bias:
        bias = model.tensors.get(piece.bias)
        if not isinstance(bias, StoredTensor):
            return None
        start = region.first_column if region.transposed else region.first_row
        view = bias.rows(start, piece.outputs, 1)
        if view is not None and region.bias_exchanged is not None:
            count, outer, inner = region.bias_exchanged
            view = view.exchanging((count, inner, outer))
        return (piece.bias, view) if view is not None else None
    weight = piece.tensor if piece.is_whole else piece.view or piece.ordered
    shape = weight.spec.shape if weight is not None else ()
    if isinstance(weight, StoredTensor) and len(shape) == 3 and len(place.shape) == 2:
        # One of a stack, or the only one.
        weight = replace(weight, spec=replace(weight.spec, shape=(region.rows, region.columns)))
    return (piece.name, weight) if weight is not None else None


def _sort(
    match: Match,
    name: str,
    view: Model,
    base_view: Model,
    selection: Selection,
    found: Pairing,
) -> None:
    base, tuned, module = match.base, match.tuned, match.path
    called = view.name_in_libraries(name)
    own, _, leaf = called.rpartition(".")
    leaf = match.leaf or leaf
    if match.path != own:  # a part of it
        name = called = f"{match.path}.{leaf}"

    def leave(why: str, *, can_be_carried: bool = not is_joined(tuned)) -> None:
        found.leftovers.append(Leftover(name, why, base, tuned, can_be_carried, called))

    if selection.saves(module):
        found.saved.append(Leftover(name, "saved whole as asked", base, tuned, called=called))
        return
    if base.spec.shape != tuned.spec.shape:
        leave(f"another shape: {list(base.spec.shape)} in the base, {list(tuned.spec.shape)} here")
        return
    if not all(DTYPES[stored.spec.dtype].is_mergeable for stored in (base, tuned)):
        leave(f"no floats: {base.spec.dtype} and {tuned.spec.dtype}", can_be_carried=False)
        return
    found.same += 1
    target = _target(f"{module}.{leaf}", module, leaf, base, tuned, view, base_view)
    if isinstance(target, str):
        leave(target)
    elif _is_shared_table(match, name, view, base_view):
        leave("a table that an encoder-decoder may tie in several places", can_be_carried=False)
    elif is_router(module, view.index.paths):
        leave("a router, which PEFT does not adapt")
    elif module.rpartition(".")[2] == "embed_positions":
        leave("a table of positions, whose modules do not all take ids")
    else:
        is_tied = view.tie is not None and name == view.tie.head
        refused = selection.refuses(module, is_tied=is_tied)
        if refused is not None:
            leave(refused)
        else:
            found.targets.append(target)


def _is_shared_table(match: Match, name: str, view: Model, base_view: Model) -> bool:
    """Whether a table of an encoder-decoder may be several, of which an adapter has to name all."""
    if not is_embedding(match.path) or not view.config.is_encoder_decoder:
        return False
    is_tied = any(name in tie.names for tie in view.ties)
    return is_tied or not base_view.may_be_tied(match.name)


def _target(
    name: str,
    module: str,
    leaf: str,
    base: Weight,
    tuned: Weight,
    view: Model,
    base_view: Model,
) -> Target | str:
    """Return the target that a tensor is, or why it is none."""
    shape = tuned.spec.shape
    if len(shape) < 2:
        return "a bias" if leaf == "bias" else "a vector, such as a norm"
    if 0 in shape:
        return "empty"
    types = view.config.model_types | base_view.config.model_types
    if len(shape) == 3 and leaf in FUSED_PARAMETERS:
        experts, rows, columns = shape
        transposed = bool(types & TRANSPOSED_MODEL_TYPES)
        out, into = (columns, rows) if transposed else (rows, columns)
        return Target(
            name, module, Kind.LINEAR, base, tuned, out, (into,), transposed, experts, True
        )
    if leaf != "weight":
        return "a parameter that is no module's weight"
    if len(shape) == 2 and is_embedding(module):
        rows, columns = shape
        return Target(
            name[: -len(".weight")], module, Kind.EMBEDDING, base, tuned, columns, (rows,), True
        )
    if len(shape) == 2:
        rows, columns = shape
        is_conv1d = module.rpartition(".")[2] in CONV1D_LEAVES and (
            view.is_conv1d(module) or base_view.is_conv1d(module)
        )
        if is_conv1d or view.is_turned(module):
            return Target(module, module, Kind.LINEAR, base, tuned, columns, (rows,), True)
        return Target(module, module, Kind.LINEAR, base, tuned, rows, (columns,))
    if module.rpartition(".")[2] in STACKED_LEAVES:
        return "stacked experts under a name that PEFT does not adapt"
    if shape[1] == 1 and shape[0] > 1:
        return "a depthwise convolution, whose delta no factors of PEFT express"
    return Target(module, module, Kind.CONV, base, tuned, shape[0], shape[1:])


def _nest(targets: list[Target]) -> None:
    """Say how deep raw parameters nest: those of one module, the first registered innermost."""
    by_module: dict[str, list[int]] = {}
    for index, target in enumerate(targets):
        if target.is_parameter:
            by_module.setdefault(target.module, []).append(index)
    for places in by_module.values():
        order = sorted(
            places,
            key=lambda i: FUSED_PARAMETERS.index(targets[i].name.rpartition(".")[2]),
        )
        for depth, place in enumerate(reversed(order)):
            targets[place] = replace(targets[place], nesting=depth)
