"""``rescale``: multiply a delta, set alpha, or move the scale without changing the delta."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any, Final

from loratool.adapter.model import BASE_DEPENDENT, Adapter, Site
from loratool.adapter.saving import OutputSite, exact_number, scale_fields, target_fields
from loratool.adapter.slots import Slot
from loratool.errors import OptionError, UnsupportedError
from loratool.files.atomic import check_output
from loratool.files.dtypes import DTYPES, OUTPUT_DTYPES
from loratool.files.spec import TensorSpec
from loratool.ops.algebra.extras import Carried
from loratool.ops.algebra.joining import Joint, check_computable, join
from loratool.ops.algebra.planning import (
    WEIGHTS_NAME,
    AdapterPlan,
    check_place,
    input_notes,
    provenance,
)
from loratool.ops.algebra.sidecars import carried_files
from loratool.ops.importing import import_torch
from loratool.ops.opening import open_adapter

__all__ = ["RescaleReport", "rescale"]

AnyPath = str | PathLike[str]
Progress = Callable[[int, int], None]
KEEP: Final = ("factors", "delta")


@dataclass(frozen=True)
class RescaleReport:
    """What a rescaling did.

    Attributes:
        scales: Old and new scale of every module, by name.
        ratios: New over old norm of every module's delta; 1 where only the form changed.
        relative_error: Of the deltas written against the exact ones.
        plan: What was decided.
        is_written: Whether it was written.
        notes: What a user should know.
    """

    scales: Mapping[str, tuple[float, float]]
    ratios: Mapping[str, float]
    relative_error: float
    plan: AdapterPlan
    is_written: bool
    notes: tuple[str, ...] = field(default=())

    def as_json(self) -> dict[str, Any]:
        """Return a document for scripts."""
        return {
            "schema": 1,
            "dry_run": not self.is_written,
            "relative_error": self.relative_error,
            "modules": [
                {"module": name, "scale": new, "old_scale": old, "ratio": self.ratios[name]}
                for name, (old, new) in self.scales.items()
            ],
            "bytes_written" if self.is_written else "bytes_to_write": self.plan.nbytes,
            "tensors": len(self.plan.specs),
            "dropped": [{"name": name, "why": why} for name, why in self.plan.dropped],
            "notes": list(self.notes),
        }


@dataclass(frozen=True, slots=True)
class _Change:
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


def rescale(
    adapter: AnyPath,
    output: AnyPath,
    *,
    scale: float | None = None,
    alpha: float | None = None,
    keep: str = "factors",
    max_norm: float | None = None,
    fold: bool = False,
    to_rslora: bool = False,
    from_rslora: bool = False,
    dtype: str | None = None,
    force: bool = False,
    dry_run: bool = False,
    adapter_name: str | None = None,
    skip: Sequence[str] = (),
    threads: int | None = None,
    progress: Progress | None = None,
) -> RescaleReport:
    """Multiply the delta of ``adapter``, set its alpha, or move its scale elsewhere.

    One of ``scale``, ``alpha`` and ``max_norm`` changes how strong it is; ``fold``,
    ``to_rslora`` and ``from_rslora`` change only where the strength is recorded. Where a
    configuration (or an alpha tensor) records it, the factors are copied byte for byte.

    Args:
        adapter: File or folder.
        output: Where the result goes: a folder, or a file for schemes without a configuration.
        scale: Multiply every delta, and every bias that scales with it, by this.
        alpha: Set alpha of every module to this.
        keep: What ``alpha`` leaves alone: ``factors``, so that the delta becomes stronger or
            weaker, or ``delta``, so that B makes up for the new alpha.
        max_norm: Scale a module down wherever ``‖Δ‖_F`` is larger than this.
        fold: Put the whole scale into B; alpha becomes the rank, so that the scale is 1.
        to_rslora: Record the scale as ``alpha / √r``.
        from_rslora: Record the scale as ``alpha / r``.
        dtype: ``float32``, ``float16`` or ``bfloat16``; by default that of the input.
        force: Replace an existing output.
        dry_run: Say what would be done, and write nothing.
        adapter_name: Which adapter, where a path holds several.
        skip: Regular expressions; keys that match are left out, and reported.
        threads: Number of modules in work at a time.
        progress: Called with how much is done and how much there is.

    Raises:
        LoratoolError: Nothing was written; the message says why.
    """
    _check_options(scale, alpha, keep, max_norm, fold=fold, to=to_rslora, back=from_rslora)
    place = Path(output)
    if not dry_run:
        check_output(place, force=force, inputs=[Path(adapter)])
    opened = open_adapter(adapter, adapter_name=adapter_name, skip=skip)
    import_torch()
    stabilised = to_rslora or from_rslora
    _check_kinds(opened, fold=fold or stabilised or alpha is not None, stabilised=stabilised)
    joints, _ = join([opened], [1.0])
    norms = _norms(joints, threads) if max_norm is not None else {}
    changes = [
        _change(
            joint,
            _ratio(joint, scale, alpha, keep, max_norm, norms, joints),
            opened,
            alpha=alpha,
            fold=fold,
            rank_stabilised=_is_stabilised(opened, to=to_rslora, back=from_rslora, fold=fold),
            is_alone=max_norm is not None and not to_rslora and not from_rslora,
        )
        for joint in joints
    ]
    for change in changes:
        if change.site.variant in BASE_DEPENDENT - {"qalora"} and change.ratio != 1:
            raise UnsupportedError(
                f"{opened.path}: {change.joint.name}",
                f"is a {change.site.variant}: its delta depends on the base's weight, and no "
                "scale multiplies it",
                hint="only --fold and the two rslora options leave such a delta as it is",
            )
    options = {
        "scale": scale,
        "alpha": alpha,
        "keep": keep if alpha is not None else None,
        "max_norm": max_norm,
        "fold": fold or None,
        "to_rslora": to_rslora or None,
        "from_rslora": from_rslora or None,
        "dtype": dtype,
        "skip": tuple(skip),
    }
    plan = _plan(opened, changes, place, options, OUTPUT_DTYPES[dtype] if dtype else None)
    notes = [*plan.notes, *_notes(opened, changes, alpha, keep, max_norm)]
    error = _rounding_error(changes, plan, threads)
    if not dry_run:
        from loratool.ops.algebra.writing import write_adapter

        write_adapter(
            plan, place, inputs=[Path(adapter)], force=force, threads=threads, progress=progress
        )
    return RescaleReport(
        scales={c.joint.name: (c.site.scaling.factor, c.scale) for c in changes},
        ratios={c.joint.name: c.ratio for c in changes},
        relative_error=error,
        plan=plan,
        is_written=not dry_run,
        notes=tuple(notes),
    )


def _check_options(
    scale: float | None,
    alpha: float | None,
    keep: str,
    max_norm: float | None,
    *,
    fold: bool,
    to: bool,
    back: bool,
) -> None:
    strengths = {"--scale": scale, "--alpha": alpha, "--max-norm": max_norm}
    given = [name for name, value in strengths.items() if value is not None]
    forms = [n for n, v in (("--fold", fold), ("--to-rslora", to), ("--from-rslora", back)) if v]
    if not given and not forms:
        raise OptionError(
            "rescale",
            "say what to do: --scale, --alpha, --max-norm, --fold, --to-rslora or --from-rslora",
        )
    if len(given) > 1:
        raise OptionError("rescale", f"give one of {' and '.join(given)}")
    if len(forms) > 1:
        raise OptionError("rescale", f"give one of {' and '.join(forms)}")
    if alpha is not None and forms:
        raise OptionError("rescale", f"--alpha and {forms[0]} both decide about alpha")
    for name in given:
        value = strengths[name]
        assert value is not None
        if not math.isfinite(value):
            raise OptionError(name, f"{value} is no finite number")
    if max_norm is not None and max_norm <= 0:
        raise OptionError("--max-norm", f"{max_norm:g} is not positive")
    if keep not in KEEP:
        raise OptionError("--keep", f"{keep!r} is none of {', '.join(KEEP)}")
    if keep == "delta" and alpha is None:
        raise OptionError("--keep", "says what --alpha leaves alone, and needs it")
    if keep == "delta" and alpha == 0:
        raise OptionError("--alpha", "with alpha 0 no factors keep the delta")


def _check_kinds(adapter: Adapter, *, fold: bool, stabilised: bool) -> None:
    """Refuse what no scale multiplies, or whose scale has no other form."""
    plain = replace(
        adapter,
        sites=tuple(
            site
            if site.variant not in ("dora", "kasa", "qalora")
            else replace(site, variant="lora")
            for site in adapter.sites
        ),
    )
    check_computable(plain, verb="rescale")
    if stabilised and adapter.config is None:
        raise OptionError(
            adapter.path,
            "has no configuration that could say how its scale is to be read",
        )
    if fold and any(site.variant == "adalora" for site in adapter.sites):
        raise UnsupportedError(
            adapter.path,
            "an AdaLoRA: its scale is alpha / (init_r + 1e-5), and has no other form",
            hint="make it a plain LoRA first: loratool compose ADAPTER -o OUT",
        )


def _is_stabilised(adapter: Adapter, *, to: bool, back: bool, fold: bool) -> bool:
    is_now = bool(adapter.config and adapter.config.use_rslora)
    return to or (is_now and not back and not fold)


def _norms(joints: Sequence[Joint], threads: int | None) -> dict[str, float]:
    """Return ``‖Δ‖_F`` of every module."""
    from loratool.math.factored import norm
    from loratool.ops.algebra.computing import load_terms
    from loratool.ops.algebra.writing import arithmetic, in_parallel

    kind = arithmetic("cpu")

    def one(joint: Joint) -> float:
        return math.sqrt(math.fsum(norm(delta) ** 2 for (delta,) in load_terms(joint, kind)))

    found = in_parallel(one, joints, threads=threads)
    return {joint.name: value for joint, value in zip(joints, found, strict=True)}


def _ratio(
    joint: Joint,
    scale: float | None,
    alpha: float | None,
    keep: str,
    max_norm: float | None,
    norms: Mapping[str, float],
    joints: Sequence[Joint],
) -> float:
    """Return what a module's delta is multiplied by."""
    scaling = joint.terms[0].site.scaling
    if scale is not None:
        return scale
    if alpha is not None and keep == "factors":
        if scaling.alpha is None:
            return alpha / scaling.rank
        if scaling.alpha == 0:
            raise (
                OptionError(joint.name, "its alpha is 0, so that nothing tells what its delta was")
                if alpha
                else OptionError(joint.name, "its alpha is 0 already")
            )
        return alpha / scaling.alpha
    if max_norm is not None:
        # Modules that one pattern means share a scale: the largest of them decides.
        path = joint.output.pattern_path
        largest = max(norms[other.name] for other in joints if other.output.pattern_path == path)
        return min(1.0, max_norm / largest) if largest else 1.0
    return 1.0


def _change(
    joint: Joint,
    ratio: float,
    adapter: Adapter,
    *,
    alpha: float | None,
    fold: bool,
    rank_stabilised: bool,
    is_alone: bool,
) -> _Change:
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
            return _Change(
                joint,
                ratio,
                joint.twin_scale * divisor,
                joint.twin_scale,
                down_factor=new / joint.twin_scale if joint.twin_scale else 1.0,
            )
        return _Change(joint, ratio, divisor, 1.0, up_factor=new)
    if site.variant == "adalora" or (is_alone and joint.output.is_parameter):
        alpha_now = site.scaling.alpha or 0.0
        return _Change(joint, ratio, alpha_now, old, up_factor=ratio)
    if alpha is None:
        if ratio == 1 and rank_stabilised == site.scaling.rank_stabilised:
            return _Change(joint, 1.0, _alpha_of(site, divisor), old)
        return _Change(joint, ratio, _alpha_of(site, divisor, ratio), new)
    made = alpha / divisor
    if ratio == 1 and made != old:
        if joint.twin_of is not None:
            return _Change(
                joint,
                1.0,
                alpha * joint.twin_scale,
                made * joint.twin_scale,
                down_factor=old / (made * joint.twin_scale),
            )
        return _Change(joint, 1.0, alpha, made, up_factor=old / made)
    return _Change(joint, ratio, alpha, made)


def _alpha_of(site: Site, divisor: float, ratio: float = 1.0) -> float:
    """Return the alpha that stands for a site's scale, times ``ratio``, over ``divisor``."""
    scaling = site.scaling
    own = math.sqrt(scaling.rank) if scaling.rank_stabilised else float(scaling.rank)
    if scaling.alpha is not None and own == divisor and not scaling.epsilon:
        return scaling.alpha * ratio
    return scaling.factor * ratio * divisor


def _plan(
    adapter: Adapter,
    changes: Sequence[_Change],
    output: Path,
    options: Mapping[str, Any],
    dtype: str | None,
) -> AdapterPlan:
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


def _special(changes: Sequence[_Change]) -> Iterator[tuple[str, Carried]]:
    """Yield the tensors that change, by their names."""
    for change in changes:
        stored = change.site.slots.get(Slot.ALPHA)
        if stored is not None and change.alpha != change.site.scaling.alpha:
            yield stored.spec.name, Carried(stored.spec, (), constant=change.alpha)
        for name, factor in change.factors().items():
            stored = next(s for s in change.site.slots.values() if s.spec.name == name)
            yield name, Carried(stored.spec, (stored,), factor=factor)


def _config(
    adapter: Adapter, changes: Sequence[_Change], options: Mapping[str, Any]
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


def _notes(
    adapter: Adapter,
    changes: Sequence[_Change],
    alpha: float | None,
    keep: str,
    max_norm: float | None,
) -> Iterator[str]:
    if alpha is not None:
        ratios = sorted({change.ratio for change in changes})
        if keep == "delta":
            yield f"alpha is {alpha:g} now; the deltas are what they were, B makes up for it"
        else:
            words = ", ".join(f"{ratio:g}" for ratio in ratios[:4])
            yield f"alpha is {alpha:g} now; the factors are what they were, the deltas × {words}"
    if max_norm is not None:
        count = sum(change.ratio != 1 for change in changes)
        yield f"{count} of {len(changes)} modules had a larger norm than {max_norm:g}"
    if any(change.ratio != 1 for change in changes) and adapter.extras:
        yield (
            f"{len(adapter.extras)} tensors are no deltas and stay as they are, such as "
            f"{adapter.extras[0].name!r}"
        )


def _rounding_error(changes: Sequence[_Change], plan: AdapterPlan, threads: int | None) -> float:
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


def _is_rounded(change: _Change, dtypes: Mapping[str, str]) -> bool:
    factors = (change.up_factor, change.down_factor)
    if not all(abs(math.frexp(factor)[0]) in (0.0, 0.5) for factor in factors):
        return True  # not a power of two, which only moves exponents
    return any(
        DTYPES[dtypes[stored.spec.name]].bits < DTYPES[stored.spec.dtype].bits
        or {dtypes[stored.spec.name], stored.spec.dtype} == {"F16", "BF16"}
        for stored in change.site.slots.values()
        if DTYPES[stored.spec.dtype].is_float
    )
