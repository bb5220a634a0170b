"""``rescale``: multiply a delta, set alpha, or move the scale without changing the delta."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from loratool.adapter.fields import LARGEST_NUMBER
from loratool.adapter.model import Adapter, Site
from loratool.adapter.problems import plain_hint
from loratool.adapter.scheme import Scheme
from loratool.adapter.slots import Slot
from loratool.display.shown import Shown
from loratool.errors import OptionError, UnsupportedError, spoken
from loratool.files.atomic import check_output
from loratool.files.containers import USUAL, is_weights
from loratool.files.dtypes import OUTPUT_DTYPES
from loratool.files.places import located
from loratool.math.factored import norm
from loratool.names.strengths import Weights, recorded_weights, with_strengths
from loratool.plan.adapter import AdapterPlan
from loratool.plan.history import History, Source
from loratool.plan.plan import run as run_plan
from loratool.plan.plan import write as write_plan
from loratool.plan.threads import in_parallel
from loratool.schemes import scheme_named
from loratool.schemes.opening import open_adapter
from loratool.variants import variant_named
from loratool.verbs.algebra.combination import input_notes, write_or_refuse
from loratool.verbs.algebra.extras import gather_extras
from loratool.verbs.algebra.followed import Followed, followed_of
from loratool.verbs.algebra.modules import Joint, check_computable, join
from loratool.verbs.algebra.scale_changes import (
    Change,
    change_of,
    plan_in_place,
    rescaled_parts,
    rounding_of,
)
from loratool.verbs.algebra.sums import load_terms
from loratool.verbs.arguments import dtype_name, one_or_more, output_path
from loratool.write.adapter import NewAdapter
from loratool.write.metadata import kept_metadata
from loratool.write.options import WriteOptions
from loratool.write.refusals import check_names
from loratool.write.sidecars import carried_files

if TYPE_CHECKING:
    from loratool.display.document import Document

__all__ = ["RescaleReport", "rescale"]

AnyPath = str | PathLike[str]
Progress = Callable[[int, int], None]
KEEP: Final = ("factors", "delta")
SMALLEST_ALPHA: Final = 1.2e-38
"""The smallest that float32, which alpha tensors have, holds to all its digits."""


@dataclass(frozen=True)
class RescaleReport(Shown):
    """What a rescaling did.

    Attributes:
        scales: Old and new scale of every module, by name.
        ratios: New over old norm of every module's delta; 1 where only the form changed.
        relative_error: Of the deltas written against the exact ones.
        plan: What was decided.
        is_written: Whether it was written.
        output: Where it is, or would be.
        notes: What a user should know.
    """

    scales: Mapping[str, tuple[float, float]]
    ratios: Mapping[str, float]
    relative_error: float
    plan: AdapterPlan
    is_written: bool
    output: Path
    notes: tuple[str, ...] = field(default=())

    def as_json(self) -> dict[str, Any]:
        """Return a document for scripts."""
        return {
            "schema": 1,
            "dry_run": not self.is_written,
            "output": spoken(str(self.output)),
            "relative_error": self.relative_error,
            "modules": [
                {"module": name, "scale": new, "old_scale": old, "ratio": self.ratios[name]}
                for name, (old, new) in self.scales.items()
            ],
            "bytes_written" if self.is_written else "bytes_to_write": self.plan.nbytes,
            "tensors": len(self.plan.specs),
            "files": self.plan.described_files(),
            "dropped": [{"name": name, "why": why} for name, why in self.plan.dropped],
            "left_behind": [{"name": name, "why": why} for name, why in self.plan.left_behind],
            "notes": list(self.notes),
        }

    def document(self) -> Document:
        """Return what people see of it."""
        from loratool.verbs.algebra.rescaled import rescaling_document

        return rescaling_document(self)


def rescale(
    adapter: AnyPath,
    output: AnyPath,
    *,
    scale: float | None = None,
    weights: Weights = (),
    alpha: float | None = None,
    keep: str = "factors",
    max_norm: float | None = None,
    fold: bool = False,
    to_rslora: bool = False,
    from_rslora: bool = False,
    dtype: str | None = None,
    force: bool = False,
    no_card: bool = False,
    dry_run: bool = False,
    adapter_name: str | None = None,
    skip: Sequence[str] = (),
    threads: int | None = None,
    progress: Progress | None = None,
) -> RescaleReport:
    """Multiply the delta of ``adapter``, set its alpha, or move its scale elsewhere.

    ``scale`` and ``weights``, ``alpha`` or ``max_norm`` change how strong it is; ``fold``,
    ``to_rslora`` and ``from_rslora`` change only where the strength is recorded. Where a
    configuration (or an alpha tensor) records it, the factors are copied byte for byte.

    Args:
        adapter: File or folder.
        output: Where the result goes: a folder, or a file for schemes without a configuration.
        scale: Multiply every delta, and every bias that scales with it, by this.
        weights: The same for single modules, such as ``["te1=0.5"]``; it multiplies ``scale``. A
            number without a pattern is for all of them.
        alpha: Set alpha of every module to this.
        keep: What ``alpha`` leaves alone: ``factors``, so that the delta becomes stronger or
            weaker, or ``delta``, so that B makes up for the new alpha.
        max_norm: Scale a module down wherever ``‖Δ‖_F`` is larger than this.
        fold: Put the whole scale into B; alpha becomes the rank, so that the scale is 1.
        to_rslora: Record the scale as ``alpha / √r``.
        from_rslora: Record the scale as ``alpha / r``.
        dtype: ``float32``, ``float16`` or ``bfloat16``; by default that of the input.
        force: Replace an existing output.
        no_card: Write no card; that of the input travels as it is.
        dry_run: Say what would be done, and write nothing.
        adapter_name: Which adapter, where a path holds several.
        skip: Regular expressions; keys that match are left out, and reported.
        threads: Number of modules in work at a time.
        progress: Called with how much is done and how much there is.

    Raises:
        LoratoolError: Nothing was written; the message says why.
    """
    _check_options(scale, weights, alpha, keep, max_norm, fold=fold, to=to_rslora, back=from_rslora)
    place, dtype, skip = output_path(output), dtype_name(dtype), one_or_more(skip)
    adapter = located(adapter)
    if not dry_run:
        check_output(place, force=force, inputs=[adapter])
    opened = open_adapter(adapter, adapter_name=adapter_name, skip=skip)
    scheme = scheme_named(opened.scheme)
    check_names(opened, scheme)
    stabilised = to_rslora or from_rslora
    (opened,), (strength,), left_out = with_strengths([opened], weights)
    if not opened.sites:
        raise OptionError("-w", "every weight is 0, so that nothing would be left")
    is_strength = alpha is None and max_norm is None and not fold and not stabilised
    others, plain = _others(opened) if is_strength else ((), opened)
    ratios = {site.label: (1.0 if scale is None else scale) * strength.of(site) for site in others}
    followed = followed_of(opened, ratios, others)
    joints: Sequence[Joint] = ()
    if plain.sites:
        _check_kinds(plain, fold=fold or stabilised or alpha is not None, stabilised=stabilised)
        joints, _ = join([plain], [strength])
    norms = _norms(joints, threads) if max_norm is not None else {}
    if stabilised and strength.sites:
        raise OptionError("-w", "patterns and the two rslora options do not go together")
    apart = _without_pattern(joints, is_alone=max_norm is not None or bool(strength.sites))
    changes = [
        change_of(
            joint,
            _ratio(joint, scale, alpha, keep, max_norm, norms, joints),
            opened,
            alpha=alpha,
            fold=fold,
            rank_stabilised=_is_stabilised(opened, to=to_rslora, back=from_rslora, fold=fold),
            in_factors=joint.name in apart and not stabilised,
        )
        for joint in joints
    ]
    for change in changes:
        if not change.site.variant.is_linear and change.ratio != 1:
            raise UnsupportedError(
                f"{opened.path}: {change.joint.name}",
                f"is a {change.site.variant.name}: its delta depends on the base's weight, and no "
                "scale multiplies it",
                hint=plain_hint(change.site, opened),
            )
    for change in changes:
        _check_alpha(change)
    asked = {
        "scale": scale,
        "weights": tuple(recorded_weights(weights, 1)) if weights else (),
        "alpha": alpha,
        "keep": keep if alpha is not None else None,
        "max_norm": max_norm,
        "fold": fold or None,
        "to_rslora": to_rslora or None,
        "from_rslora": from_rslora or None,
        "dtype": dtype,
        "adapter_name": adapter_name,
        "skip": tuple(skip),
        "no_card": no_card or None,
    }
    written_dtype = OUTPUT_DTYPES[dtype] if dtype else None
    is_usual = not is_weights(place) or place.suffix.lower() == USUAL
    is_in_place = scheme.home.is_open and not scheme.roles.is_transposed and is_usual
    if is_in_place:
        plan = plan_in_place(opened, changes, place, asked, written_dtype, followed)
        error = rounding_of(changes, plan, threads)
        is_measured = True
    else:
        options = WriteOptions(place, dtype=written_dtype, keeps_naming=True)
        plan = _rewritten(opened, changes, followed, scheme, options, asked)
        error, is_measured = 0.0, False
    if not dry_run:
        outcome = write_plan(
            plan, place, inputs=[adapter], force=force, threads=threads, progress=progress
        )
    elif not is_measured:
        outcome = run_plan(plan, threads=threads, progress=progress)
    if not is_measured:
        error = outcome.relative_error
    return RescaleReport(
        scales={
            **{c.joint.name: (c.site.scaling.factor, c.scale) for c in changes},
            **{other.site.label: other.scales for other in followed},
        },
        ratios={
            **{c.joint.name: c.ratio for c in changes},
            **{other.site.label: other.ratio for other in followed},
        },
        relative_error=error,
        plan=plan,
        is_written=not dry_run,
        output=place,
        notes=(*plan.notes, *left_out, *_notes(opened, changes, alpha, keep, max_norm)),
    )


def _rewritten(
    adapter: Adapter,
    changes: Sequence[Change],
    others: Sequence[Followed],
    scheme: Scheme,
    options: WriteOptions,
    asked: Mapping[str, Any],
) -> AdapterPlan:
    """Return the plan of the adapter in a scheme that keeps scales in a way of its own."""
    sidecars, left, notes = carried_files([adapter])
    new = NewAdapter(
        parts=(*rescaled_parts(adapter, changes), *(other.part(adapter) for other in others)),
        extras=gather_extras([adapter]),
        scheme=adapter.scheme,
        config=dict(adapter.config.raw) if adapter.config is not None else None,
        sidecar=adapter.sidecar,
        family=adapter.family,
        components=adapter.components,
        is_native=adapter.is_native,
        name=adapter.name,
        stem=adapter.weights.stem,
        told=adapter.told,
        metadata=kept_metadata(adapter, adapter.scheme),
        history=History("rescale", (Source.of_adapter(adapter),), asked),
        sidecars=tuple(sidecars),
        stamps=adapter.stamps,
        notes=(*notes, *input_notes([adapter])),
        dropped=tuple((key, "skipped as asked") for key in adapter.skipped),
        left_behind=tuple(left),
    )
    return write_or_refuse(new, scheme, options)


def _check_options(
    scale: float | None,
    weights: Weights,
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
    if weights and (alpha is not None or max_norm is not None):
        raise OptionError("rescale", f"{given[-1]} and -w both decide how strong a module is")
    forms = [n for n, v in (("--fold", fold), ("--to-rslora", to), ("--from-rslora", back)) if v]
    if not given and not forms and not weights:
        raise OptionError(
            "rescale",
            "say what to do: --scale, -w, --alpha, --max-norm, --fold, --to-rslora or "
            "--from-rslora",
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
        raise OptionError.none_of("--keep", keep, KEEP)
    if keep == "delta" and alpha is None:
        raise OptionError("--keep", "says what --alpha leaves alone, and needs it")
    if keep == "delta" and alpha == 0:
        raise OptionError("--alpha", "with alpha 0 no factors keep the delta")


def _others(adapter: Adapter) -> tuple[tuple[Site, ...], Adapter]:
    """Return the modules that are not made of A and B alone, and the adapter without them."""
    found = tuple(s for s in adapter.sites if not s.is_plain or Slot.BIAS in s.slots)
    rest = tuple(site for site in adapter.sites if site not in found)
    return found, replace(adapter, sites=rest)


def _check_kinds(adapter: Adapter, *, fold: bool, stabilised: bool) -> None:
    """Refuse what no scale multiplies, or whose scale has no other form."""
    plain = replace(
        adapter,
        sites=tuple(
            replace(site, variant=variant_named("lora"))
            if site.variant.undetermined and Slot.BIAS not in site.slots
            else site
            for site in adapter.sites
        ),
    )
    check_computable(plain, verb="rescale")
    if stabilised and adapter.config is None:
        raise OptionError(
            adapter.path,
            "has no configuration that could say how its scale is to be read",
        )
    if fold and any(site.scaling.epsilon for site in adapter.sites):
        raise UnsupportedError(
            adapter.path,
            "an AdaLoRA: its scale is alpha / (init_r + 1e-5), and has no other form",
            hint="make it a plain LoRA first: loratool compose ADAPTER -o OUT",
        )


def _check_alpha(change: Change) -> None:
    """Refuse an alpha that configurations may not hold, or that float32 rounds to nothing.

    Raises:
        OptionError: It is too large or too small.
    """
    size = abs(change.alpha)
    if size and not SMALLEST_ALPHA <= size < LARGEST_NUMBER:
        raise OptionError(
            change.joint.name,
            f"alpha would be {change.alpha:g}, expected 0 or a number from {SMALLEST_ALPHA:g} "
            f"to {LARGEST_NUMBER:g}",
        )


def _is_stabilised(adapter: Adapter, *, to: bool, back: bool, fold: bool) -> bool:
    is_now = bool(adapter.config and adapter.config.use_rslora)
    return to or (is_now and not back and not fold)


def _without_pattern(joints: Sequence[Joint], *, is_alone: bool) -> set[str]:
    """Return the modules whose scale no pattern of PEFT's configuration can say for them alone.

    PEFT warns about patterns that mean a raw parameter, and loses those of experts that it fuses
    on loading; both projections of an ``nn.MultiheadAttention`` go by one.

    Args:
        joints: The modules.
        is_alone: Whether each has a ratio of its own.
    """
    weights: dict[str, set[float]] = {}
    for joint in joints:
        weights.setdefault(joint.shape.pattern_path, set()).add(joint.terms[0].weight)
    return {
        joint.name
        for joint in joints
        if (is_alone and joint.shape.needs_default) or len(weights[joint.shape.pattern_path]) > 1
    }


def _norms(joints: Sequence[Joint], threads: int | None) -> dict[str, float]:
    """Return ``‖Δ‖_F`` of every module."""

    def one(joint: Joint) -> float:
        return math.sqrt(math.fsum(norm(delta) ** 2 for (delta,) in load_terms(joint)))

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
    (term,) = joint.terms
    scaling = term.site.scaling
    if scale is not None:
        return scale * term.weight
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
        path = joint.shape.pattern_path
        largest = max(norms[other.name] for other in joints if other.shape.pattern_path == path)
        return min(1.0, max_norm / largest) if largest else 1.0
    return term.weight


def _notes(
    adapter: Adapter,
    changes: Sequence[Change],
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
