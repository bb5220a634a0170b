"""Which sites of several adapters are one module, and what cannot be computed with at all."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from loratool.adapter.model import HEAD_LEAVES, Adapter, Kind, Site, in_registered_order
from loratool.adapter.problems import (
    CONVERT_HINT,
    check_plain,
    check_sound,
    check_unmixed,
    plain_hint,
)
from loratool.adapter.slots import Slot
from loratool.errors import AdapterError, UnsupportedError
from loratool.files.container import read_bytes
from loratool.files.dtypes import DTYPES
from loratool.files.spec import StoredTensor
from loratool.names.canonical import canonical_path
from loratool.names.families import family_named
from loratool.names.family import Family
from loratool.names.one_model import check_one_model
from loratool.names.paths import families_of_modules, is_fused
from loratool.names.pipelines import BACKBONES, SECOND, component_of
from loratool.names.strengths import Strength
from loratool.values.expr import computed_dtype
from loratool.verbs.algebra.shape import DeltaShape

__all__ = ["Joint", "Term", "check_computable", "is_one_side", "join", "module_name"]

EXPERTS: Final = "all experts"


@dataclass(frozen=True, slots=True)
class Term:
    """What one adapter adds to a module: ``weight · scale · B @ A`` of its site."""

    adapter: Adapter
    site: Site
    weight: float


@dataclass(frozen=True, slots=True)
class Joint:
    """One module, with what each adapter that has it adds to it.

    Attributes:
        name: What it is called in reports; an expert parameter goes by its own path.
        terms: The adapters' parts.
        shape: What it is but for its rank.
        twin_of: Name of the embedding whose factors this tied head shares, transposed.
        twin_scale: The head's scale over that of the embedding.
        ranks_add_up: Whether the result can have the sum of the ranks, else only the largest.
        group: The rank group that it is in, where that is not for PEFT's patterns to say.
    """

    name: str
    terms: tuple[Term, ...]
    shape: DeltaShape
    twin_of: str | None = None
    twin_scale: float = 1.0
    ranks_add_up: bool = True
    group: str | None = None

    @property
    def rank_group(self) -> str:
        """Modules with the same of this share a rank.

        Both projections of an ``nn.MultiheadAttention`` go by one pattern, and a tied head by
        its embedding. All raw parameters and all experts share theirs, for PEFT warns about
        any pattern that means a parameter, and fuses experts of one rank only.
        """
        if self.group is not None or self.twin_of is not None:
            return self.group or self.twin_of or ""
        return EXPERTS if self.shape.needs_default else self.shape.pattern_path

    @property
    def full_rank(self) -> int:
        """The rank at which nothing is lost: of the factors side by side, or of the matrix."""
        ranks = [term.site.rank for term in self.terms]
        most = sum(ranks) if self.ranks_add_up else max(ranks)
        return min(most, self.shape.smallest_side)

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        """The stored tensors of all terms."""
        return tuple(stored for term in self.terms for stored in term.site.slots.values())

    @property
    def nbytes(self) -> int:
        """Bytes that have to be read."""
        return sum(stored.spec.nbytes for stored in self.tensors)


def check_computable(adapter: Adapter, *, verb: str) -> None:
    """Refuse what has no delta of its own, or one that is not ``scale · B @ A``.

    Raises:
        UnsupportedError: The delta depends on the base, or on the input.
        AdapterError: The adapter is broken or contradicts itself.
    """
    check_unmixed(adapter)
    config = adapter.config
    if not adapter.sites:
        raise AdapterError(adapter.path, f"has no delta to {verb}")
    for site in adapter.sites:
        check_plain(site, adapter, is_named=False)
        check_sound(site, adapter)
    for site in adapter.sites:
        if site.variant.undetermined:
            raise UnsupportedError(
                f"{adapter.path}: {site.label}",
                site.variant.undetermined.format(verb=verb),
                hint=plain_hint(site, adapter),
            )
    if config is None:
        return
    if config.flag("arrow_config"):
        raise UnsupportedError(adapter.path, "an Arrow router mixes adapters by input")
    if config.init.changes_base:
        raise UnsupportedError(adapter.path, config.init.refusal, hint=CONVERT_HINT)


def module_name(site: Site) -> str:
    """Return what a site is called in reports and told apart by: module, or its parameter."""
    if not site.parameters:
        return site.label
    last = len(site.parameters) - 1
    return site.parameters[max(0, last - site.nesting)]


def join(
    adapters: Sequence[Adapter],
    strengths: Sequence[Strength] = (),
    *,
    dtype: str | None = None,
    to_write: bool = True,
) -> tuple[tuple[Joint, ...], tuple[str, ...]]:
    """Return the union of the modules of ``adapters``, and notes on how they were matched.

    Args:
        adapters: The adapters.
        strengths: How strong the modules of each are; 1 if not given.
        dtype: The dtype to write (``F32``), instead of that of the factors.
        to_write: Whether they will be written, with what PEFT demands of an adapter as a whole:
            ties, and one switch for biases.

    Raises:
        UnsupportedError: No adapter can hold the union, or they are for different models.
        AdapterError: Two adapters see one module as matrices of different shapes or kinds.
    """
    check_one_model(adapters)
    _check_namings(adapters)
    groups: dict[str, list[Term]] = {}
    notes: list[str] = []
    strengths = strengths or [Strength()] * len(adapters)
    for adapter, strength in zip(adapters, strengths, strict=True):
        spelling, renamed = _spelling(adapter, list(groups))
        if renamed:
            notes.append(
                f"{adapter.path}: {renamed} modules are spelled otherwise than in "
                f"{adapters[0].path}, such as {next(k for k, v in spelling.items() if k != v)!r}; "
                "they are taken as the same"
            )
        for site in adapter.sites:
            if not site.is_plain:
                check_plain(site, adapter, is_named=False)
            name = spelling[module_name(site)]
            terms = groups.setdefault(name, [])
            if any(term.adapter is adapter for term in terms):
                raise AdapterError(
                    f"{adapter.path}: {site.label}", f"means the same module {name!r} as another"
                )
            terms.append(Term(adapter, site, strength.of(site)))
    nestings = _nestings(groups)
    joints = [
        _joint(name, tuple(terms), nestings.get(name), dtype) for name, terms in groups.items()
    ]
    if to_write:
        joints = _with_twins(_with_biases(joints), adapters)
    return tuple(joints), tuple(notes)


def _check_namings(adapters: Sequence[Adapter]) -> None:
    """Refuse to match modules that one adapter has fused and another has apart.

    Raises:
        UnsupportedError: The adapters are of one pipeline in both of its namings.
    """
    native = [a for a in adapters if a.is_native and (a.family is None or is_fused(a.family))]
    apart = [a for a in adapters if native and not a.is_native and _may_be_fused(a)]
    if apart:
        raise UnsupportedError(
            native[0].path,
            f"names its modules as the original checkpoint does, {apart[0].path} as diffusers",
            hint="convert one of them first, such as with --to diffusers",
        )
    named = {a.family for a in adapters if a.family is not None and is_fused(a.family)}
    for family in named if len(adapters) > 1 else ():
        _check_cuts(adapters, family_named(family))


def _check_cuts(adapters: Sequence[Adapter], family: Family) -> None:
    """Refuse to match modules of which one has outputs of another.

    Raises:
        UnsupportedError: Two adapters cut a projection, or order its outputs, in two ways.
    """
    seen: dict[tuple[bool, str], tuple[str, Adapter]] = {}
    for adapter in adapters:
        for site in adapter.sites:
            component, local = component_of(site.module)
            if component not in (None, *BACKBONES):
                continue
            made = family.from_native(local)
            for part in made.modules if made is not None else (local,):
                name, other = seen.setdefault((component == SECOND, part), (local, adapter))
                if name != local and other is not adapter:
                    raise UnsupportedError(
                        f"{adapter.path}: {site.label}",
                        f"has outputs in common with {name!r} of {other.path}, cut in another way",
                        hint="convert both first, such as with --to diffusers",
                    )


def _may_be_fused(adapter: Adapter) -> bool:
    """Whether original checkpoints fuse modules of what an adapter may be for."""
    families = families_of_modules([site.module for site in adapter.sites])
    return any(is_fused(family.name) for family in families)


def _spelling(adapter: Adapter, known: Sequence[str]) -> tuple[dict[str, str], int]:
    """Return by what name each module of ``adapter`` goes, and how many were renamed.

    Only where no module of it is known at all can it be a matter of spelling; then all that
    have exactly one counterpart take its name.
    """
    names = [module_name(site) for site in adapter.sites]
    same = {name: name for name in names}
    if not known or set(names) & set(known):
        return same, 0
    mine, theirs = (_by_canonical(paths) for paths in (names, known))
    matched = {
        mine[path][0]: theirs[path][0]
        for path in mine.keys() & theirs.keys()
        if len(mine[path]) == len(theirs[path]) == 1
    }
    return same | matched, len(matched)


def _by_canonical(names: Sequence[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for name in names:
        found[canonical_path(component_of(name)[1])].append(name)
    return found


def _nestings(groups: dict[str, list[Term]]) -> dict[str, int]:
    """Return how deep each adapted raw parameter nests in the union: the first one innermost."""
    by_module: dict[str, list[str]] = defaultdict(list)
    for name, terms in groups.items():
        if terms[0].site.parameters:
            by_module[name.rpartition(".")[0]].append(name)
    nestings: dict[str, int] = {}
    for names in by_module.values():
        ordered = in_registered_order(names)
        nestings |= {name: len(ordered) - 1 - place for place, name in enumerate(ordered)}
    return nestings


def _joint(name: str, terms: tuple[Term, ...], nesting: int | None, dtype: str | None) -> Joint:
    first = terms[0].site
    size = _shape(terms[0])
    for term in terms[1:]:
        site = term.site
        if (site.kind, bool(site.parameters)) != (first.kind, bool(first.parameters)):
            raise AdapterError(
                f"{term.adapter.path}: {site.label}",
                f"adapts {name!r} as {site.kind.value}, {terms[0].adapter.path} as "
                f"{first.kind.value}",
            )
        if _shape(term) != size:
            raise AdapterError(
                f"{term.adapter.path}: {site.label}",
                f"its delta has {_words(_shape(term))}, that of {terms[0].adapter.path} "
                f"{_words(size)}",
                hint="are they for the same base?",
            )
    out, into, experts = size
    dtypes = [
        term.site.slots[slot].spec.dtype
        for term in terms
        for slot in term.site.slots
        if slot in (Slot.DOWN, Slot.UP, Slot.EMBEDDING_DOWN, Slot.EMBEDDING_UP)
    ]
    is_parameter = bool(first.parameters)
    module = name.rpartition(".")[0] if is_parameter else name.replace(".base_layer", "")
    shape = DeltaShape(
        module=module,
        kind=first.kind,
        dtype=dtype or computed_dtype(dtypes),
        out=out,
        into=into,
        nesting=first.nesting if nesting is None else nesting,
        experts=experts,
        parameter=name if is_parameter else None,
        has_bias=any(Slot.UP_BIAS in term.site.slots for term in terms),
    )
    return Joint(name, terms, shape)


def _shape(term: Term) -> tuple[int, tuple[int, ...], int]:
    """Return rows of B, the shape of A without its rank, and the number of experts."""
    site = term.site
    assert site.down is not None and site.up is not None
    into = site.down.spec.shape[1:]
    if len(into) == 1:
        into = (site.variant.width(site),)
    return site.out_features, into, site.experts


def _words(shape: tuple[int, tuple[int, ...], int]) -> str:
    out, into, experts = shape
    size = " × ".join(str(size) for size in (out, *into))
    return f"the shape {size}" + (f" for {experts} experts" if experts > 1 else "")


def _with_biases(joints: list[Joint]) -> list[Joint]:
    """Give every module a bias beside B if one has it: PEFT has one switch for all.

    Raises:
        UnsupportedError: There is a module that can have none.
    """
    if not any(joint.shape.has_bias for joint in joints):
        return joints
    for joint in joints:
        if joint.shape.kind is Kind.EMBEDDING or joint.shape.parameter is not None:
            raise UnsupportedError(
                joint.name,
                "cannot have a bias beside B, which other modules have (lora_bias is one switch "
                "for all)",
            )
    return [replace(joint, shape=replace(joint.shape, has_bias=True)) for joint in joints]


def _with_twins(joints: list[Joint], adapters: Sequence[Adapter]) -> list[Joint]:
    """Mark heads whose factors are those of the embedding they are tied to, transposed."""
    if not any(a.config and a.config.flag("ensure_weight_tying") for a in adapters):
        return joints
    embeddings = [joint for joint in joints if joint.shape.kind is Kind.EMBEDDING]
    marked = []
    for joint in joints:
        twin = next((other for other in embeddings if _is_twin(joint, other)), None)
        ratios = _ratios(joint, twin) if twin is not None else set()
        if twin is not None and len(ratios) == 1:
            joint = replace(
                joint,
                twin_of=twin.name,
                twin_scale=ratios.pop(),
                shape=replace(joint.shape, is_target=False),
            )
        marked.append(joint)
    return marked


def is_one_side(joints: Sequence[Joint]) -> bool:
    """Whether an embedding or a head is among the modules without the other one, tied to it."""
    return not any(joint.twin_of is not None for joint in joints) and any(
        joint.shape.kind is Kind.EMBEDDING or joint.name.rpartition(".")[2] in HEAD_LEAVES
        for joint in joints
    )


def _ratios(head: Joint, table: Joint) -> set[float]:
    """Return the head's scale over the embedding's, as strong as they are, in each adapter.

    Where those differ no shared factors express the sum, and the two are written apart.
    """
    return {_ratio(one, other) for one, other in zip(head.terms, table.terms, strict=True)}


def _ratio(head: Term, table: Term) -> float:
    bottom = table.site.scaling.factor
    ratio = head.site.scaling.factor / bottom if bottom else 1.0
    return ratio if head.weight == table.weight else ratio * head.weight / table.weight


def _is_twin(head: Joint, table: Joint) -> bool:
    if head.shape.kind is not Kind.LINEAR or head.name.rpartition(".")[2] not in HEAD_LEAVES:
        return False
    if [term.adapter for term in head.terms] != [term.adapter for term in table.terms]:
        return False
    return all(
        one.adapter.config is not None
        and one.adapter.config.flag("ensure_weight_tying")
        and _is_transposed(one.site, other.site)
        for one, other in zip(head.terms, table.terms, strict=True)
    )


def _is_transposed(head: Site, table: Site) -> bool:
    """Whether the factors of two sites are each other's, transposed, value by value."""
    import numpy as np

    pairs = ((head.down, table.up), (head.up, table.down))
    for one, other in pairs:
        assert one is not None and other is not None
        is_same = one.spec.dtype == other.spec.dtype and one.spec.shape == other.spec.shape[::-1]
        if not is_same or DTYPES[one.spec.dtype].block:
            return False
        width = DTYPES[one.spec.dtype].size(1)
        first, second = (
            np.frombuffer(read_bytes(t), dtype=f"V{width}").reshape(t.spec.shape)
            for t in (one, other)
        )
        if first.tobytes() != second.T.tobytes():
            return False
    return True
