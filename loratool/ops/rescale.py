"""``rescale``: multiply a delta, set alpha, or move the scale without changing the delta."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from loratool.adapter.model import BASE_DEPENDENT, Adapter
from loratool.errors import OptionError, UnsupportedError
from loratool.files.atomic import check_output, scratch
from loratool.files.dtypes import OUTPUT_DTYPES
from loratool.ops.algebra.joining import Joint, check_computable, join
from loratool.ops.algebra.plan import AdapterPlan
from loratool.ops.algebra.planning import check_place
from loratool.ops.algebra.provenance import provenance
from loratool.ops.algebra.rescaling import Change, change_of, plan_rescaling, rounding_of
from loratool.ops.conversion.through import is_direct
from loratool.ops.importing import import_torch
from loratool.ops.opening import open_adapter
from loratool.plan.adapter import ConversionPlan
from loratool.plan.writing import run_conversion
from loratool.schemes import scheme_named
from loratool.write.options import Wishes
from loratool.write.write import plan_conversion

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
        final: How the result is written in the input's scheme, where that is not PEFT's.
    """

    scales: Mapping[str, tuple[float, float]]
    ratios: Mapping[str, float]
    relative_error: float
    plan: AdapterPlan
    is_written: bool
    notes: tuple[str, ...] = field(default=())
    final: ConversionPlan | None = None

    @property
    def shown(self) -> AdapterPlan | ConversionPlan:
        """The plan of the files that there are in the end."""
        return self.final if self.final is not None else self.plan

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
            "bytes_written" if self.is_written else "bytes_to_write": self.shown.nbytes,
            "tensors": len(self.shown.specs),
            "dropped": [{"name": name, "why": why} for name, why in self.plan.dropped],
            "notes": list(self.notes),
        }


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
    settings = {
        "scale": scale,
        "alpha": alpha,
        "keep": keep,
        "max_norm": max_norm,
        "fold": fold,
        "to_rslora": to_rslora,
        "from_rslora": from_rslora,
        "dtype": dtype,
        "threads": threads,
    }
    if not is_direct(scheme_named(opened.scheme), place):
        return _through_peft(opened, place, settings, force=force, dry_run=dry_run)
    stabilised = to_rslora or from_rslora
    _check_kinds(opened, fold=fold or stabilised or alpha is not None, stabilised=stabilised)
    joints, _ = join([opened], [1.0])
    norms = _norms(joints, threads) if max_norm is not None else {}
    changes = [
        change_of(
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
    plan = plan_rescaling(opened, changes, place, options, OUTPUT_DTYPES[dtype] if dtype else None)
    notes = [*plan.notes, *_notes(opened, changes, alpha, keep, max_norm)]
    error = rounding_of(changes, plan, threads)
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


def _through_peft(
    adapter: Adapter, output: Path, settings: dict[str, Any], *, force: bool, dry_run: bool
) -> RescaleReport:
    """Rescale an adapter of another scheme as PEFT's, and write it in its own scheme again."""
    scheme = scheme_named(adapter.scheme)
    check_place(output, scheme.name, has_config=scheme.has_config)
    with ExitStack() as stack:
        if dry_run:
            folder = Path(stack.enter_context(TemporaryDirectory()))
        else:
            folder = stack.enter_context(scratch(output))
        wishes = Wishes(output=folder / "input", family=adapter.family, then=scheme)
        plan = plan_conversion(adapter, scheme_named("peft"), wishes)
        run_conversion(plan, wishes.output, inputs=[adapter.path])
        result = folder / output.stem
        report = rescale(wishes.output, result, **settings)
        options = {k: v for k, v in settings.items() if v and k != "threads"}
        final = Wishes(
            output=output,
            family=adapter.family,
            history=provenance("rescale", [adapter], options),
        )
        written = plan_conversion(open_adapter(result), scheme, final)
        if not dry_run:
            run_conversion(written, output, inputs=[adapter.path], force=force)
    return replace(report, is_written=not dry_run, final=written)


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
