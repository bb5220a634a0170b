"""``convert``: the same deltas in another key scheme, or exactly what cannot be expressed there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from loratool.adapter.model import Adapter
from loratool.adapter.scheme import Scheme
from loratool.base.model import Model
from loratool.base.told import open_told
from loratool.display.shown import Shown
from loratool.errors import LoratoolError, OptionError, spoken
from loratool.files.atomic import check_output
from loratool.files.dtypes import OUTPUT_DTYPES
from loratool.files.places import called, located
from loratool.loaders import loader_named
from loratool.loaders.loader import Loader
from loratool.plan.adapter import AdapterPlan
from loratool.plan.history import History, Source, as_recorded
from loratool.plan.outcome import Outcome
from loratool.plan.plan import run as run_plan
from loratool.plan.plan import write as write_plan
from loratool.schemes import scheme_named, scheme_names
from loratool.schemes.detection import ADAPTER_NAME
from loratool.schemes.opening import open_adapter
from loratool.verbs.arguments import dtype_name, one_or_more, output_path
from loratool.verbs.conversion.contents import Conversion, converted
from loratool.verbs.conversion.refusals import check_options
from loratool.write.options import WriteOptions
from loratool.write.write import write

if TYPE_CHECKING:
    from loratool.display.document import Document

__all__ = ["NAMINGS", "ConvertReport", "convert"]

AnyPath = str | PathLike[str]
Progress = Callable[[int, int], None]
NAMINGS: Final = ("native", "diffusers")


@dataclass(frozen=True)
class ConvertReport(Shown):
    """What a conversion did.

    Attributes:
        source: Scheme that was read.
        plan: What was decided.
        outcome: The errors of what had to be computed.
        is_written: Whether it was written.
        output: Where it is, or would be.
        notes: What a user should know, one sentence each.
    """

    source: str
    plan: AdapterPlan
    outcome: Outcome
    is_written: bool
    output: Path
    notes: tuple[str, ...] = field(default=())

    @property
    def relative_error(self) -> float:
        """``‖written - Δ‖ / ‖Δ‖`` over the modules that were computed; 0 where none was."""
        return self.outcome.relative_error

    @property
    def is_exact(self) -> bool:
        """Whether the delta of every module is what it was, bit for bit or to 1e-12."""
        return self.relative_error < 1e-12

    def as_json(self) -> dict[str, Any]:
        """Return a document for scripts."""
        plan = self.plan
        return {
            "schema": 1,
            "dry_run": not self.is_written,
            "output": spoken(str(self.output)),
            "from": self.source,
            "to": plan.scheme,
            "family": plan.family,
            "exact": self.is_exact,
            "relative_error": self.relative_error,
            "modules": [
                {
                    "module": item.part.module,
                    "rank": item.part.rank,
                    "scale": item.part.scale,
                    "moved": item.is_moved,
                    "relative_error": self.outcome.relative(item.part.module),
                    "changes": list(item.part.notes),
                }
                for item in plan.parts
            ],
            "bytes_written" if self.is_written else "bytes_to_write": plan.nbytes,
            "tensors": len(plan.specs),
            "files": plan.described_files(),
            "peak_memory": plan.peak_memory,
            "sidecars": [sidecar.name for sidecar in plan.sidecars],
            "carried": list(plan.extras),
            "dropped": [{"name": name, "why": why} for name, why in plan.dropped],
            "left_behind": [{"name": name, "why": why} for name, why in plan.left_behind],
            "notes": list(self.notes),
        }

    def document(self) -> Document:
        """Return what people see of it."""
        from loratool.verbs.conversion.shown import conversion_document

        return conversion_document(self)


def convert(
    adapter: AnyPath,
    to: str | None,
    output: AnyPath,
    *,
    target: str | None = None,
    source: str | None = None,
    base: AnyPath | None = None,
    initial: AnyPath | None = None,
    alpha: float | None = None,
    adapter_name: str | None = None,
    name: str | None = None,
    family: str | None = None,
    naming: str | None = None,
    component: str | None = None,
    to_lora: bool = False,
    rank: int | None = None,
    fold: bool = False,
    pad: int | None = None,
    enable_lora: Sequence[bool] = (),
    dtype: str | None = None,
    drop: Sequence[str] = (),
    skip: Sequence[str] = (),
    force: bool = False,
    no_card: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> ConvertReport:
    """Write the deltas of ``adapter`` in the scheme ``to``.

    Names, orientation and the place of the scale change; the delta of every module does not.
    Where the bytes of the factors only move, they are moved. Where the scheme has no place for
    the scale it is multiplied into B, and the rounding that costs is reported.

    Args:
        adapter: File or folder.
        to: Name of a scheme (``loratool schemes``); ``None`` for that of ``target``.
        output: A folder, or a file (``.safetensors``, or ``.bin`` and ``.pt`` for
            ``torch.save``) where the scheme has no configuration.
        target: Name of a loader (``vllm``, ``sglang``, ``llamacpp``, ``comfy``, ``diffusers``,
            ``mlx``) that is to apply the result rightly: ranks, scale and names are what it
            expects, and what it cannot apply is refused.
        source: The scheme to read it in; by default the one that recognises most of it.
        base: The model that it is for. Its names settle flattened paths, its shapes kernels;
            weights are read only for variants that depend on them.
        initial: The adapter as it was before training, for PiSSA, OLoRA and others whose
            initialisation changed the base: the result fits the original base.
        alpha: Alpha for modules that record none.
        adapter_name: Which adapter, where a path holds several; otherwise its name in the
            output, for schemes that have one.
        name: The adapter's name in the output, where that is to be another.
        family: Which pipeline its names belong to (``sd1``, ``sdxl``, ``flux``, …), where they
            do not tell.
        naming: ``native`` or ``diffusers`` names of the backbone in ``kohya`` and ``comfy``.
        component: Write one component of a pipeline alone, such as ``unet``.
        to_lora: Write every variant as plain LoRA: LoHa, LoKr, CP and VeRA exactly, others as
            the best approximation of ``rank``.
        rank: Rank of what has to be approximated.
        fold: Multiply every scale into B.
        pad: Fill all modules up to this rank with zeros.
        enable_lora: Which parts of a merged projection loralib's stacked factors are for.
        dtype: ``float32``, ``float16`` or ``bfloat16``; by default as the input.
        drop: Regular expressions of modules and tensors that may be left out.
        skip: Regular expressions; keys that match are not read at all, and reported.
        force: Replace an existing output.
        no_card: Write no card; that of the input travels as it is.
        dry_run: Say what would be done, and write nothing.
        progress: Called with bytes done and bytes in all.

    Raises:
        LoratoolError: Nothing was written; the message says why.
    """
    place, origin = output_path(output), located(adapter)
    base = located(base) if base is not None else None
    initial = located(initial) if initial is not None else None
    inputs = [path for path in (origin, base, initial) if path is not None]
    dtype, drop, skip = dtype_name(dtype), one_or_more(drop), one_or_more(skip)
    loader = loader_named(target) if target is not None else None
    scheme = _written_scheme(_scheme_name(to, loader))
    if naming is not None and naming not in NAMINGS:
        raise OptionError.none_of("--naming", naming, NAMINGS)
    if not dry_run:
        check_output(place, force=force, inputs=inputs)
    opened_base, told = open_told(base, needs_weights=False) if base is not None else (None, None)
    opened = open_adapter(
        origin,
        adapter_name=adapter_name,
        alpha=alpha,
        skip=skip,
        scheme=source,
        base_modules=opened_base.paths if opened_base is not None else (),
        base=told,
        enabled=enable_lora,
    )
    if base is not None and opened_base is None:
        follows = (scheme.follows, scheme_named(opened.scheme).follows)
        open_told(base, needs_weights=follows == (None, None))
    asked = {
        "to": scheme.name,
        "for": target,
        "from": source,
        "base": called(base) if base is not None else None,
        "initial": called(initial) if initial is not None else None,
        "alpha": alpha,
        "adapter_name": adapter_name,
        "name": name,
        "family": family,
        "naming": naming,
        "component": component,
        "to_lora": to_lora or None,
        "rank": rank,
        "fold": fold or None,
        "pad": pad,
        "enable_lora": as_recorded(enable_lora),
        "dtype": dtype,
        "drop": tuple(drop),
        "skip": tuple(skip),
        "no_card": no_card or None,
    }
    if scheme.keys.names_adapter and name is None and opened.name is None:
        # which is what the option is for, then
        kept = [note for note in opened.notes if ADAPTER_NAME not in note]
        opened = replace(opened, notes=tuple(kept))
    written_name = name if name is not None else adapter_name
    check_options(scheme, rank=rank, to_lora=to_lora, name=written_name)
    conversion = Conversion(
        initial=open_adapter(initial, scheme=source) if initial is not None else None,
        drop=tuple(drop),
        to_lora=to_lora,
        rank=rank,
        loader=loader,
    )
    options = WriteOptions(
        output=place,
        base=opened_base,
        told=told,
        dtype=OUTPUT_DTYPES[dtype] if dtype else None,
        family=family,
        naming=naming,
        component=component,
        name=written_name,
        fold=fold,
        pad=pad,
    )
    history = History("convert", (Source.of_adapter(opened),), asked)
    new, options = converted(opened, scheme, conversion, options, history)
    plan = write(new, scheme, options)
    if dry_run:
        outcome = run_plan(plan)
    else:
        outcome = write_plan(plan, place, inputs=inputs, force=force, progress=progress)
    return ConvertReport(
        source=opened.scheme,
        plan=plan,
        outcome=outcome,
        is_written=not dry_run,
        output=place,
        notes=(*plan.notes, *_missing(opened, opened_base, scheme), *_found(outcome)),
    )


def _missing(adapter: Adapter, base: Model | None, scheme: Scheme) -> Iterator[str]:
    """Yield that a base lacks modules of an adapter whose new names are those of that base."""
    if base is None or scheme.follows is None:
        return
    missing = [site.module for site in adapter.sites if not _is_in(base, site.module, adapter)]
    if missing:
        yield (
            f"the base has no {missing[0]!r} (of {len(missing)} such modules): what loads the file "
            "with it may refuse the whole"
        )


def _is_in(base: Model, module: str, adapter: Adapter) -> bool:
    try:
        return base.find(module, family=adapter.family) is not None
    except LoratoolError:  # it is there, in some way that a merge has to settle
        return True


def _scheme_name(to: str | None, loader: Loader | None) -> str:
    if loader is None:
        if to is None:
            raise OptionError(
                "convert",
                "say which scheme to write: --to, or --for a loader",
                hint="such as --to kohya, or --for vllm; loratool schemes lists them",
            )
        return to
    if to is not None and to != loader.scheme:
        raise OptionError("--to", f"{loader.name} reads {loader.scheme}, not {to}")
    return loader.scheme


def _written_scheme(name: str) -> Scheme:
    if name not in scheme_names():
        raise OptionError.none_of("--to", name, scheme_names())
    return scheme_named(name)


def _found(outcome: Outcome) -> list[str]:
    found = []
    if outcome.shifted:
        found.append(
            f"{len(outcome.shifted)} modules had a power of two moved from B to A, for the range "
            "of their dtype"
        )
    if outcome.nonfinite:
        found.append(
            f"{len(outcome.nonfinite)} modules hold NaN or infinity, such as "
            f"{outcome.nonfinite[0]!r}"
        )
    return found
