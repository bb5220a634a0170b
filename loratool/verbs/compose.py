"""``compose``: the exact weighted sum of the deltas of any number of adapters, as an adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from os import PathLike
from typing import Final

from loratool.adapter.model import Adapter, ExtraKind
from loratool.base.told import open_told
from loratool.errors import AdapterError, OptionError, UnsupportedError
from loratool.files.dtypes import OUTPUT_DTYPES
from loratool.files.places import called, located
from loratool.math.combining import Settings
from loratool.names.strengths import Strength, Weights, recorded_weights, with_strengths
from loratool.plan.devices import exactly, mover_to
from loratool.schemes.opening import open_adapter
from loratool.verbs.algebra.combination import Combination, output_scheme
from loratool.verbs.algebra.extras import POLICIES
from loratool.verbs.algebra.modules import check_computable, join
from loratool.verbs.algebra.ranks import Truncation, parse_size
from loratool.verbs.algebra.result import AdapterReport, finish
from loratool.verbs.algebra.sums import Method
from loratool.verbs.arguments import dtype_name, one_or_more, output_path
from loratool.write.options import WriteOptions

__all__ = ["METHODS", "compose"]

AnyPath = str | PathLike[str]
Progress = Callable[[int, int], None]
METHODS: Final = ("linear", "ties", "dare", "dare-ties", "della", "knots", "peft-linear")


@exactly
def compose(
    adapters: Sequence[AnyPath] | AnyPath,
    output: AnyPath,
    *,
    weights: Weights = (),
    method: str = "linear",
    density: float | None = None,
    epsilon: float | None = None,
    seed: int = 0,
    extras: str = "error",
    base: AnyPath | None = None,
    to: str | None = None,
    rank: int | None = None,
    energy: float | None = None,
    max_error: float | None = None,
    max_size: int | str | None = None,
    sv_ratio: float | None = None,
    sv_fro: float | None = None,
    sv_cumulative: float | None = None,
    rank_multiple: int = 1,
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
    """Write ``Σ weight · delta`` as one adapter.

    Without a truncation the sum is exact: factors side by side, the weight and the scale in B,
    alpha equal to the rank. With one it is the best approximation at its rank. Modules that
    only some adapters have keep what those bring.

    Args:
        adapters: Files or folders, one or more.
        output: Where the result goes: a folder, or a file for schemes without a configuration.
        weights: A number for each adapter, in order, may be negative (missing ones are 1), and
            ``"PATTERN=N"`` for the modules that a pattern means, such as ``[0.8, "te1=0.5"]``; or
            a mapping of patterns to numbers. See ``docs/strength.md``.
        method: ``linear`` (the sum), or one of ``ties``, ``dare``, ``dare-ties``, ``della``,
            ``knots``, which work on the small joint core of the deltas, or ``peft-linear``,
            which adds factor to factor as PEFT does. See ``docs/algebra.md``.
        density: The share of elements that the methods other than the sums keep; 0.5 by default.
        epsilon: The window of drop probabilities of ``della``; 0.1 by default.
        seed: Of the methods that draw at random.
        extras: What to do where adapters bring different saved heads, biases or token rows:
            ``error``, ``first``, ``last`` or ``average`` (the plain mean of those that have it).
        base: The model that they are for, whose headers alone are read: its names settle flattened
            paths, and llama.cpp's files need what it says of itself.
        to: The scheme to write; by default that of the inputs, ``peft`` if they differ.
        rank: As in :func:`truncate`, like all options up to ``rank_multiple``.
        energy: See :func:`truncate`.
        max_error: See :func:`truncate`.
        max_size: See :func:`truncate`.
        sv_ratio: See :func:`truncate`.
        sv_fro: See :func:`truncate`.
        sv_cumulative: See :func:`truncate`.
        rank_multiple: See :func:`truncate`.
        dtype: ``float32``, ``float16`` or ``bfloat16``; by default the widest of the inputs.
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
    adapters, skip, dtype = one_or_more(adapters), one_or_more(skip), dtype_name(dtype)
    place = output_path(output)
    _check_methods(method, density, epsilon)
    density = 0.5 if density is None else density
    epsilon = 0.1 if epsilon is None else epsilon
    _check_options(adapters, method, density, epsilon, extras)
    size = parse_size(max_size) if max_size is not None else None
    truncation = Truncation(
        rank, energy, max_error, size, sv_ratio, sv_fro, sv_cumulative, rank_multiple
    )
    base = located(base) if base is not None else None
    inputs = [located(path) for path in adapters]
    model, told = open_told(base, needs_weights=False) if base is not None else (None, None)
    opened = [
        open_adapter(
            path,
            adapter_name=adapter_name,
            alpha=alpha,
            skip=skip,
            base_modules=model.paths if model is not None else (),
            base=told,
        )
        for path in inputs
    ]
    for adapter in opened:
        check_computable(adapter, verb="add up")
    _check_together(opened)
    opened, strengths, left_out = with_strengths(opened, weights)
    if not any(adapter.sites for adapter in opened):
        raise OptionError("-w", "every weight is 0, so that nothing would be left")
    written_dtype = OUTPUT_DTYPES[dtype] if dtype else None
    joints, notes = join(opened, strengths, dtype=written_dtype)
    if method == "peft-linear":
        joints = tuple(replace(joint, ranks_add_up=False) for joint in joints)
    is_random = method in ("dare", "dare-ties", "della")
    options = {
        "weights": recorded_weights(weights, len(opened)),
        "method": method,
        "density": density if method not in ("linear", "peft-linear") else None,
        "epsilon": epsilon if method == "della" else None,
        "seed": seed if is_random else None,
        "extras": extras,
        "base": called(base) if base is not None else None,
        "to": to,
        **truncation.recorded,
        "dtype": dtype,
        "alpha": alpha,
        "adapter_name": adapter_name,
        "skip": tuple(skip),
        "no_card": no_card or None,
    }
    draft = Combination(
        verb="compose",
        adapters=opened,
        joints=joints,
        scheme=output_scheme(opened, to),
        options=WriteOptions(place, told=told, dtype=written_dtype, keeps_naming=True),
        asked=options,
        method=Method(method, Settings(density, epsilon), seed, mover_to(device)),
        policy=extras,
        notes=(*notes, *left_out, *_unweighted(opened, strengths)),
    )
    return finish(
        draft,
        truncation,
        inputs=inputs,
        force=force,
        dry_run=dry_run,
        threads=threads,
        progress=progress,
    )


def _unweighted(adapters: Sequence[Adapter], strengths: Sequence[Strength]) -> Iterator[str]:
    """Say where a weight does not reach: saved heads and rows, whose base is not at hand."""
    for adapter, strength in zip(adapters, strengths, strict=True):
        for extra in adapter.extras:
            weight = strength.of_extra(extra)
            if weight != 1 and extra.kind is not ExtraKind.STATE:
                yield (
                    f"{adapter.path}: the weight {weight:g} is that of the deltas; what is no "
                    f"delta stays as it is, such as {extra.name!r}"
                )
                break


def _check_methods(method: str, density: float | None, epsilon: float | None) -> None:
    """Refuse settings that the method has no use for."""
    if density is not None and method in ("linear", "peft-linear"):
        raise OptionError("--density", f"means nothing to the method {method}")
    if epsilon is not None and method != "della":
        raise OptionError("--epsilon", f"means nothing to the method {method}")


def _check_options(
    adapters: Sequence[AnyPath],
    method: str,
    density: float,
    epsilon: float,
    extras: str,
) -> None:
    if not adapters:
        raise OptionError("compose", "no adapter was given")
    if method not in METHODS:
        raise OptionError.none_of("--method", method, METHODS)
    if extras not in POLICIES:
        raise OptionError.none_of("--extras", extras, POLICIES)
    if not 0 < density <= 1:
        raise OptionError("--density", f"{density:g} is no share between 0 and 1")
    if method == "della":
        room = 2 * min(density, 1 - density)
        if not 0 <= epsilon <= room:
            raise OptionError(
                "--epsilon",
                f"{epsilon:g} leaves no drop probabilities in [0, 1] around {1 - density:g}",
                hint=f"at most {room:g} for --density {density:g}",
            )


def _check_together(adapters: Sequence[Adapter]) -> None:
    """Refuse adapters that mean different things by the same names.

    Raises:
        UnsupportedError: They act under different conditions.
        AdapterError: They are for differently built models.
    """
    words = {
        "alora_invocation_tokens": "are activated by different tokens (aLoRA)",
        "layer_replication": "are for differently replicated layers",
        "megatron_config": "are for differently sharded models",
    }
    for name, what in words.items():
        values = [adapter.field(name) or None for adapter in adapters]
        if any(value != values[0] for value in values):
            paths = " and ".join(str(adapter.path) for adapter in adapters)
            raise UnsupportedError(name, f"{paths} {what}; their sum is no adapter")
    square = [
        (adapter, site)
        for adapter in adapters
        for site in adapter.sites
        if site.parameters and site.in_features == site.out_features
    ]
    versions = {_is_old(adapter) for adapter, _ in square}
    if len(versions) > 1:
        adapter, site = square[0]
        raise AdapterError(
            f"{adapter.path}: {site.label}",
            "is square, and PEFT before 0.19 stored such experts transposed; the adapters are "
            "from both sides of that change",
            hint="save the older one again with a current PEFT",
        )


def _is_old(adapter: Adapter) -> bool:
    version = str(adapter.field("peft_version") or "0.17.0")
    numbers = [int(part) for part in version.split(".")[:2] if part.isdigit()]
    return numbers < [0, 19]
