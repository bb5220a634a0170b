"""What people see of an adapter or a model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, zip_longest
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Final

from loratool.display.document import Block, Column, Document, Facts, Group, Row, Table
from loratool.display.figures import counted, human_bytes, human_count, span, sparkline
from loratool.display.folding import fold_names
from loratool.display.grouping import kind_of
from loratool.files.places import origin_of
from loratool.names.kinds import Position, positions_of
from loratool.names.sections import module_groups, section_of, shared_path
from loratool.verbs.inspection.advised import advice_blocks

if TYPE_CHECKING:
    from loratool.verbs.inspect import AdapterInfo, ModelInfo, ModuleInfo
    from loratool.verbs.spectrum import Spectrum

__all__ = ["adapter_document", "model_document"]

SAID: Final = "general."
"""What the keys begin with of what a file says of any model."""
LONG: Final = 80
LONGEST: Final = 300
"""How much of what an adapter says is shown; all of it is in the JSON."""
LONGEST_FOLDED: Final = 1000
MOST_FOLDED: Final = 40
"""How much of names that do not fold is shown."""
MOST_TAGS: Final = 8
SHORTEST: Final = 12
"""How many digits of a hash tell files apart."""


def adapter_document(
    info: AdapterInfo, *, unfolded: bool = False, names_all: bool = False
) -> Document:
    """Return what an adapter is, its modules, spectra and other tensors.

    Args:
        info: What was found.
        unfolded: Whether every module has a row of its own.
        names_all: Whether modules are named also where their spectra are told by parts.
    """
    return Document.of(_adapter_blocks(info, unfolded, names_all), info.notes)


def _named(path: Path) -> str:
    """Return a path, or what the hub calls it, be it in the cache or not yet."""
    origin = origin_of(path)
    return str(origin if origin is not None else path)


def _adapter_blocks(info: AdapterInfo, unfolded: bool, names_all: bool) -> Iterator[Block]:
    adapter = info.adapter
    facts: list[tuple[str, str]] = [
        ("adapter", _named(adapter.path)),
        ("scheme", adapter.scheme),
        ("base model", info.about.base or "not said"),
        *_said_of(info),
        ("parameters", human_count(adapter.parameters)),
        ("size", human_bytes(adapter.nbytes)),
        ("modules", str(len(info.adapter.sites))),
    ]
    if adapter.name:
        facts.append(("name in keys", adapter.name))
    if adapter.beside:
        base = info.base
        words = (
            f"{counted(base['tensors'], 'tensor')}, {human_count(base['parameters'])} parameters"
        )
        facts.append(("and a base", f"{words}, {human_bytes(base['bytes'])}"))
    yield Facts(tuple(facts))
    yield _modules(info, unfolded, is_named=names_all or not info.spectra)
    if info.spectra:
        yield _spectra(info, unfolded)
    extras = adapter.extras if unfolded else adapter.extras[:MOST_FOLDED]
    title = "not part of a delta"
    if len(extras) < len(adapter.extras):
        count = human_count(len(adapter.extras))
        title += f", the first {len(extras)} of {count}; --modules names all"
    yield Table.of(
        title,
        (Column("tensor", folds=True, is_kept=True), "what", "dtype", "shape"),
        [
            (e.name, e.kind.value, e.tensor.spec.dtype, str(list(e.tensor.spec.shape)))
            for e in extras
        ],
    )
    if info.advice is not None:
        yield from advice_blocks(info.advice)


def _said_of(info: AdapterInfo) -> Iterator[tuple[str, str]]:
    """Yield what an adapter says of itself beside its base, as far as it does."""
    said = info.about
    trained = (
        _times(said.steps, "step"),
        _times(said.epochs, "epoch"),
        _times(said.images, "image"),
        said.resolution,
        _optimizer(said.optimizer),
    )
    shapes = [f"{shape} ({count})" for shape, count in said.buckets]
    tags = [f"{tag} ({count})" for tag, count in said.tags]
    hashes = {**said.hashes, **info.hashes}
    for name, text in (
        ("family", info.adapter.family or said.architecture),
        ("title", said.title),
        ("author", said.author),
        ("licence", said.license),
        ("trigger words", ", ".join(said.triggers)),
        ("tags", ", ".join(_first(tags, MOST_TAGS))),
        ("trained", ", ".join(filter(None, trained))),
        ("buckets", ", ".join(_first(shapes, MOST_TAGS)) if len(shapes) > 1 else ""),
        ("hashes", ", ".join(f"{name} {_short(name, text)}" for name, text in hashes.items())),
    ):
        if text:
            yield name, text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def _times(count: int | None, noun: str) -> str:
    return "" if count is None else counted(count, noun)


def _first(texts: Sequence[str], count: int) -> list[str]:
    return [*texts[:count], *(["…"] if len(texts) > count else [])]


def _optimizer(text: str | None) -> str:
    """Return the name of an optimiser without its package and its settings."""
    return (text or "").partition("(")[0].rpartition(".")[2]


def _short(name: str, text: str) -> str:
    """Return a hash as short as tools show it."""
    return (
        text[:SHORTEST] if name in ("AutoV3", "sshs_model_hash", "modelspec.hash_sha256") else text
    )


def _modules(info: AdapterInfo, unfolded: bool, *, is_named: bool) -> Table:
    adapter = info.adapter
    sections: dict[str, list[ModuleInfo]] = defaultdict(list)
    for module in info.modules:
        sections[section_of(module.module, adapter.components, adapter.family)].append(module)
    by_parts = not (unfolded or is_named) and len(sections) > 1
    groups = []
    for name, modules in sections.items():
        shared = "" if unfolded or not name else shared_path([module.module for module in modules])
        words = f"{name} ({shared})" if shared else name
        rows = tuple(_row(*alike, shared, unfolded) for alike in _alike(modules, unfolded))
        if by_parts:
            rows = tuple((words, *row[1:]) for row in rows)
        groups.append(Group("" if by_parts else words, rows))
    columns = (
        Column("part" if by_parts else "modules", folds=True, is_kept=True),
        *(() if unfolded else (Column("count", is_kept=True),)),
        *map(Column, ("kind", "rank", "alpha", "scale", "in", "out", "dtype")),
    )
    return Table.grouped("", columns, groups)


def _spectra(info: AdapterInfo, unfolded: bool) -> Table:
    titles: tuple[str, ...] = ("‖delta‖", "stable", "effective", "σ (log)")
    row = _spectra_row
    if unfolded:
        titles = ("‖delta‖", "σ₁", "stable", "effective", "90 %", "99 %", "99.9 %", "σ (log)")
        row = _whole_spectra_row
    columns = (
        Column("modules", folds=True, is_kept=True),
        *(Column(title, is_kept=True) for title in titles),
    )
    names = [spectrum.module for spectrum in info.spectra]
    adapter = info.adapter
    positions = positions_of(names, adapter.components, adapter.family)
    if unfolded or not all(position.section for position in positions):
        groups = module_groups(info.spectra, names, row, family=adapter.family, unfolded=unfolded)
    else:
        groups = _parts(info.spectra, positions)
    return Table.grouped("spectra of the deltas", columns, groups)


def _parts(spectra: Sequence[Spectrum], positions: Sequence[Position]) -> list[Group]:
    """Return rows for what is alike in the layers of each part, whichever layer it is in."""
    parts: dict[str, dict[str, list[tuple[Spectrum, str]]]] = {}
    for spectrum, position in zip(spectra, positions, strict=True):
        parent = kind_of(position.kind) if "." in position.kind else ""
        members = parts.setdefault(position.section, {}).setdefault(parent, [])
        members.append((spectrum, position.kind))
    return [
        Group(
            section,
            tuple(
                _spectra_row(
                    tuple(fold_names(list(dict.fromkeys(kind for _, kind in members)))),
                    [spectrum for spectrum, _ in members],
                )
                for members in parents.values()
            ),
        )
        for section, parents in parts.items()
    ]


def _spectra_row(folded: tuple[str, ...], members: Sequence[Spectrum]) -> Row:
    return (
        folded,
        span(s.frobenius_norm for s in members),
        span((s.stable_rank for s in members), ".1f"),
        span((s.effective_rank for s in members), ".1f"),
        sparkline(_mean([s.singular_values for s in members])),
    )


def _whole_spectra_row(folded: tuple[str, ...], members: Sequence[Spectrum]) -> Row:
    name, norm, stable, effective, bars = _spectra_row(folded, members)
    largest = span(s.spectral_norm for s in members)
    ranks = (span((s.energy_ranks[each] for s in members), "d") for each in members[0].energy_ranks)
    return (name, norm, largest, stable, effective, *ranks, bars)


def _mean(spectra: Sequence[tuple[float, ...]]) -> list[float]:
    return [fmean(values) for values in zip_longest(*spectra, fillvalue=0.0)]


def _alike(
    modules: Sequence[ModuleInfo], unfolded: bool
) -> list[tuple[list[str], list[ModuleInfo]]]:
    """Group modules that agree in everything but their place; the rarest groups come first."""
    if unfolded:
        return [([module.module], [module]) for module in modules]
    alike: dict[tuple[object, ...], list[ModuleInfo]] = defaultdict(list)
    for module in modules:
        alike[
            (
                module.kind,
                module.variant,
                module.rank,
                module.alpha,
                module.scale,
                module.dtype,
                module.experts,
            )
        ].append(module)
    ordered = sorted(alike.values(), key=len)
    return [(fold_names([module.module for module in group]), group) for group in ordered]


def _row(names: list[str], members: Sequence[ModuleInfo], shared: str, unfolded: bool) -> Row:
    first = members[0]
    kind = first.kind if first.variant == "lora" else f"{first.kind}, {first.variant}"
    if first.experts > 1:
        kind += f", {first.experts} experts"
    local = [name.removeprefix(f"{shared}.") for name in names]
    return (
        tuple(local) if unfolded else _few(local),
        *(() if unfolded else (len(members),)),
        kind,
        first.rank,
        "none" if first.alpha is None else f"{first.alpha:g}",
        f"{first.scale:.6g}",
        _sizes(module.in_features for module in members),
        _sizes(module.out_features for module in members),
        first.dtype,
    )


def _few(names: Sequence[str]) -> tuple[str, ...]:
    """Return folded names as far as somebody reads them; ``--modules`` names all."""
    cut = (name if len(name) <= LONGEST_FOLDED else f"{name[:LONGEST_FOLDED]}…" for name in names)
    more = len(names) - MOST_FOLDED
    rest = (f"and {human_count(more)} more; --modules names all",) if more > 0 else ()
    return (*islice(cut, MOST_FOLDED), *rest)


def _sizes(values: Iterable[int]) -> str:
    unique = sorted(set(values))
    return ", ".join(map(str, unique)) if len(unique) < 3 else f"{unique[0]} to {unique[-1]}"


def model_document(info: ModelInfo) -> Document:
    """Return what a model is."""
    model, coded = info.model, info.quantization
    words = "no"
    if coded is not None:
        words = f"{coded.modules} weights in {coded.format}" if coded.modules else "not read"
    tied = {True: "yes", False: "no", None: "not said"}[info.is_tied]
    parts = [f"{name} {human_count(count)}" for name, count in info.components.items()]
    what = [
        ("type", info.model_type or "not said"),
        ("architecture", ", ".join(info.architectures) or "not said"),
    ]
    if parts:
        what = [("family", model.family or "not known"), ("components", ", ".join(parts))]
    facts = [
        ("model", _named(model.path)),
        *what,
        ("parameters", human_count(info.parameters)),
        ("size", human_bytes(model.bytes)),
        ("tensors", str(len(model.stored))),
        ("shards", str(len(model.shards))),
        ("dtypes", ", ".join(f"{n} × {dtype}" for dtype, n in info.dtypes.items())),
        ("quantised", words),
        *([] if parts else [("tied embeddings", tied)]),
        *_said(info),
    ]
    return Document((Facts(tuple(facts)),), info.notes)


def _said(info: ModelInfo) -> list[tuple[str, str]]:
    """Return what a file with key values says of its model, but for what is told already."""
    if not info.model.config.is_inside:
        return []
    said = {key: text for key, text in info.metadata.items() if key.startswith(SAID)}
    return [
        (key.removeprefix(SAID), text if len(text) <= LONG else f"{text[:LONG]}…")
        for key, text in said.items()
        if text != info.model_type
    ]
