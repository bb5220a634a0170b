"""Where the strength of each module goes, and what that makes of its file."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loratool.adapter.model import Adapter, Site
from loratool.adapter.saving import OutputSite, exact_number, scale_fields, target_fields
from loratool.adapter.slots import Slot
from loratool.files.dtypes import DTYPES
from loratool.files.spec import TensorSpec
from loratool.ops.algebra.extras import Carried
from loratool.ops.algebra.joining import Joint
from loratool.ops.algebra.plan import WEIGHTS_NAME, AdapterPlan
from loratool.ops.algebra.planning import check_place, input_notes
from loratool.ops.algebra.provenance import provenance
from loratool.ops.algebra.sidecars import carried_files

__all__ = ["Change", "change_of", "plan_rescaling", "rounding_of"]


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

    def factors(self) -> dict[str, float]:
        """Return what each stored tensor is multiplied by, by its name, where it is not 1."""
        by_slot = dict.fromkeys((Slot.UP, Slot.EMBEDDING_UP, Slot.UP_BIAS), self.up_factor)
        by_slot |= dict.fromkeys((Slot.DOWN, Slot.EMBEDDING_DOWN), self.down_factor)
        return {
            stored.spec.name: by_slot[slot]
            for slot, stored in self.site.slots.items()
            if by_slot.get(slot, 1.0) != 1
        }

    @property
    def output(self) -> OutputSite:
        return replace(self.joint.output, rank=self.site.rank, alpha=self.alpha)


def change_of(
    joint: Joint,
    ratio: float,
    adapter: Adapter,
    *,
    alpha: float | None,
    fold: bool,
    rank_stabilised: bool,
    is_alone: bool,
) -> Change:
    """Decide where the strength of a module goes.

    With ``is_alone`` each module has a ratio of its own. Raw parameters then keep their alpha,
    for PEFT warns about patterns that mean one, and B takes the ratio.
    """
    site = joint.terms[0].site
    old = site.scaling.factor
    new = old * ratio
    is_recorded = adapter.config is not None or Slot.ALPHA in site.slots
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
    if site.variant == "adalora" or (is_alone and joint.output.is_parameter):
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


def plan_rescaling(
    adapter: Adapter,
    changes: Sequence[Change],
    output: Path,
    options: Mapping[str, Any],
    dtype: str | None,
) -> AdapterPlan:
    """Return the plan of the file with ``changes`` made; raises as :func:`rescale` does."""
    check_place(output, adapter.scheme, has_config=adapter.config is not None)
    special = dict(_special(changes))
    carried = []
    for key, stored in adapter.tensors.items():
        is_float = DTYPES[stored.spec.dtype].is_float
        spec = TensorSpec(
            key, dtype if dtype and is_float else stored.spec.dtype, stored.spec.shape
        )
        made = special.get(stored.spec.name)
        if made is None:
            carried.append(Carried(spec, (stored,)))
        elif made.constant is not None:
            carried.append(replace(made, spec=TensorSpec(key, "F32", stored.spec.shape)))
        else:
            carried.append(replace(made, spec=spec, sources=(stored,)))
    is_folder = output.suffix.lower() != ".safetensors"
    sidecars, left, notes = carried_files([adapter])
    if not is_folder:
        left += [(sidecar.name, "the output is a single file") for sidecar in sidecars]
        sidecars = []
    return AdapterPlan(
        jobs=(),
        carried=tuple(carried),
        metadata=provenance("rescale", [adapter], options),
        config=_config(adapter, changes, options),
        sidecars=tuple(sidecars),
        weights_name=WEIGHTS_NAME if is_folder else "",
        stamps={adapter.weights: adapter.stamp},
        notes=(*notes, *input_notes([adapter])),
        dropped=(*((key, "skipped as asked") for key in adapter.skipped), *left),
    )


def _special(changes: Sequence[Change]) -> Iterator[tuple[str, Carried]]:
    """Yield the tensors that change, by their names."""
    for change in changes:
        stored = change.site.slots.get(Slot.ALPHA)
        if stored is not None and change.alpha != change.site.scaling.alpha:
            yield stored.spec.name, Carried(stored.spec, (), constant=change.alpha)
        for name, factor in change.factors().items():
            stored = next(s for s in change.site.slots.values() if s.spec.name == name)
            yield name, Carried(stored.spec, (stored,), factor=factor)


def _config(
    adapter: Adapter, changes: Sequence[Change], options: Mapping[str, Any]
) -> dict[str, Any] | None:
    if adapter.config is None:
        return None
    raw = dict(adapter.config.raw)
    if adapter.skipped:
        raw |= target_fields([change.output for change in changes])
    scale = options.get("scale")
    is_form = any(options.get(name) for name in ("fold", "to_rslora", "from_rslora"))
    if scale is not None and not is_form and adapter.config.peft_type == "LORA":
        # Every number that is an alpha, and nothing else.
        raw["lora_alpha"] = exact_number(adapter.config.alpha * scale)
        patterns = adapter.config.alpha_pattern
        raw["alpha_pattern"] = {k: exact_number(float(v) * scale) for k, v in patterns.items()}
        return raw
    if adapter.config.peft_type == "LORA":
        raw |= scale_fields([change.output for change in changes])
        stabilised = adapter.config.use_rslora and not options.get("from_rslora")
        stabilised = stabilised and not options.get("fold")
        raw["use_rslora"] = bool(options.get("to_rslora")) or stabilised
    return raw


def rounding_of(changes: Sequence[Change], plan: AdapterPlan, threads: int | None) -> float:
    """Return ``‖written - exact‖ / ‖exact‖`` over all modules; 0 where nothing is rounded."""
    dtypes = {item.spec.name: item.spec.dtype for item in plan.carried}
    rounded = [change for change in changes if _is_rounded(change, dtypes)]
    if not rounded:
        return 0.0
    from loratool.ops.algebra.rounding import rounding_error

    return rounding_error(
        [(change.joint, change.factors(), change.scale) for change in changes],
        dtypes,
        threads,
    )


def _is_rounded(change: Change, dtypes: Mapping[str, str]) -> bool:
    factors = (change.up_factor, change.down_factor)
    if not all(abs(math.frexp(factor)[0]) in (0.0, 0.5) for factor in factors):
        return True  # not a power of two, which only moves exponents
    return any(
        DTYPES[dtypes[stored.spec.name]].bits < DTYPES[stored.spec.dtype].bits
        or {dtypes[stored.spec.name], stored.spec.dtype} == {"F16", "BF16"}
        for stored in change.site.slots.values()
        if DTYPES[stored.spec.dtype].is_float
    )
