"""An adapter whose modules are sums of other adapters' deltas, for any choice of ranks."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Final

from loratool.adapter.model import Adapter, unknown_scale
from loratool.adapter.part import Part
from loratool.adapter.scheme import Scheme
from loratool.adapter.slots import Slot
from loratool.errors import UnsupportedError
from loratool.plan.adapter import AdapterPlan
from loratool.plan.history import History, Source
from loratool.schemes import DEFAULT_SCHEME, scheme_named, scheme_names
from loratool.values.expr import Result, Together
from loratool.verbs.algebra.extras import gather_extras
from loratool.verbs.algebra.modules import Joint, is_one_side
from loratool.verbs.algebra.sums import Method, Spectrum, SumOfDeltas
from loratool.write.adapter import NewAdapter
from loratool.write.extras import Extras
from loratool.write.metadata import joined_metadata
from loratool.write.options import WriteOptions
from loratool.write.refusals import check_names
from loratool.write.sidecars import carried_files
from loratool.write.stored import part_of
from loratool.write.write import write

__all__ = [
    "ONE_RANK",
    "Combination",
    "common_family",
    "input_notes",
    "output_scheme",
    "recorded",
    "twin_part",
    "write_or_refuse",
]

PLAIN: Final = frozenset((Slot.DOWN, Slot.UP, Slot.EMBEDDING_DOWN, Slot.EMBEDDING_UP, Slot.UP_BIAS))
ONE_RANK: Final = "all modules"


def output_scheme(adapters: Sequence[Adapter], wanted: str | None) -> Scheme:
    """Return the scheme to write: the one asked for, else that of the inputs, else the usual one.

    Raises:
        UnsupportedError: There is no such scheme.
    """
    names = {adapter.scheme for adapter in adapters}
    name = wanted or (names.pop() if len(names) == 1 else DEFAULT_SCHEME)
    if name not in scheme_names():
        raise UnsupportedError(
            f"scheme {name}", "is not written", hint=f"written are: {', '.join(scheme_names())}"
        )
    return scheme_named(name)


def common_family(adapters: Sequence[Adapter]) -> str | None:
    """Return the pipeline that all adapters belong to, as far as they say."""
    found = {adapter.family for adapter in adapters} - {None}
    return found.pop() if len(found) == 1 else None


def recorded(adapters: Sequence[Adapter], scheme: Scheme) -> Scheme:
    """Return ``scheme`` with the scale where the inputs have it, if it leaves that open.

    Beside dotted paths lies a configuration, or alphas, where the inputs have it so.
    """
    slots = (slot for a in adapters for site in a.sites for slot in site.slots)
    return scheme.recorded(
        has_config=any(adapter.config is not None for adapter in adapters),
        has_alphas=Slot.ALPHA in slots,
    )


def input_notes(adapters: Sequence[Adapter]) -> Iterator[str]:
    """Yield what a user should know about the inputs of a result."""
    bases = {a.base_model for a in adapters if a.base_model}
    if len(bases) > 1:
        yield f"the adapters name different bases: {', '.join(sorted(bases))}"
    versions = {v for a in adapters if (v := a.metadata.get("ss_base_model_version"))}
    if len(versions) > 1:
        yield f"the adapters name different versions of a base: {', '.join(sorted(versions))}"
    for adapter in adapters:
        yield from (f"{adapter.path}: {note}" for note in adapter.notes)
        if unknown := unknown_scale(adapter):
            yield f"{adapter.path}: {unknown}"


@dataclass(frozen=True)
class Combination:
    """Everything about an output but the ranks of its modules.

    Attributes:
        verb: The command.
        adapters: Its inputs.
        joints: The modules.
        scheme: What is written.
        options: How.
        asked: What was asked for, for the metadata.
        method: How deltas are combined.
        policy: What to do where extras disagree.
        keep_factors: Whether a module that loses nothing is copied with its own alpha.
        notes: What a user should know already.
        sources: What the metadata says of the inputs, where these are made of others.
    """

    verb: str
    adapters: Sequence[Adapter]
    joints: Sequence[Joint]
    scheme: Scheme
    options: WriteOptions
    asked: Mapping[str, Any]
    method: Method = field(default_factory=Method)
    policy: str = "error"
    keep_factors: bool = False
    notes: Sequence[str] = ()
    sources: Sequence[Source] = ()

    def __post_init__(self) -> None:
        for adapter in self.adapters:
            check_names(adapter, self.scheme)

    def with_one_rank(self) -> Combination:
        """Return the same with one rank for all modules, if the scheme has only one."""
        if not self.scheme.scale.has_one_rank:
            return self
        joints = tuple(replace(joint, group=ONE_RANK) for joint in self.joints)
        return replace(self, joints=joints)

    @property
    def is_whole(self) -> bool:
        """Whether the scheme has no place for some of the modules without the others."""
        return self.scheme.paths.is_whole

    @cached_property
    def _written(self) -> Scheme:
        return recorded(self.adapters, self.scheme)

    def plan(self, ranks: Mapping[str, int], *, keep: bool = True) -> AdapterPlan:
        """Return the plan for ``ranks``, by rank group; rank 0 leaves a module out.

        Args:
            ranks: By rank group.
            keep: Whether modules that lose nothing may be copied.

        Raises:
            UnsupportedError: The scheme cannot express it.
            AdapterError: Extras disagree.
        """
        return write_or_refuse(self._adapter(ranks, keep=keep), self._written, self.options)

    def _adapter(self, ranks: Mapping[str, int], *, keep: bool) -> NewAdapter:
        kept = self._kept_groups(ranks) if keep else set()
        parts = list(self._parts(ranks, kept))
        gone = [joint.name for joint in self.joints if not ranks[joint.rank_group]]
        sidecars, left, file_notes = self._files
        alone = self.adapters[0] if len(self.adapters) == 1 else None
        schemes = {adapter.scheme for adapter in self.adapters}
        return NewAdapter(
            parts=tuple(parts),
            extras=self._extras,
            scheme=schemes.pop() if len(schemes) == 1 else "",
            config=self._config,
            config_changes=self._changes,
            keeps_targets=not gone and _same_targets(self.adapters, self.joints),
            sidecar=alone.sidecar if alone is not None else None,
            family=common_family(self.adapters),
            components=frozenset().union(*(adapter.components for adapter in self.adapters)),
            is_native=all(adapter.is_native for adapter in self.adapters),
            name=alone.name if alone is not None else None,
            stem=alone.weights.stem if alone is not None else "",
            told=alone.told if alone is not None else None,
            metadata=joined_metadata(self.adapters, self.scheme.name),
            history=History(
                self.verb,
                tuple(self.sources or map(Source.of_adapter, self.adapters)),
                self.asked,
            ),
            sidecars=tuple(sidecars),
            measured=tuple(Spectrum(joint) for joint in self.joints if joint.rank_group in kept),
            stamps={path: stamp for each in self.adapters for path, stamp in each.stamps.items()},
            notes=(*self.notes, *file_notes, *input_notes(self.adapters)),
            dropped=(
                *((name, "the budget leaves no rank for it") for name in gone),
                *((key, "skipped as asked") for a in self.adapters for key in a.skipped),
            ),
            left_behind=tuple(left),
        )

    def _parts(self, ranks: Mapping[str, int], kept: Collection[str]) -> Iterator[Part]:
        sums: dict[str, SumOfDeltas] = {}
        for joint in sorted(self.joints, key=lambda joint: joint.twin_of is not None):
            rank = ranks[joint.rank_group]
            if rank == 0:
                continue
            if joint.rank_group in kept:
                yield _copied(joint)
            elif joint.twin_of is not None:
                yield twin_part(joint, sums[joint.twin_of], rank)
            else:
                sums[joint.name] = SumOfDeltas(joint, rank, self.method)
                yield joint.shape.part(sums[joint.name], rank)

    @cached_property
    def _extras(self) -> Extras:
        return gather_extras(self.adapters, policy=self.policy)

    @cached_property
    def _files(self) -> tuple[list[Any], list[tuple[str, str]], list[str]]:
        return carried_files(self.adapters)

    @cached_property
    def _config(self) -> dict[str, Any] | None:
        configs = [dict(a.config.raw) for a in self.adapters if a.config is not None]
        return configs[0] if configs else None

    @cached_property
    def _changes(self) -> dict[str, Any]:
        configs = [adapter.config.raw for adapter in self.adapters if adapter.config is not None]
        changes: dict[str, Any] = {}
        for name in ("base_model_name_or_path", "task_type"):
            found = next((config[name] for config in configs if config.get(name)), None)
            if found is not None:
                changes[name] = found
        if any(config.get("fan_in_fan_out") for config in configs):
            changes["fan_in_fan_out"] = True
        if any(config.get("ensure_weight_tying") for config in configs):
            changes["ensure_weight_tying"] = self._is_tied()
        return changes

    def _is_tied(self) -> bool:
        """Whether embedding and head are still one, so that PEFT may tie them again."""
        if not all(adapter.field("ensure_weight_tying") for adapter in self.adapters):
            return False
        return not is_one_side(self.joints)

    def _kept_groups(self, ranks: Mapping[str, int]) -> set[str]:
        """Return the rank groups whose stored factors can all be written as they are."""
        if not self.keep_factors:
            return set()
        changed = {
            joint.rank_group
            for joint in self.joints
            if not self._is_kept(joint, ranks[joint.rank_group])
        }
        return ranks.keys() - changed

    def is_kept(self, joint: Joint, ranks: Mapping[str, int]) -> bool:
        """Whether the module's stored factors would be written as they are."""
        return joint.rank_group in self._kept_groups(ranks)

    def _is_kept(self, joint: Joint, rank: int) -> bool:
        (term,) = joint.terms
        site = term.site
        dtypes = {site.slots[slot].spec.dtype for slot in site.slots if slot in PLAIN}
        return (
            rank == site.rank
            and not site.variant.is_compact
            and not site.variant.undetermined
            and site.slots.keys() <= PLAIN | {Slot.ALPHA}
            and dtypes == {joint.shape.dtype}
        )


def write_or_refuse(new: NewAdapter, scheme: Scheme, options: WriteOptions) -> AdapterPlan:
    """Return the plan of an adapter; what is refused comes with what every verb can do about it.

    Raises:
        UnsupportedError: The scheme cannot express something.
    """
    try:
        return write(new, scheme, options)
    except UnsupportedError as error:
        hint = "leave it out with --skip, or write another scheme, such as --to peft"
        raise UnsupportedError(error.where, error.what, hint=hint) from None


def _copied(joint: Joint) -> Part:
    """Return the module with its factors and its alpha as they are."""
    (term,) = joint.terms
    part = part_of(term.site, term.adapter)
    shape = joint.shape
    return replace(
        part,
        module=shape.module,
        nesting=shape.nesting,
        parameter=shape.parameter,
        is_target=shape.is_target,
    )


def twin_part(head: Joint, table: Together, rank: int) -> Part:
    """Return a head whose factors are those of the embedding that it is tied to, transposed."""
    shape = head.shape
    (into,) = shape.into
    a, b = (
        Result(table, 0, (rank, shape.out), shape.dtype),
        Result(table, 1, (into, rank), shape.dtype),
    )
    part = shape.part(table, rank)
    values = {Slot.DOWN: b.turned(), Slot.UP: a.turned()}
    scale = head.twin_scale
    return replace(part, values=values, scale=scale, alpha=rank * scale)


def _same_targets(adapters: Sequence[Adapter], joints: Sequence[Joint]) -> bool:
    """Whether the fields that choose modules mean the same in all adapters, and all modules."""
    names = (
        "target_modules",
        "target_parameters",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
    )
    fields = [
        tuple(json.dumps(_ordered(adapter.field(name)), sort_keys=True) for name in names)
        for adapter in adapters
    ]
    if any(adapter.skipped for adapter in adapters):
        return False
    return len(set(fields)) == 1 and all(len(joint.terms) == len(adapters) for joint in joints)


def _ordered(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, list) else value
