"""From modules and ranks to a plan: every tensor that will be written, decided from headers."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from loratool.adapter.config import CONFIG_NAME
from loratool.adapter.model import HEAD_LEAVES, Adapter, Kind, unknown_scale
from loratool.adapter.saving import OutputSite, lora_config, site_specs
from loratool.adapter.scheme import KeyScheme
from loratool.adapter.slots import Slot
from loratool.errors import OutputError, UnsupportedError
from loratool.files.container import WEIGHT_SUFFIXES
from loratool.names.conv1d import CONV1D_LEAVES
from loratool.ops.algebra.extras import Extras, gather_extras
from loratool.ops.algebra.joining import Joint
from loratool.ops.algebra.plan import WEIGHTS_NAME, AdapterPlan, ModuleJob
from loratool.ops.algebra.provenance import provenance
from loratool.ops.algebra.sidecars import carried_files
from loratool.ops.plan import Sidecar
from loratool.schemes import builtin_schemes, scheme_named

__all__ = ["Draft", "check_place", "input_notes", "output_scheme"]

PLAIN: Final = frozenset((Slot.DOWN, Slot.UP, Slot.EMBEDDING_DOWN, Slot.EMBEDDING_UP, Slot.UP_BIAS))


def output_scheme(adapters: Sequence[Adapter], wanted: str | None) -> KeyScheme:
    """Return the scheme to write: the one asked for, else that of the inputs, else ``peft``.

    Raises:
        UnsupportedError: There is no such scheme, or it is not written.
    """
    names = {adapter.scheme for adapter in adapters}
    name = wanted or (names.pop() if len(names) == 1 else "peft")
    known = {scheme.name: scheme for scheme in builtin_schemes() if scheme.writes}
    if name not in known:
        raise UnsupportedError(
            f"scheme {name}", "is not written", hint=f"written are: {', '.join(sorted(known))}"
        )
    return scheme_named(name)


@dataclass
class Draft:
    """Everything about an output but the ranks of its modules.

    Attributes:
        verb: The command.
        adapters: Its inputs.
        joints: The modules.
        scheme: How keys are named.
        output: Where it goes.
        options: What was asked for, for the metadata.
        method: How deltas are combined.
        policy: What to do where extras disagree.
        dtype: The dtype to write (``F32``), or ``None``.
        keep_factors: Whether a module that loses nothing is copied with its own alpha.
        notes: What a user should know already.
    """

    verb: str
    adapters: Sequence[Adapter]
    joints: Sequence[Joint]
    scheme: KeyScheme
    output: Path
    options: Mapping[str, Any]
    method: str = "linear"
    policy: str = "error"
    dtype: str | None = None
    keep_factors: bool = False
    notes: Sequence[str] = ()
    alphas: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_place(self.output, self.scheme.name, has_config=self.has_config)

    @property
    def is_file(self) -> bool:
        """Whether the output is one file."""
        return self.output.suffix.lower() == ".safetensors"

    @property
    def has_config(self) -> bool:
        """Whether a configuration is written."""
        is_known = any(adapter.config is not None for adapter in self.adapters)
        return self.scheme.name == "peft" or is_known

    @property
    def has_alphas(self) -> bool:
        """Whether alpha is written as tensors: where the inputs have it so, and no config."""
        slots = (slot for a in self.adapters for site in a.sites for slot in site.slots)
        return not self.has_config and Slot.ALPHA in slots

    @cached_property
    def metadata(self) -> dict[str, str]:
        """The metadata of the weights file: the format, and how it came to be."""
        return provenance(self.verb, self.adapters, self.options)

    @cached_property
    def files(self) -> tuple[list[Sidecar], list[tuple[str, str]], list[str]]:
        """Files that travel along, those that do not, and notes."""
        sidecars, left, notes = carried_files(self.adapters)
        if self.is_file:
            left += [(sidecar.name, "the output is a single file") for sidecar in sidecars]
            return [], left, notes
        return sidecars, left, notes

    def plan(self, ranks: Mapping[str, int]) -> AdapterPlan:
        """Return the plan for ``ranks``, by rank group; rank 0 leaves a module out.

        Raises:
            UnsupportedError: The scheme cannot express it.
            AdapterError: Extras disagree.
        """
        kept = self._kept_groups(ranks)
        jobs = [job for joint in self.joints for job in self._job(joint, ranks, kept)]
        written = {job.joint.name for job in jobs}
        gone = [joint.name for joint in self.joints if joint.name not in written]
        extras = self._extras([job.output for job in jobs])
        sidecars, left, file_notes = self.files
        notes = [*self.notes, *extras.notes, *file_notes, *input_notes(self.adapters)]
        config = self._config(jobs, extras, is_whole=not gone) if self.has_config else None
        return AdapterPlan(
            jobs=tuple(jobs),
            carried=tuple(extras.carried),
            metadata=self.metadata,
            config=config,
            sidecars=tuple(sidecars),
            weights_name="" if self.is_file else WEIGHTS_NAME,
            stamps={adapter.weights: adapter.stamp for adapter in self.adapters},
            notes=tuple(dict.fromkeys(notes)),
            dropped=(
                *((name, "the budget leaves no rank for it") for name in gone),
                *extras.dropped,
                *((key, "skipped as asked") for a in self.adapters for key in a.skipped),
                *left,
            ),
        )

    def _extras(self, sites: Sequence[OutputSite]) -> Extras:
        return gather_extras(
            self.adapters, sites, self.scheme, policy=self.policy, dtype=self.dtype
        )

    def _job(
        self, joint: Joint, ranks: Mapping[str, int], kept: Collection[str]
    ) -> Iterator[ModuleJob]:
        rank = ranks[joint.rank_group]
        if rank == 0:
            return
        alpha = float(rank)
        if joint.rank_group in kept:
            route, alpha = "copy", _kept_alpha(joint)
        elif joint.twin_of is not None:
            route, alpha = "twin", rank * joint.twin_scale
        elif self.method != "linear":
            route = self.method
        else:
            route = "exact" if rank >= joint.full_rank else "truncate"
        output = replace(joint.output, rank=rank, alpha=self.alphas.get(joint.name, alpha))
        specs = site_specs(self.scheme, output, with_alpha=self.has_alphas)
        yield ModuleJob(joint, output, specs, route)

    def _is_tied(self) -> bool:
        """Whether embedding and head are still one, so that PEFT may tie them again."""
        if not all(adapter.field("ensure_weight_tying") for adapter in self.adapters):
            return False
        if any(joint.twin_of is not None for joint in self.joints):
            return True
        return not any(
            joint.output.kind is Kind.EMBEDDING or joint.name.rpartition(".")[2] in HEAD_LEAVES
            for joint in self.joints
        )

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

    def _is_kept(self, joint: Joint, rank: int) -> bool:
        """Whether the stored factors can be written as they are."""
        (term,) = joint.terms
        site = term.site
        dtypes = {site.slots[slot].spec.dtype for slot in site.slots if slot in PLAIN}
        return (
            rank == site.rank
            and site.variant == "lora"
            and site.slots.keys() <= PLAIN | {Slot.ALPHA}
            and dtypes == {joint.output.dtype}
        )

    def _config(
        self, jobs: Sequence[ModuleJob], extras: Extras, *, is_whole: bool
    ) -> dict[str, Any]:
        configs = [dict(a.config.raw) for a in self.adapters if a.config is not None]
        first = configs[0] if configs else {}
        changes = dict(extras.config)
        for name in ("base_model_name_or_path", "task_type"):
            found = next((c[name] for c in configs if c.get(name)), None)
            if found is not None:
                changes[name] = found
        if any(config.get("fan_in_fan_out") for config in configs) or _looks_like_conv1d(jobs):
            changes["fan_in_fan_out"] = True
        if any(config.get("ensure_weight_tying") for config in configs):
            changes["ensure_weight_tying"] = self._is_tied()
        return lora_config(
            first,
            [job.output for job in jobs],
            keep_targets=is_whole and _same_targets(self.adapters, self.joints),
            changes=changes,
        )


def check_place(output: Path, scheme: str, *, has_config: bool) -> None:
    """Refuse a single file as the output where a configuration has to lie beside it.

    Raises:
        OutputError: It is one.
    """
    if has_config and output.suffix.lower() in WEIGHT_SUFFIXES:
        raise OutputError(
            output,
            f"the scheme {scheme!r} keeps its scale in {CONFIG_NAME}, which a single file has "
            "no place for",
            hint=f"name a folder, such as {output.with_suffix('')}",
        )


def input_notes(adapters: Sequence[Adapter]) -> Iterator[str]:
    """Yield what a user should know about the inputs of a result."""
    bases = {a.config.base_model for a in adapters if a.config and a.config.base_model}
    if len(bases) > 1:
        yield f"the adapters name different bases: {', '.join(sorted(bases))}"
    for adapter in adapters:
        yield from (f"{adapter.path}: {note}" for note in adapter.notes)
        if unknown := unknown_scale(adapter):
            yield f"{adapter.path}: {unknown}"


def _looks_like_conv1d(jobs: Sequence[ModuleJob]) -> bool:
    """Whether all linear modules are of GPT-2's kind: by their names, and a q, k, v in one."""
    linear = [job.output for job in jobs if job.output.kind is Kind.LINEAR]
    leaves = {output.module.rpartition(".")[2] for output in linear}
    return leaves <= CONV1D_LEAVES and any(
        output.module.endswith("c_attn") and output.out == 3 * output.into[0] for output in linear
    )


def _kept_alpha(joint: Joint) -> float:
    """Return the alpha that gives stored factors their scale as ``alpha / rank``."""
    site = joint.terms[0].site
    scaling = site.scaling
    is_plain = not scaling.rank_stabilised and not scaling.epsilon
    if scaling.alpha is not None and is_plain and scaling.rank == site.rank:
        return scaling.alpha
    return scaling.factor * site.rank


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
