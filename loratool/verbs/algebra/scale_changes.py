"""Where the strength of each module goes, and what that makes of its file."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loratool.adapter.config import CONFIG_NAME
from loratool.adapter.model import FILE_ALPHA_KEY, Adapter, Site
from loratool.adapter.part import Part
from loratool.adapter.slots import Slot
from loratool.files.dtypes import DTYPES
from loratool.files.spec import StoredTensor
from loratool.math.factored import norm
from loratool.math.lowrank import LowRank
from loratool.plan.adapter import AdapterPlan, Output
from loratool.plan.factors import site_deltas
from loratool.plan.history import History, Source
from loratool.plan.host import DOUBLE
from loratool.plan.threads import in_parallel
from loratool.schemes import scheme_named
from loratool.schemes.parts.peft_config import exact_number, scale_fields, target_fields
from loratool.values.arrays import Rounded
from loratool.values.expr import Constant, Expr, Stored, is_power_of_two, spec_of
from loratool.verbs.algebra.combination import input_notes
from loratool.verbs.algebra.followed import Followed
from loratool.verbs.algebra.modules import Joint, is_one_side
from loratool.verbs.algebra.sums import Spectrum
from loratool.write.card import adapter_card
from loratool.write.metadata import without_hashes
from loratool.write.sidecars import carried_files, without_room
from loratool.write.stored import part_of
from loratool.write.write import check_place

if TYPE_CHECKING:
    from loratool.values.expr import Array

__all__ = ["Change", "change_of", "plan_in_place", "rescaled_parts", "rounding_of"]

WEIGHTS_NAME: Final = "adapter_model.safetensors"


@dataclass(frozen=True, slots=True)
class Change:
    """What becomes of one module: new scale = ``ratio`` · old, alpha, and factors to scale."""

    joint: Joint
    ratio: float
    alpha: float
    scale: float
    up_factor: float = 1.0
    down_factor: float = 1.0

    @property
    def site(self) -> Site:
        return self.joint.terms[0].site

    def factor_of(self, slot: Slot) -> float:
        """Return what the tensor in a role is multiplied by."""
        if slot in (Slot.UP, Slot.EMBEDDING_UP, Slot.UP_BIAS):
            return self.up_factor
        return self.down_factor if slot in (Slot.DOWN, Slot.EMBEDDING_DOWN) else 1.0

    def factors(self) -> dict[str, float]:
        """Return what each stored tensor is multiplied by, by its name, where it is not 1."""
        return {
            stored.spec.name: self.factor_of(slot)
            for slot, stored in self.site.slots.items()
            if self.factor_of(slot) != 1
        }

    @property
    def part(self) -> Part:
        """The module as PEFT's configuration has to describe it."""
        shape = self.joint.shape
        rank = self.site.rank
        return replace(
            shape.part(Spectrum(self.joint), rank), alpha=self.alpha, scale=self.alpha / rank
        )


def change_of(
    joint: Joint,
    ratio: float,
    adapter: Adapter,
    *,
    alpha: float | None,
    fold: bool,
    rank_stabilised: bool,
    in_factors: bool,
) -> Change:
    """Decide where the strength of a module goes.

    With ``in_factors`` a module keeps its alpha, and B takes the ratio.
    """
    site = joint.terms[0].site
    old = site.scaling.factor
    new = old * ratio
    is_recorded = (
        adapter.config is not None or Slot.ALPHA in site.slots or FILE_ALPHA_KEY in adapter.metadata
    )
    divisor = math.sqrt(site.rank) if rank_stabilised else float(site.rank)
    if fold or not is_recorded:
        if joint.twin_of is not None:
            # Its factors are the embedding's, transposed: there B carries the scale, here A.
            return Change(
                joint,
                ratio,
                joint.twin_scale * divisor,
                joint.twin_scale,
                down_factor=new / joint.twin_scale if joint.twin_scale else 1.0,
            )
        return Change(joint, ratio, divisor, 1.0, up_factor=new)
    if site.scaling.epsilon or in_factors:
        alpha_now = site.scaling.alpha or 0.0
        return Change(joint, ratio, alpha_now, old, up_factor=ratio)
    if alpha is None:
        if ratio == 1 and rank_stabilised == site.scaling.rank_stabilised:
            return Change(joint, 1.0, _alpha_of(site, divisor), old)
        return Change(joint, ratio, _alpha_of(site, divisor, ratio), new)
    made = alpha / divisor
    if ratio == 1 and made != old:
        if joint.twin_of is not None:
            return Change(
                joint,
                1.0,
                alpha * joint.twin_scale,
                made * joint.twin_scale,
                down_factor=old / (made * joint.twin_scale),
            )
        return Change(joint, 1.0, alpha, made, up_factor=old / made)
    return Change(joint, ratio, alpha, made)


def _alpha_of(site: Site, divisor: float, ratio: float = 1.0) -> float:
    """Return the alpha that stands for a site's scale, times ``ratio``, over ``divisor``."""
    scaling = site.scaling
    own = math.sqrt(scaling.rank) if scaling.rank_stabilised else float(scaling.rank)
    if scaling.alpha is not None and own == divisor and not scaling.epsilon:
        return scaling.alpha * ratio
    return scaling.factor * ratio * divisor


def plan_in_place(
    adapter: Adapter,
    changes: Sequence[Change],
    output: Path,
    asked: Mapping[str, Any],
    dtype: str | None,
    others: Sequence[Followed] = (),
) -> AdapterPlan:
    """Return the plan of the same file, key by key, with ``changes`` made.

    For dotted paths with or without PEFT's configuration: every form that it can have is kept.

    Raises:
        OutputError: A single file has no place for the configuration.
    """
    check_place(output, adapter.scheme, CONFIG_NAME if adapter.config is not None else "")
    special = dict(_special(changes))
    for other in others:
        special |= dict(other.in_place())
    carried = []
    for key, stored in adapter.tensors.items():
        value = special.get(stored.spec.name, Stored(stored))
        wanted = None if isinstance(value, Constant) else dtype
        carried.append(Output(spec_of(key, value, wanted), value))
    is_folder = output.suffix.lower() != ".safetensors"
    sidecars, left, notes = carried_files([adapter])
    if not is_folder:
        left += without_room(sidecars)
        sidecars = []
    config = _config(adapter, changes, asked)
    history = History("rescale", (Source.of_adapter(adapter),), asked)
    card, kept = adapter_card(
        sidecars,
        scheme_named(adapter.scheme),
        base=adapter.base_model,
        family=adapter.family,
        is_wanted=history.is_carded,
    )
    return AdapterPlan(
        parts=(),
        carried=tuple(carried),
        metadata=without_hashes(adapter.metadata),
        history=history,
        card=card,
        config=config,
        sidecars=kept,
        weights_name=WEIGHTS_NAME if is_folder else "",
        stamps=adapter.stamps,
        scheme=adapter.scheme,
        notes=(*notes, *input_notes([adapter])),
        dropped=tuple((key, "skipped as asked") for key in adapter.skipped),
        left_behind=tuple(left),
    )


def _special(changes: Sequence[Change]) -> Iterator[tuple[str, Expr]]:
    """Yield what becomes of the tensors that change, by their names."""
    for change in changes:
        stored = change.site.slots.get(Slot.ALPHA)
        if stored is not None and change.alpha != change.site.scaling.alpha:
            yield stored.spec.name, Constant(change.alpha, stored.spec.shape, "F32")
        for name, factor in change.factors().items():
            stored = next(s for s in change.site.slots.values() if s.spec.name == name)
            yield name, Stored(stored).scaled(factor)


def rescaled_parts(adapter: Adapter, changes: Sequence[Change]) -> list[Part]:
    """Return the modules with ``changes`` made, for schemes that have a scale of their own."""
    made = []
    for change in changes:
        part = part_of(change.site, adapter)
        values = {slot: value.scaled(change.factor_of(slot)) for slot, value in part.values.items()}
        made.append(replace(part, values=values, scale=change.scale, alpha=change.alpha))
    return made


def _config(
    adapter: Adapter, changes: Sequence[Change], options: Mapping[str, Any]
) -> dict[str, Any] | None:
    if adapter.config is None:
        return None
    raw = dict(adapter.config.raw)
    if adapter.skipped:
        raw |= target_fields([change.part for change in changes])
        if raw.get("ensure_weight_tying"):
            raw["ensure_weight_tying"] = not is_one_side([change.joint for change in changes])
    scale = options.get("scale")
    own = ("fold", "to_rslora", "from_rslora", "weights")
    is_form = any(options.get(name) for name in own)
    if scale is not None and not is_form and adapter.config.peft_type == "LORA":
        # Every number that is an alpha, and nothing else.
        raw["lora_alpha"] = exact_number(adapter.config.alpha * scale)
        patterns = adapter.config.alpha_pattern
        raw["alpha_pattern"] = {k: exact_number(float(v) * scale) for k, v in patterns.items()}
        return raw
    if adapter.config.peft_type == "LORA":
        raw |= scale_fields([change.part for change in changes])
        stabilised = adapter.config.use_rslora and not options.get("from_rslora")
        stabilised = stabilised and not options.get("fold")
        raw["use_rslora"] = bool(options.get("to_rslora")) or stabilised
    return raw


def rounding_of(changes: Sequence[Change], plan: AdapterPlan, threads: int | None) -> float:
    """Return ``‖written - exact‖ / ‖exact‖`` over all modules; 0 where nothing is rounded."""
    dtypes = {item.spec.name: item.spec.dtype for item in plan.carried}
    if not any(_is_rounded(change, dtypes) for change in changes):
        return 0.0

    def one(change: Change) -> tuple[float, float]:
        (term,) = change.joint.terms
        factors = change.factors()

        def scaled(stored: StoredTensor, values: Array) -> Array:
            return values * factors.get(stored.spec.name, 1.0)

        def rounded(stored: StoredTensor, values: Array) -> Array:
            return Rounded.of(scaled(stored, values), dtypes[stored.spec.name]).values

        exact = site_deltas(term.site, term.adapter, DOUBLE, scaled)
        written = site_deltas(term.site, term.adapter, DOUBLE, rounded)
        errors, totals = [], []
        for true, made in zip(exact, written, strict=True):
            lost = LowRank(
                np.concatenate([made.up - true.up, made.up], axis=1),
                np.concatenate([true.down, made.down - true.down], axis=0),
            )
            errors.append(norm(lost) ** 2)
            totals.append(norm(LowRank(true.up, true.down)) ** 2)
        return math.fsum(errors) * change.scale**2, math.fsum(totals) * change.scale**2

    found = in_parallel(one, changes, threads=threads)
    total = math.fsum(pair[1] for pair in found)
    return math.sqrt(math.fsum(pair[0] for pair in found) / total) if total else 0.0


def _is_rounded(change: Change, dtypes: Mapping[str, str]) -> bool:
    if not all(map(is_power_of_two, (change.up_factor, change.down_factor))):
        return True
    return any(
        DTYPES[dtypes[stored.spec.name]].bits < DTYPES[stored.spec.dtype].bits
        or {dtypes[stored.spec.name], stored.spec.dtype} == {"F16", "BF16"}
        for stored in change.site.slots.values()
        if DTYPES[stored.spec.dtype].is_float
    )
