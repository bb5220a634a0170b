"""Adapters and bases that must not be merged, refused by name with what to do instead."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Final

from loratool.adapter.build import is_scaled_by_name
from loratool.adapter.expected import shape_problems
from loratool.adapter.leaving import leave_out, option, pattern_for
from loratool.adapter.model import UNTOLD, Adapter, Kind, Site
from loratool.adapter.slots import Slot
from loratool.adapter.variant import NO_GEOMETRY, Variant
from loratool.errors import AdapterError, UnsupportedError
from loratool.files.dtypes import DTYPES

__all__ = [
    "CONVERT_HINT",
    "check_adapter",
    "check_change",
    "check_plain",
    "check_sound",
    "check_unmixed",
    "is_matrix",
    "is_whole",
    "plain_hint",
    "plain_options",
    "site_problems",
]

CONVERT_HINT: Final = (
    "convert it with the adapter as it was initialised: loratool convert ADAPTER --initial "
    "FOLDER --to peft -o OUT; or merge on the residual base with init_lora_weights set to true"
)


def check_adapter(adapter: Adapter) -> None:
    """Refuse what has no right merge.

    Raises:
        UnsupportedError: A conditional or routed adapter, or one whose base is not determined.
        AdapterError: The adapter is broken or contradicts its configuration.
    """
    check_unmixed(adapter)
    config = adapter.config
    if adapter.is_conditional:
        raise UnsupportedError(
            adapter.path,
            "an activated LoRA (aLoRA): it acts only after its invocation tokens, which no "
            "merged weight can do",
            hint="serve it as an adapter",
            code="LT023",
        )
    if config is not None:
        if config.flag("arrow_config"):
            raise UnsupportedError(
                adapter.path,
                "an Arrow router: it mixes adapters by input; no weights equal it",
                code="LT023",
            )
        init = config.init
        if init.words:
            raise UnsupportedError(
                adapter.path,
                f"init_lora_weights is {init.name!r}{init.words}",
                hint=CONVERT_HINT,
                code="LT023",
            )
    if not adapter.sites and not adapter.extras:
        raise AdapterError(adapter.path, "holds nothing to merge")
    for site in adapter.sites:
        check_change(site, adapter)
        check_sound(site, adapter)


def check_sound(site: Site, adapter: Adapter) -> None:
    """Refuse a site that ``validate`` finds an error in.

    Raises:
        AdapterError: It is broken, or contradicts the configuration; the code is the finding's.
    """
    for code, problem in site_problems(site, adapter):
        hint = site.variant.mending if code == "LT001" else None
        raise AdapterError(
            f"{adapter.path}: {site.label}", f"{problem} ({code})", hint=hint, code=code
        )


def check_unmixed(adapter: Adapter) -> None:
    """Refuse a file that holds factors in two schemes: half of them would not be used.

    Raises:
        AdapterError: It is one.
    """
    if adapter.mixed:
        raise AdapterError(
            adapter.path,
            f"mixes schemes: it was read as {adapter.scheme!r}, and {len(adapter.mixed)} of its "
            f"keys are factors in another, such as {adapter.mixed[0]!r}",
            hint="leave out one part with --skip",
            code="LT032",
        )


def check_change(site: Site, adapter: Adapter) -> None:
    """Refuse a site whose variant does not say what becomes of a weight.

    Raises:
        UnsupportedError: It has to be converted first.
    """
    _check_name(site, adapter)
    variant = site.variant
    where = f"{adapter.path}: {site.label}"
    if not (variant.has_factors or variant.has_change or is_whole(site)):
        raise UnsupportedError(where, f"is {variant.words}", hint=leave_out(site))
    magnitude = site.slots.get(Slot.MAGNITUDE)
    if magnitude is not None and not variant.has_factors:
        key = magnitude.spec.name
        raise UnsupportedError(
            where,
            f"is {variant.words}, with magnitudes of its own beside it ({key!r}), which nothing "
            "says how to apply",
            hint=leave_out(site, key),
        )


def is_whole(site: Site) -> bool:
    """Whether it is made of whole parameters."""
    return bool(site.variant.parameters) or site.slots.keys() <= {Slot.BIAS}


def _check_name(site: Site, adapter: Adapter) -> None:
    """Refuse a site whose module is not known.

    Raises:
        UnsupportedError: Its names have to be restored first.
    """
    if site.module in adapter.unresolved:
        raise UnsupportedError(
            f"{adapter.path}: {site.label}",
            adapter.unknown or "is a flattened name, and nothing tells which module it is",
            hint="restore the names first: loratool convert ADAPTER --to peft --base BASE -o OUT",
            code="LT033",
        )


def plain_options(variant: Variant, slots: Collection[Slot]) -> str:
    """Return the options of ``convert`` that make a plain LoRA of a module.

    Args:
        variant: Its variant, which changes a matrix.
        slots: The roles of its tensors.
    """
    is_near = not variant.has_factors or Slot.MAGNITUDE in slots
    needs_base = variant.needs_base or variant.needs_shape or Slot.MAGNITUDE in slots
    return "--to-lora" + " --base BASE" * needs_base + " --rank R" * is_near


def check_plain(site: Site, adapter: Adapter, *, is_named: bool = True) -> None:
    """Refuse a site that is not made of A and B, or whose module is not known.

    Args:
        site: The site.
        adapter: Its adapter.
        is_named: Whether its path has to be known.

    Raises:
        UnsupportedError: It has to be converted first.
    """
    where = f"{adapter.path}: {site.label}"
    if is_named:
        _check_name(site, adapter)
    if not site.is_plain:
        raise UnsupportedError(where, f"is {site.variant.words}", hint=plain_hint(site, adapter))
    if Slot.BIAS in site.slots:
        raise UnsupportedError(
            where,
            "has a bias of its own beside A and B (diff_b)",
            hint="convert it first: loratool convert ADAPTER --to peft -o OUT"
            if all(each.is_plain and not each.variant.undetermined for each in adapter.sites)
            else plain_hint(site, adapter),
        )


def plain_hint(site: Site, adapter: Adapter) -> str:
    """Return the hint to make plain LoRAs of all modules, leaving out what cannot be one."""
    for variant in (site.variant, *(other.variant for other in adapter.sites)):
        if variant.undetermined and not (variant.has_change or variant.needs_shape):
            return variant.remedy
    options = sorted({plain_options(s.variant, s.slots) for s in adapter.sites if is_matrix(s)})
    if not options:
        return leave_out(site)
    most = max(options, key=len)
    others = [s.label for s in adapter.sites if not is_matrix(s)]
    if others:
        labels = [s.label for s in adapter.sites]
        most += f" {option('--drop', pattern_for(others, labels))}"
    return f"make it a plain LoRA first: loratool convert ADAPTER {most} --to peft -o OUT"


def is_matrix(site: Site) -> bool:
    """Whether it changes a matrix, which A and B can come near at least."""
    shape = site.variant.difference_shape(site)
    return site.variant.has_matrix and (not shape or len(shape) > 1)


def site_problems(site: Site, adapter: Adapter) -> Iterator[tuple[str, str]]:
    """Yield ``(code, problem)`` for everything that makes ``site`` unusable."""
    config = adapter.config
    down, up = site.down, site.up
    for spec in site.settings.get(UNTOLD, ()):
        without = option("--skip", re.escape(f".{spec.name.rpartition('.')[2]}") + "$")
        yield (
            "LT008",
            f"has {spec.name!r}, of shape {list(spec.shape)}, beside its factors: it may change "
            "the delta, and nothing says how; fold it into them, or leave it out if it does not "
            f"({without} of merge or convert)",
        )
    if not site.is_plain and Slot.MID not in site.slots:
        misshapen = list(shape_problems(site))
        if misshapen:
            yield from misshapen
        elif site.geometry == NO_GEOMETRY:
            yield "LT001", f"is {site.variant.words}, but lacks some of its tensors"
        else:
            yield from site.variant.problems(site)
        return
    if down is None or up is None:
        have, lack = ("A", "B") if up is None else ("B", "A")
        if down is None and up is None:
            have, lack = "a further tensor", "A and B"
        yield "LT001", f"has {have} but no {lack}"
        return
    if min(len(down.spec.shape), len(up.spec.shape)) < 2:
        yield (
            "LT002",
            f"has factors of shapes {list(down.spec.shape)} and {list(up.spec.shape)}, expected "
            "two dimensions or more (a sharded training run may have saved empty parts)",
        )
        return
    if 0 in (*down.spec.shape, *up.spec.shape):
        yield "LT002", f"has an empty factor: {list(down.spec.shape)} and {list(up.spec.shape)}"
        return
    if site.variant.is_blocked and down.spec.shape[0] % up.spec.shape[1] == 0:
        pass  # B holds the blocks of its diagonal beside each other
    elif site.enabled:
        pass  # A stacks the factors of several parts
    elif down.spec.shape[0] != up.spec.shape[1]:
        if not _is_grouped(site):
            words = (
                "; they look transposed (convert --from transposed)"
                if down.spec.shape[1] == up.spec.shape[0]
                else ""
            )
            if down.spec.shape[0] % max(1, up.spec.shape[1]) == 0:
                parts = down.spec.shape[0] // max(1, up.spec.shape[1])
                flags = "1,0,1" if parts == 2 else ",".join("1" * min(parts, 9))
                words = (
                    f"; they look stacked for {parts} parts of a merged projection (enable_lora in "
                    f"adapter_config.json, or convert --enable-lora such as {flags})"
                )
            yield (
                "LT003",
                f"has A of shape {list(down.spec.shape)} and B of shape {list(up.spec.shape)}: "
                f"their ranks differ{words}",
            )
            return
        yield "LT003", "adapts a grouped convolution, whose delta PEFT's factors do not express"
    if {Slot.DOWN, Slot.UP} & site.slots.keys() and site.kind is Kind.EMBEDDING:
        yield "LT008", "has factors of a linear layer and of an embedding at the same time"
    if any(size != 1 for size in up.spec.shape[2:]):
        yield "LT003", f"has B of shape {list(up.spec.shape)}; its kernel has to be 1"
    bias = site.slots.get(Slot.UP_BIAS)
    if bias is not None and bias.spec.shape != up.spec.shape[:1]:
        shape = list(bias.spec.shape)
        yield "LT003", f"has a bias of shape {shape} beside B of shape {list(up.spec.shape)}"
    for slot in (Slot.DOWN, Slot.UP, Slot.EMBEDDING_DOWN, Slot.EMBEDDING_UP):
        stored = site.slots.get(slot)
        if stored is not None and not DTYPES[stored.spec.dtype].is_factor:
            yield "LT004", f"has a factor of dtype {stored.spec.dtype}, expected a float"
    yield from site.variant.problems(site)
    if config is not None:
        yield from _config_problems(site, adapter)


def _config_problems(site: Site, adapter: Adapter) -> Iterator[tuple[str, str]]:
    config = adapter.config
    assert config is not None
    if site.parameters:
        ranks = {config.rank_for(parameter) for parameter in site.parameters}
        if all(not rank or site.rows % rank for rank in ranks):
            yield (
                "LT005",
                f"stacks {site.rows} rows in A, no multiple of the configured rank "
                f"{sorted(ranks)[0]}",
            )
    elif (
        config.peft_type == "LORA"
        and not site.enabled
        and site.rank != config.rank_for(site.pattern_path)
        and not is_scaled_by_name(site, config)
    ):
        configured = config.rank_for(site.pattern_path)
        yield (
            "LT005",
            f"has rank {site.rank}, but the configuration says {configured}; its scale is then "
            "anybody's guess",
        )
    has_magnitude = Slot.MAGNITUDE in site.slots
    if config.use_dora and not has_magnitude:
        yield "LT006", "has no magnitude vector, although use_dora is set"
    if has_magnitude and not config.use_dora:
        yield "LT006", "has a magnitude vector, although use_dora is not set"
    if Slot.UP_BIAS in site.slots and not config.flag("lora_bias"):
        yield (
            "LT007",
            "has a bias beside B, although lora_bias is not set; PEFT would ignore it",
        )
    if site.kind is Kind.EMBEDDING and config.peft_type == "ADALORA":
        yield "LT008", "AdaLoRA on an embedding is not defined"


def _is_grouped(site: Site) -> bool:
    return (
        site.kind.value == "conv"
        and site.down is not None
        and site.up is not None
        and site.up.spec.shape[1] > 0
        and site.down.spec.shape[0] % site.up.spec.shape[1] == 0
    )
