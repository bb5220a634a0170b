"""``truncate``: the best approximation of an adapter at lower ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from loratool.adapter.model import Adapter
from loratool.adapter.problems import is_matrix, plain_options
from loratool.adapter.slots import Slot
from loratool.errors import AdapterError, FileFormatError, OptionError
from loratool.files.atomic import check_output
from loratool.files.dtypes import OUTPUT_DTYPES
from loratool.files.json import read_json_object
from loratool.files.places import called, located
from loratool.plan.devices import exactly, mover_to
from loratool.plan.history import Source
from loratool.schemes.opening import open_adapter
from loratool.verbs.algebra.combination import Combination, output_scheme
from loratool.verbs.algebra.modules import check_computable, join
from loratool.verbs.algebra.ranks import Truncation, parse_size
from loratool.verbs.algebra.result import AdapterReport, finish
from loratool.verbs.algebra.sums import Method
from loratool.verbs.arguments import dtype_name, one_or_more, output_path
from loratool.write.options import WriteOptions

__all__ = ["truncate"]

AnyPath = str | PathLike[str]
Progress = Callable[[int, int], None]


@exactly
def truncate(
    adapter: AnyPath,
    output: AnyPath,
    *,
    rank: int | None = None,
    energy: float | None = None,
    max_error: float | None = None,
    max_size: int | str | None = None,
    sv_ratio: float | None = None,
    sv_fro: float | None = None,
    sv_cumulative: float | None = None,
    rank_multiple: int = 1,
    base: AnyPath | None = None,
    spectrum: AnyPath | None = None,
    dtype: str | None = None,
    force: bool = False,
    no_card: bool = False,
    dry_run: bool = False,
    alpha: float | None = None,
    adapter_name: str | None = None,
    skip: Sequence[str] = (),
    device: str = "auto",
    threads: int | None = None,
    progress: Progress | None = None,
) -> AdapterReport:
    """Write the best approximation of ``adapter`` at lower ranks (Eckart & Young 1936).

    The deltas are decomposed through their factors, in float64, without ever being formed. The
    singular values are split evenly between the factors, whose scale becomes 1 (alpha = rank).
    A module whose rank does not change keeps its factors and its alpha, bit for bit. With
    ``rank`` alone, what has no factors (LoHa, LoKr, whole differences) is written as plain
    factors first.

    Args:
        adapter: File or folder.
        output: Where the result goes: a folder, or a file for schemes without a configuration.
        rank: At most this rank in every module; may limit any of the following.
        energy: Smallest rank that keeps this share of ``‖Δ‖_F²`` in each module.
        max_error: Smallest rank with at most this relative Frobenius error in each module.
        max_size: Bytes of the weights file (or ``"8MB"``), spread over the modules so that the
            total squared error is smallest; a module may lose all of its ranks.
        sv_ratio: Keep the singular values above ``σ₁ / sv_ratio``.
        sv_fro: Smallest rank that keeps this share of ``‖Δ‖_F``.
        sv_cumulative: Smallest rank that keeps this share of the sum of the singular values.
        rank_multiple: Make every rank a multiple of this.
        base: With ``max_size``: weigh each error by the norm of the base's own weight.
        spectrum: What ``extract(save_spectrum=...)`` wrote for this adapter: rules are then
            about the whole difference that was extracted, not about what the adapter holds.
        dtype: ``float32``, ``float16`` or ``bfloat16``; by default that of the input.
        force: Replace an existing output.
        no_card: Write no card; that of the input travels as it is.
        dry_run: Compute, report, and write nothing.
        alpha: Alpha where none is recorded.
        adapter_name: Which adapter, where a path holds several.
        skip: Regular expressions; keys that match are left out, and reported.
        device: ``auto`` (the processor), ``cpu``, ``cuda`` or ``cuda:N``.
        threads: Number of modules in work at a time.
        progress: Called with how much is done and how much there is.

    Raises:
        LoratoolError: Nothing was written; the message says why.
    """
    place, dtype, skip = output_path(output), dtype_name(dtype), one_or_more(skip)
    size = parse_size(max_size) if max_size is not None else None
    truncation = Truncation(
        rank, energy, max_error, size, sv_ratio, sv_fro, sv_cumulative, rank_multiple
    )
    if not truncation.is_given:
        raise OptionError(
            "truncation",
            "say how far: --rank, --energy, --max-error or --max-size",
            hint="such as --rank 16, or --max-error 0.05",
        )
    if base is not None and truncation.max_size is None:
        raise OptionError("--base", "weighs modules against each other, for --max-size only")
    adapter = located(adapter)
    base = located(base) if base is not None else None
    opened = open_adapter(adapter, adapter_name=adapter_name, alpha=alpha, skip=skip)
    asked = {
        **truncation.recorded,
        "base": called(base) if base is not None else None,
        "spectrum": Path(spectrum).name if spectrum is not None else None,
        "dtype": dtype,
        "alpha": alpha,
        "adapter_name": adapter_name,
        "skip": tuple(skip),
        "no_card": no_card or None,
    }
    inputs = [Path(path) for path in (adapter, base, spectrum) if path is not None]
    carry_out = _CarryOut(
        output=place,
        truncation=truncation,
        asked=asked,
        origin=Source.of_adapter(opened),
        inputs=inputs,
        dtype=OUTPUT_DTYPES[dtype] if dtype else None,
        force=force,
        dry_run=dry_run,
        device=device,
        threads=threads,
        progress=progress,
    )
    if _lacks_factors(opened) and truncation == Truncation(rank) and spectrum is None:
        given = {"alpha": alpha, "adapter_name": adapter_name, "skip": skip}
        return _by_way_of_factors(opened, carry_out, given)
    base_norms = None
    if base is not None:
        from loratool.verbs.algebra.base_norms import weight_norms

        base_norms = weight_norms(opened, Path(base))
    rests = _rests(opened, Path(spectrum)) if spectrum is not None else None
    return carry_out.of(opened, base_norms=base_norms, rests=rests)


@dataclass(frozen=True, kw_only=True)
class _CarryOut:
    """A truncation, whatever it is of.

    Attributes:
        output: Where the result goes.
        truncation: How far.
        asked: What was asked for, for the metadata.
        origin: The adapter that was given.
        inputs: What the output may not touch.
        dtype: Of the result, as a header calls it.
        force: Replace an existing output.
        dry_run: Compute, report, and write nothing.
        device: Where to compute.
        threads: Number of modules in work at a time.
        progress: Called with how much is done and how much there is.
    """

    output: Path
    truncation: Truncation
    asked: Mapping[str, Any]
    origin: Source
    inputs: Sequence[Path]
    dtype: str | None
    force: bool
    dry_run: bool
    device: str
    threads: int | None
    progress: Progress | None

    def of(
        self,
        adapter: Adapter,
        *,
        base_norms: Mapping[str, float] | None = None,
        rests: Mapping[str, float] | None = None,
    ) -> AdapterReport:
        """Truncate an adapter of plain factors.

        Raises:
            LoratoolError: Nothing was written; the message says why.
        """
        check_computable(adapter, verb="truncate")
        joints, notes = join([adapter], dtype=self.dtype)
        draft = Combination(
            verb="truncate",
            adapters=[adapter],
            joints=joints,
            scheme=output_scheme([adapter], None),
            options=WriteOptions(self.output, dtype=self.dtype, keeps_naming=True),
            asked=self.asked,
            sources=(self.origin,),
            method=Method(mover=mover_to(self.device)),
            keep_factors=True,
            notes=notes,
        )
        return finish(
            draft,
            self.truncation,
            inputs=self.inputs,
            force=self.force,
            dry_run=self.dry_run,
            threads=self.threads,
            progress=self.progress,
            base_norms=base_norms,
            rests=rests,
        )


def _lacks_factors(adapter: Adapter) -> bool:
    """Whether some modules are no plain factors, but deltas of matrices that need no base."""
    others = [site for site in adapter.sites if not site.is_plain]
    if any(Slot.BIAS in site.slots for site in adapter.sites):
        return False
    needed = ("--base" in plain_options(site.variant, site.slots) for site in others)
    return bool(others) and all(map(is_matrix, others)) and not any(needed)


def _by_way_of_factors(
    opened: Adapter, carry_out: _CarryOut, given: Mapping[str, Any]
) -> AdapterReport:
    """Truncate what has no factors: write it as plain LoRA first, then truncate that.

    The errors are those of both steps, against the deltas as they were.

    Args:
        opened: The adapter.
        carry_out: The truncation.
        given: With which options it was opened.
    """
    from loratool.verbs.convert import convert

    check_output(carry_out.output, force=carry_out.force, inputs=carry_out.inputs)
    with TemporaryDirectory(prefix="loratool-") as folder:
        place = Path(folder) / opened.path.name
        first = convert(
            opened.path,
            output_scheme([opened], None).name,
            place,
            to_lora=True,
            rank=carry_out.truncation.rank,
            **given,
        )
        found = carry_out.of(open_adapter(place))
    errors = first.outcome.errors
    modules = []
    for module in found.modules:
        norm, error = errors.get(module.module, (module.squared_norm, 0.0))
        total = error + module.squared_error
        modules.append(replace(module, squared_norm=norm, squared_error=total))
    note = "modules without factors were written as plain factors first; errors are those of both"
    return replace(found, modules=tuple(modules), notes=(note, *first.notes, *found.notes))


def _rests(adapter: Adapter, path: Path) -> dict[str, float]:
    """Return what each module lacks of the difference that it was extracted from.

    Raises:
        FileFormatError: The file is not one that an extraction wrote.
        AdapterError: It is about other modules.
    """
    from loratool.verbs.spectrum import spectra

    document = read_json_object(path)
    try:
        norms = {
            str(entry["module"]): float(entry["squared_norm"]) for entry in document["modules"]
        }
    except (KeyError, TypeError, ValueError):
        raise FileFormatError(
            path, "is no spectrum file", hint="write one with extract --save-spectrum"
        ) from None
    found = spectra(adapter)
    missing = [spectrum.module for spectrum in found if spectrum.module not in norms]
    if missing:
        raise AdapterError(path, f"has no spectrum of {missing[0]!r}")
    return {s.module: max(0.0, norms[s.module] - s.frobenius_norm**2) for s in found}
