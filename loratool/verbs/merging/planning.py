"""Plan a merge: open the inputs, decide what becomes of every tensor, lay out the output."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from os import PathLike
from typing import Any, Final

from loratool.adapter.model import Adapter, unknown_scale
from loratool.adapter.problems import check_adapter
from loratool.adapter.selectors import selector
from loratool.base.config_edits import ConfigChanges
from loratool.base.fitting import as_spelled
from loratool.base.model import Model, open_model
from loratool.base.placing import with_places
from loratool.base.refusals import check_base
from loratool.base.replication import layer_ranges
from loratool.base.ties import have_same_values
from loratool.base.trained_on import training_notes
from loratool.codecs.codec import CodedTensor
from loratool.codecs.weights import Weight
from loratool.errors import BaseModelError, MergeError, OptionError, UnsupportedError
from loratool.files.containers import container_of
from loratool.files.dtypes import DTYPES, OUTPUT_DTYPES
from loratool.files.links import NOT_FILES
from loratool.files.places import located, origin_of
from loratool.files.spec import StoredTensor, TensorSpec
from loratool.names.one_model import check_one_model
from loratool.names.pipelines import AVERAGES, FIRST, SECOND, UNTRAINED
from loratool.names.strengths import Weights, recorded_weights, with_strengths
from loratool.names.tied import EMBEDDING_LEAVES, HEAD_LEAVES
from loratool.plan.history import History, Source, as_recorded
from loratool.plan.model import Blend, Edit, ModelPlan, SetRows, Step
from loratool.schemes.opening import open_adapter
from loratool.verbs.arguments import dtype_name, one_or_more
from loratool.verbs.merging.cards import licence_notes, merged_card
from loratool.verbs.merging.coding import (
    QUANTIZED,
    check_quantized,
    decoded_steps,
    decoding_notes,
    written,
)
from loratool.verbs.merging.companions import accompanied
from loratool.verbs.merging.context import Changes, Share
from loratool.verbs.merging.extras import plan_extras
from loratool.verbs.merging.files import indices, keeps_container, output_files, writes_folder
from loratool.verbs.merging.sidecars import collect_sidecars
from loratool.verbs.merging.sites import plan_sites
from loratool.verbs.merging.tied import Untied, row_notes, settle_ties, unknown_ties

__all__ = ["plan_merge"]

AnyPath = str | PathLike[str]
LABEL_HEADS: Final = (
    "classifier",
    "score",
    "qa_outputs",
    "classifier.out_proj",
    "classifier.linear_out",
    "classification_head.out_proj",
    "logits_proj",
    "cls_classifier",
    "distillation_classifier",
)
"""Modules with one output for each label; what feeds them (``pre_classifier``) has others."""
VOCABULARY_BIASES: Final = (
    "final_logits_bias",
    "lm_head.bias",
    "predictions.bias",
    "predictions.decoder.bias",
)
"""Tensors with one entry for each token, which have to be resized with the embedding."""


def merge_options(
    count: int,
    *,
    weights: Weights,
    dtype: str | None,
    alpha: float | None,
    adapter_name: str | None,
    skip: Sequence[str],
    enable_lora: Sequence[bool],
    quantized: str,
    allow_nonfinite: bool,
    no_card: bool,
) -> dict[str, Any]:
    """Return what is asked of a merge of ``count`` adapters as it is recorded.

    Raises:
        OptionError: Something is no weight, or no dtype.
    """
    return {
        "weights": tuple(recorded_weights(weights, count)) if weights else (),
        "dtype": dtype_name(dtype),
        "alpha": alpha,
        "adapter_name": adapter_name,
        "skip": tuple(one_or_more(skip)),
        "enable_lora": as_recorded(enable_lora),
        "quantized": quantized if quantized != QUANTIZED[0] else None,
        "allow_nonfinite": allow_nonfinite or None,
        "no_card": no_card or None,
    }


def plan_merge(
    base: AnyPath | None,
    adapters: Sequence[AnyPath] | AnyPath,
    *,
    weights: Weights = (),
    dtype: str | None = None,
    alpha: float | None = None,
    adapter_name: str | None = None,
    skip: Sequence[str] = (),
    enable_lora: Sequence[bool] = (),
    quantized: str = "dequantize",
    allow_nonfinite: bool = False,
    no_card: bool = False,
    output: AnyPath | None = None,
) -> ModelPlan:
    """Decide what a merge writes, from headers alone; the arguments are those of :func:`merge`.

    ``allow_nonfinite`` decides nothing here, and is recorded with the others.

    Raises:
        LoratoolError: The adapters do not fit, would leave a key unused, or change nothing.
    """
    adapters, skip, dtype = one_or_more(adapters), one_or_more(skip), dtype_name(dtype)
    if not adapters:
        raise OptionError("merge", "no adapter was given")
    told: list[str] = []
    if base is None:
        from loratool.verbs.merging.recorded import recorded_base

        base, said = recorded_base(adapters[0], adapter_name=adapter_name)
        told.append(f"the base is {origin_of(base) or base}: the adapter records {said!r}")
    model = open_model(located(base))
    opened = [
        _opened(
            path,
            model,
            adapter_name=adapter_name,
            alpha=alpha,
            skip=skip,
            enabled=enable_lora,
        )
        for path in adapters
    ]
    opened = [as_spelled(adapter, model) for adapter in opened]
    if model.factors and _is_one_file(model, opened):
        model = model.as_unwrapped()
    notes = [*told, *model.notes, *check_base(model), *_absent_sidecars(model)]
    for adapter in opened:
        check_adapter(adapter)
    check_one_model(opened, has_base=True)
    layers = _common_replication(opened)
    check_quantized(model, quantized, dtype=dtype, is_replicated=layers is not None)
    tasks = [str(adapter.field("task_type")) for adapter in opened]
    view = model.as_trained(tasks=tasks, layers=layers)
    opened = [with_places(adapter, view) for adapter in opened]
    complete = [accompanied(adapter, view, skip) for adapter in opened]
    opened, strengths, left_out = with_strengths([each.adapter for each in complete], weights)
    if not any(adapter.sites or adapter.extras for adapter in opened):
        raise MergeError("merge", "every weight is 0, so the merge would change nothing")
    notes += [*(note for each in complete for note in each.notes), *left_out]
    for adapter in opened:
        notes += [f"{adapter.path}: {note}" for note in adapter.notes]
        if unknown := unknown_scale(adapter):
            notes.append(f"{adapter.path}: {unknown} (--alpha says otherwise)")
        recorded = adapter.base_model
        notes += [f"{adapter.path}: {note}" for note in training_notes(recorded, model)]
    notes += _idle_patterns(skip, opened)
    notes += _expert_notes(opened, model)
    shares = [Share.of(*pair) for pair in zip(opened, strengths, strict=True)]
    for share in shares:
        plan_extras(share, view)
        plan_sites(share, view)
    notes += [note for share in shares for note in share.notes]
    untied = settle_ties(shares, view)
    if AVERAGES in view.components:
        notes.append(f"{UNTRAINED[AVERAGES]} that the file holds besides stay as they are")
    notes += untied.notes if untied else unknown_ties(shares, view)
    notes += row_notes(shares, view, untied)
    steps = _steps(view, shares, dtype, untied)
    if not any(step.is_changed for step in steps.values()):
        raise MergeError(opened[0].path, "the merge would change nothing")
    is_folder = writes_folder(model, output)
    placed = list(written(view, steps, quantized))
    decoded = decoded_steps(placed)
    notes += decoding_notes(model, decoded, quantized)
    if dtype is not None and keeps_container(model):
        notes.append("--dtype is for weights that were in codes; other floats keep their type")
    changes = _config_changes(view, steps, opened, dtype, decoded, untied=untied, layers=layers)
    if view.config.is_inside:
        _check_inside(changes, steps.values(), view)
        changes = ConfigChanges()
    if not is_folder and (changes.untie or changes.vocabulary):
        raise UnsupportedError(
            output or "OUT",
            "the merge changes what config.json has to say (ties or vocabulary)",
            hint="name a folder as the output",
        )
    asked = merge_options(
        len(opened),
        weights=weights,
        dtype=dtype,
        alpha=alpha,
        adapter_name=adapter_name,
        skip=skip,
        enable_lora=enable_lora,
        quantized=quantized,
        allow_nonfinite=allow_nonfinite,
        no_card=no_card,
    )
    history = History(
        "merge",
        (Source.of_model(model.path, model.raw.values()), *map(Source.of_adapter, opened)),
        asked,
    )
    files = output_files(
        view,
        placed,
        output if not is_folder else None,
        is_decoded=bool(decoded),
        history=history if not is_folder else None,
    )
    tokenizer = _with_tokenizer(changes, opened)
    sidecars, left = collect_sidecars(model, changes, tokenizer) if is_folder else ([], [])
    notes += [f"{name} was not carried over: {why}" for name, why in left if why in NOT_FILES]
    card = None
    if is_folder:
        sidecars += indices(model, files)
        notes += licence_notes(model, opened) if history.is_carded else ()
        bases = {adapter.base_model for adapter in opened}
        card, sidecars = merged_card(model, sidecars, bases, is_wanted=history.is_carded)
    return ModelPlan(
        files=tuple(files),
        sidecars=tuple(sidecars),
        is_folder=is_folder,
        adapters=tuple(opened),
        base=model.path,
        unused=tuple(key for adapter in opened for key in adapter.skipped),
        notes=tuple(dict.fromkeys(notes)),
        left_behind=tuple(left),
        stamps={
            **model.stamps,
            **{path: stamp for each in opened for path, stamp in each.stamps.items()},
            **{path: stamp for each in complete for path, stamp in each.stamps.items()},
        },
        history=history,
        card=card,
    )


def _absent_sidecars(model: Model) -> list[str]:
    """Return a note on what the cache of the hub lacks of the files that travel along."""
    if origin_of(model.path) is None:
        return []
    from loratool.files.hub.cache import absent_sidecars, snapshot_of

    snapshot = snapshot_of(model.path)
    lost = absent_sidecars(snapshot) if snapshot is not None else []
    if snapshot is None or not lost:
        return []
    return [
        f"the cache lacks {', '.join(lost[:4])}{' and more' if len(lost) > 4 else ''} of "
        f"{snapshot.repo}, which the output lacks too: 'hf download {snapshot.repo}' fetches all"
    ]


def _check_inside(changes: ConfigChanges, steps: Iterable[Step], base: Model) -> None:
    """Refuse a merge that changes what the weights' own file says of the model.

    Raises:
        UnsupportedError: It does: the vocabulary, the layers, or what kind of model it is. Or it
            has a tensor that no loader expects.
    """
    added = (step.spec.name for step in steps if step.added)
    name = next((name for name in added if not base.layout.can_add(name, base.config)), None)
    if name is not None:
        untied = base.hidden.get(name)
        raise UnsupportedError(
            base.path,
            f"the merge adds {name!r}, which loaders of {base.config.called} do not look for"
            + (f": {untied!r} is both for them" if untied else ""),
            hint="leave it out with --skip, or merge into the model of transformers",
        )
    what = {
        "the vocabulary": changes.vocabulary,
        "the number of layers": changes.layers,
        "the head": changes.labels,
    }
    changed = next((words for words, value in what.items() if value), None)
    if changed is not None:
        raise UnsupportedError(
            base.path,
            f"the merge changes {changed}, which the key values of the file tell",
            hint="merge into the model of transformers, and convert that",
        )


def _opened(
    path: AnyPath,
    model: Model,
    *,
    adapter_name: str | None,
    alpha: float | None,
    skip: Sequence[str],
    enabled: Sequence[bool],
) -> Adapter:
    """Open an adapter; the names of the base are looked at where those of the file leave any open.

    Raises:
        LoratoolError: It cannot be read.
    """
    given = partial(
        open_adapter,
        path,
        adapter_name=adapter_name,
        alpha=alpha,
        skip=skip,
        enabled=enabled,
        base=model.told,
    )
    found = given()
    if not found.unresolved:
        return found
    return given(base_modules=model.paths)


def _is_one_file(model: Model, adapters: Sequence[Adapter]) -> bool:
    """Whether the adapters are what the base's own files hold beside its weights."""
    own = {shard.path.resolve() for shard in model.shards}
    return all(adapter.weights.resolve() in own for adapter in adapters)


def _common_replication(adapters: Sequence[Adapter]) -> list[int] | None:
    """Return the layers that all adapters agree to replicate, or ``None``."""
    stacks = [layer_ranges(a.field("layer_replication"), a.path) for a in adapters]
    if any(stack != stacks[0] for stack in stacks):
        raise MergeError(adapters[0].path, "the adapters disagree on layer_replication")
    return stacks[0]


def _steps(
    view: Model, shares: list[Share], dtype: str | None, untied: Untied | None
) -> dict[str, Step]:
    """Return how every output tensor comes about, those of the base first."""
    names = dict.fromkeys(view.tensors)
    names |= dict.fromkeys(name for share in shares for name in share.changes)
    if untied:
        names |= dict.fromkeys(untied.names)
    steps: dict[str, Step] = {}
    for name in names:
        changes = [share.changes[name] for share in shares if share.changes.get(name)]
        stored = view.tensors.get(name)
        if not changes and dtype is None and stored is not None and stored.spec.name == name:
            steps[name] = Step(stored.spec, stored, base=stored)  # as most are
            continue
        source = stored
        if stored is None and untied and name in untied.names:
            source = view.weight(name)
        steps[name] = _step(name, stored, source, changes, dtype)
    return steps


def _step(
    name: str,
    stored: Weight | None,
    source: Weight | None,
    changes: list[Changes],
    dtype: str | None,
) -> Step:
    replacement = _only_one(name, [c.replacement for c in changes], "replace this tensor")
    resized = _only_one(name, [c.base for c in changes], "come with a resized base tensor")
    shape = _grown(name, [c.grown for c in changes]) if replacement is None else None
    original = source
    source = replacement or resized or source
    assert source is not None
    kept = original.spec.dtype if original is not None else source.spec.dtype
    edits = tuple(edit for change in changes for edit in change.edits)
    _check_edits(name, edits, source)
    if edits and not DTYPES[kept].is_mergeable:
        raise BaseModelError(name, f"is {kept}; a delta can only be added to floating point")
    if dtype is not None and DTYPES[kept].is_mergeable and _follows(original):
        kept = OUTPUT_DTYPES[dtype]
    return Step(
        spec=TensorSpec(name, kept, source.spec.shape if shape is None else shape),
        source=source,
        edits=edits,
        base=resized or original,
        added=stored is None,
        replaced=stored is not None and source is not stored,
    )


def _follows(original: Weight | None) -> bool:
    """Whether a tensor is written as ``--dtype`` says.

    Where coded weights lie beside others, that says what they become; the others keep theirs.
    """
    if original is None or isinstance(original, CodedTensor):
        return True
    return not container_of(original.path).keeps_codes


def _only_one(name: str, tensors: Sequence[StoredTensor | None], words: str) -> StoredTensor | None:
    """Return the one tensor that several adapters agree on, or ``None`` where there is none."""
    given = [tensor for tensor in tensors if tensor is not None]
    if any(not have_same_values(given[0], other) for other in given[1:]):
        raise MergeError(name, f"two adapters each {words}, and differ", hint="merge only one")
    return given[0] if given else None


def _grown(name: str, shapes: Sequence[tuple[int, ...] | None]) -> tuple[int, ...] | None:
    """Return the shape that all adapters let a tensor grow to, or ``None``."""
    given = {shape for shape in shapes if shape is not None}
    if len(given) > 1 or (given and None in shapes):
        raise MergeError(name, "grows to another shape with one adapter than with another")
    return next(iter(given), None)


def _check_edits(name: str, edits: Sequence[Edit], source: Weight) -> None:
    """Make sure that several adapters' edits of one tensor can be carried out together."""
    rows: set[int] = set()
    for edit in edits:
        if isinstance(edit, Blend) and edit.tensor.spec.shape != source.spec.shape:
            raise MergeError(
                name,
                f"the adapters disagree on its shape: {list(edit.tensor.spec.shape)} and "
                f"{list(source.spec.shape)}",
            )
        if isinstance(edit, SetRows) and edit.weight == 1:
            twice = rows & set(edit.indices)
            if twice:
                raise MergeError(name, f"two adapters each set row {min(twice)}")
            rows |= set(edit.indices)


def _config_changes(
    view: Model,
    steps: dict[str, Step],
    adapters: Sequence[Adapter],
    dtype: str | None,
    decoded: Sequence[Step],
    *,
    untied: Untied | None,
    layers: list[int] | None,
) -> ConfigChanges:
    vocabulary = None
    labels = _labels(steps)
    for name, step in steps.items():
        leaf = name.rpartition(".")[0].rpartition(".")[2]
        if leaf in EMBEDDING_LEAVES | HEAD_LEAVES and name in view.tensors:
            old, new = view.shape(name), step.spec.shape
            if old[:1] != new[:1]:
                vocabulary = (old[0], new[0])
    if vocabulary:
        _check_vocabulary(steps, *vocabulary)
    tasks = [a.field("task_type") for a in adapters]
    return ConfigChanges(
        untie=untied is not None and untied.in_config,
        dtype=dtype,
        vocabulary=vocabulary,
        task=next((str(task) for task in tasks if task), None) if labels else None,
        labels=labels,
        layers=tuple(layers) if layers else None,
        architecture=_architecture(adapters) if labels else None,
        decoded=DTYPES[decoded[0].spec.dtype].torch_name if decoded else None,
    )


def _labels(steps: dict[str, Step]) -> int | None:
    """Return how many outputs the head has that the adapters bring, or ``None`` without one.

    Raises:
        MergeError: There are several, and they differ.
    """
    heads = {
        name: step.spec.shape[0]
        for name, step in steps.items()
        if (step.added or step.replaced) and len(step.spec.shape) == 2 and _is_label_head(name)
    }
    if len(set(heads.values())) > 1:
        listed = ", ".join(f"{name!r} {count}" for name, count in heads.items())
        raise MergeError(
            next(iter(heads)),
            f"is one of several heads with different numbers of outputs ({listed}), and "
            "config.json has one number of labels",
            hint="leave out all but one with --skip",
        )
    return next(iter(heads.values()), None)


def _is_label_head(name: str) -> bool:
    module = name.removesuffix(".weight")
    return module != name and f".{module}".endswith(tuple(f".{head}" for head in LABEL_HEADS))


def _check_vocabulary(steps: dict[str, Step], old: int, new: int) -> None:
    """Make sure that everything with a row for each token has the new number of rows.

    Raises:
        MergeError: The adapter resizes one of several; no file has the new rows of the other.
    """
    for name, step in steps.items():
        leaf = name.rpartition(".")[0].rpartition(".")[2]
        is_matrix = leaf in EMBEDDING_LEAVES | HEAD_LEAVES and len(step.spec.shape) == 2
        shape = step.spec.shape if is_matrix else step.spec.shape[-1:]
        if (is_matrix or name.endswith(VOCABULARY_BIASES)) and shape[:1] == (old,):
            raise MergeError(
                name,
                f"has {old} tokens, but the adapter resizes the vocabulary to {new}, and no file "
                "holds the new rows of this tensor",
                hint="save the adapter with save_embedding_layers=True",
            )


def _architecture(adapters: Sequence[Adapter]) -> str | None:
    """Return the class that the adapters were trained on, if they say so and it is a classifier."""
    for adapter in adapters:
        mapping = adapter.field("auto_mapping")
        name = mapping.get("base_model_class") if isinstance(mapping, dict) else None
        if isinstance(name, str) and name.endswith("Classification"):
            return name
    return None


def _with_tokenizer(changes: ConfigChanges, adapters: Sequence[Adapter]) -> Adapter | None:
    """Return the adapter that comes with the tokenizer of a changed vocabulary."""
    if changes.vocabulary is None:
        return None
    return next((a for a in adapters if (a.folder / "tokenizer_config.json").is_file()), None)


def _idle_patterns(skip: Sequence[str], adapters: Sequence[Adapter]) -> Iterator[str]:
    """Yield that a pattern of ``--skip`` leaves nothing out; a marked one may mean other names."""
    skipped = [key for adapter in adapters for key in adapter.skipped]
    for text in skip:
        pattern = selector(text, "--skip", bare_is_expression=True)
        is_idle = not any(map(pattern.matches, skipped))
        if is_idle and not (pattern.is_marked and skipped):
            yield f"--skip {text!r} matches nothing"


def _expert_notes(adapters: Sequence[Adapter], base: Model) -> Iterator[str]:
    """Yield that an adapter is of one of the base's two experts, and does not tell of which."""
    for adapter in adapters:
        is_told = any(f"{FIRST}." in key for key in adapter.tensors)
        is_first = adapter.components & {FIRST, SECOND} == {FIRST}
        if is_first and not is_told and SECOND in base.components:
            yield (
                f"{adapter.path}: its names do not tell for which of two experts it is, and it is "
                f"merged into {FIRST}; if it is the other's, convert it --to diffusers with "
                f"--component {SECOND} first"
            )
