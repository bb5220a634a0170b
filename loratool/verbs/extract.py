"""``extract``: the difference of a finetuned model and its base, as an adapter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import Final

from loratool.adapter.model import Kind
from loratool.base.model import open_model
from loratool.base.refusals import check_base
from loratool.errors import BaseModelError, OptionError, UnsupportedError
from loratool.files.atomic import check_output
from loratool.files.dtypes import OUTPUT_DTYPES
from loratool.files.places import located
from loratool.shards.course import ShareReport
from loratool.shards.division import Division, Executors
from loratool.shards.roots import Roots
from loratool.shards.status import StatusReport
from loratool.verbs.algebra.combination import ONE_RANK, output_scheme
from loratool.verbs.algebra.ranks import Truncation, parse_size
from loratool.verbs.arguments import dtype_name, one_or_more, output_path
from loratool.verbs.extraction.adapter import Difference
from loratool.verbs.extraction.difference import Settings
from loratool.verbs.extraction.pairs import Leftover, Pairing, Selection, Target, pair
from loratool.verbs.extraction.pipeline import Extraction, dry_run_of, run
from loratool.verbs.extraction.result import ExtractReport
from loratool.write.options import WriteOptions

__all__ = ["METHODS", "RESIDUALS", "VARIANTS", "extract"]

AnyPath = str | PathLike[str]
Progress = Callable[[int, int], None]
METHODS: Final = ("auto", "exact", "randomised")
RESIDUALS: Final = ("report", "carry")
VARIANTS: Final = ("lora", "dora")


def extract(
    base: AnyPath,
    finetuned: AnyPath,
    output: AnyPath,
    *,
    rank: int | str | None = None,
    energy: float | None = None,
    max_error: float | None = None,
    max_size: int | str | None = None,
    sv_ratio: float | None = None,
    sv_fro: float | None = None,
    sv_cumulative: float | None = None,
    rank_multiple: int = 1,
    to: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    embeddings: bool = False,
    save_module: Sequence[str] = (),
    residual: str = "report",
    variant: str = "lora",
    method: str = "auto",
    seed: int = 0,
    clamp_quantile: float | None = None,
    save_spectrum: AnyPath | None = None,
    dtype: str | None = None,
    force: bool = False,
    no_card: bool = False,
    dry_run: bool = False,
    resume: bool = False,
    shards: str | None = None,
    finish: bool = False,
    wait: bool = False,
    executor: Executors | None = None,
    device: str = "auto",
    threads: int | None = None,
    progress: Progress | None = None,
) -> ExtractReport | ShareReport | StatusReport:
    """Turn ``finetuned - base`` into an adapter, module by module.

    Differences are formed in float32 and decomposed by a randomised block Krylov method, or
    exactly where matrices are small. The error of every module is measured, not estimated.

    Args:
        base: Folder or file of the base.
        finetuned: Folder or file of the finetuned model.
        output: Where the adapter goes: a folder, or a file for schemes without a configuration.
        rank: At most this rank in every module, or ``"auto"``: as far as the spectrum stands
            out of the rounding noise of the stored dtype. A number may limit the following.
        energy: Smallest rank that keeps this share of ``‖Δ‖_F²`` in each module.
        max_error: Smallest rank with at most this relative Frobenius error in each module.
        max_size: Bytes of the weights file, spread over the modules for the smallest error.
        sv_ratio: Keep the singular values above ``σ₁ / sv_ratio``.
        sv_fro: Smallest rank that keeps this share of ``‖Δ‖_F``.
        sv_cumulative: Smallest rank that keeps this share of the sum of the singular values.
        rank_multiple: Make every rank a multiple of this.
        to: The scheme to write; by default ``peft``.
        include: Regular expressions; only modules that match one anywhere are extracted. With
            ``glob:`` before them patterns as those of a weight (``glob:layers.0-11``).
        exclude: The same; modules that match one are not.
        embeddings: Extract embeddings and the output head too.
        save_module: Modules (paths or dotted suffixes) that are saved whole.
        residual: What becomes of changes that no factors express: ``report``, or ``carry``
            them whole where the scheme has a place for them.
        variant: ``lora``, or ``dora``: with a length for every row of a linear layer, for models
            whose weights were scaled too; the report says what it gains. It takes a number as
            ``rank`` and no other rule.
        method: ``auto``, ``exact`` or ``randomised``.
        seed: Of the randomised method.
        clamp_quantile: Clamp the factors as kohya's extraction does; it costs accuracy, and
            how much is in the report.
        save_spectrum: A file for the spectra; :func:`truncate` reads it to choose ranks later.
        dtype: ``float32``, ``float16`` or ``bfloat16``; by default
            the wider of the two models', of each weight.
        force: Replace an existing output.
        no_card: Write no card; that of the input travels as it is.
        dry_run: Say what would be done, from headers alone.
        resume: Keep finished modules beside the output if the run is interrupted, and take
            up those of an interrupted run.
        shards: Decompose a share of the modules, ``"3/8"`` or ``"auto"`` (what nobody does yet),
            into the folder ``OUT.loratool-parts``.
        finish: Make the adapter of what is in that folder; after ``shards`` only if all is there.
        wait: Wait until all parts are there; with ``"auto"`` take over those of workers that died.
        executor: What does the parts: an executor of :mod:`concurrent.futures`, a function that
            makes one, or a name such as ``"processes:4"``.
        device: ``cpu``, ``cuda``, ``cuda:N``, several with commas between them, or ``auto``:
            a GPU where there is one and more than 2 GB are to be read, else the processor.
        threads: Number of modules in work at a time.
        progress: Called with how much is done and how much there is.

    Raises:
        LoratoolError: Nothing was written; the message says why.
    """
    is_auto = rank == "auto"
    if isinstance(rank, str) and not is_auto:
        raise OptionError("--rank", f"{rank!r} is neither a number nor auto")
    size = parse_size(max_size) if max_size is not None else None
    limit = rank if isinstance(rank, int) else None
    truncation = Truncation(
        limit, energy, max_error, size, sv_ratio, sv_fro, sv_cumulative, rank_multiple
    )
    _check_options(
        truncation, is_auto=is_auto, method=method, residual=residual, clamp=clamp_quantile
    )
    _check_variant(variant, truncation, is_auto=is_auto, clamp=clamp_quantile)
    division = Division.of(shards, finish=finish, wait=wait, executor=executor)
    if division is not None and resume:
        raise OptionError("--resume", "parts are kept anyway: leave it out")
    place, dtype = output_path(output), dtype_name(dtype)
    include, exclude = one_or_more(include), one_or_more(exclude)
    save_module = one_or_more(save_module)
    base, finetuned = located(base), located(finetuned)
    models = [open_model(path) for path in (base, finetuned)]
    for model in models:
        check_base(model)
    inputs = [base, finetuned]
    if not dry_run:
        if division is None:
            check_output(place, force=force, inputs=inputs)
        if save_spectrum is not None:
            check_output(
                Path(save_spectrum), force=force, inputs=[*inputs, place], kinds=(".json",)
            )
    selection = Selection.of(include, exclude, save_module, embeddings=embeddings)
    pairing = pair(models[0], models[1], selection)
    _check_pairing(pairing, models[1].path, save_module)
    if variant == "dora":
        _only_linear(pairing)
    asked = {
        **truncation.recorded,
        "rank": rank,  # which may be "auto"
        "to": to,
        "include": tuple(include),
        "exclude": tuple(exclude),
        "embeddings": embeddings or None,
        "save_module": tuple(save_module),
        "residual": residual,
        "variant": variant if variant != "lora" else None,
        "method": method,
        "seed": seed,
        "clamp_quantile": clamp_quantile,
        "dtype": dtype,
        "no_card": no_card or None,
    }
    scheme = output_scheme((), to)
    written = OUTPUT_DTYPES[dtype] if dtype else None
    draft = Difference(
        base=models[0],
        tuned=models[1],
        targets=pairing.targets,
        carried=pairing.saved,
        scheme=scheme,
        options=WriteOptions(
            place, told=models[0].told, dtype=None if variant == "dora" else written
        ),
        dtype=written,
        asked=asked,
        modules={},
        clamp=clamp_quantile,
        group=ONE_RANK if size is not None and scheme.scale.has_one_rank else None,
        is_dora=variant == "dora",
    )
    if dry_run:
        return dry_run_of(draft, pairing, truncation, device, threads)
    how = Extraction(
        settings=Settings(
            truncation,
            is_auto,
            method,
            seed,
            variant=variant,
            dtype=written,
        ),
        carries=residual == "carry",
        save_spectrum=Path(save_spectrum) if save_spectrum is not None else None,
        force=force,
        resume=resume,
        device=device,
        threads=threads,
        progress=progress,
    )
    if division is not None:
        from loratool.verbs.extraction.divided import divided_extraction

        roots = Roots.of({"base": base, "finetuned": finetuned})
        return divided_extraction(draft, pairing, how, division, roots)
    return run(draft, pairing, how)


def _check_options(
    truncation: Truncation,
    *,
    is_auto: bool,
    method: str,
    residual: str,
    clamp: float | None,
) -> None:
    if is_auto and (truncation.rule is not None or truncation.max_size is not None):
        raise OptionError("--rank", "auto and another rule both decide about ranks")
    if not is_auto and not truncation.is_given:
        raise OptionError("extract", "say how far: --rank, --energy, --max-error or --max-size")
    if method not in METHODS:
        raise OptionError.none_of("--method", method, METHODS)
    if residual not in RESIDUALS:
        raise OptionError.none_of("--residual", residual, RESIDUALS)
    if clamp is not None and not 0.5 < clamp <= 1:
        raise OptionError("--clamp-quantile", f"{clamp:g} is not in (0.5, 1]")


def _check_variant(
    variant: str, truncation: Truncation, *, is_auto: bool, clamp: float | None
) -> None:
    if variant not in VARIANTS:
        raise OptionError.none_of("--variant", variant, VARIANTS)
    if variant == "lora":
        return
    is_plain = truncation.rule is None and truncation.max_size is None and not is_auto
    if truncation.rank is None or not is_plain:
        raise OptionError("--variant", "dora takes a number as --rank, and no other rule")
    if clamp is not None:
        raise OptionError("--clamp-quantile", "means nothing to --variant dora")


def _only_linear(pairing: Pairing) -> None:
    """Leave over what PEFT and others have no DoRA for, or not the same one.

    Raises:
        UnsupportedError: That is everything.
    """
    kept: list[Target] = []
    for target in pairing.targets:
        if target.kind is Kind.LINEAR and not target.is_parameter and target.experts == 1:
            kept.append(target)
            continue
        name = target.name if target.is_parameter else f"{target.module}.weight"
        why = "no linear layer by itself, which --variant dora is for"
        pairing.leftovers.append(Leftover(name, why, target.base, target.tuned))
    if pairing.targets and not kept:
        raise UnsupportedError(
            pairing.targets[0].name,
            "is no linear layer by itself, as no module that was selected is, and --variant dora "
            "is for those",
            hint="leave out --variant dora",
        )
    pairing.targets[:] = kept


def _check_pairing(pairing: Pairing, path: Path, save_module: Sequence[str]) -> None:
    if not pairing.same and not pairing.saved:
        raise BaseModelError(
            path,
            "has no tensor in common with the base",
            hint="are these two the same kind of model? The base comes first",
        )
    for name in save_module:
        if not any(_is_of(item, name) for item in pairing.saved):
            raise OptionError("--save-module", f"the finetuned model has no module {name!r}")


def _is_of(item: Leftover, name: str) -> bool:
    module = item.name.rpartition(".")[0]
    return module == name or module.endswith(f".{name}")
