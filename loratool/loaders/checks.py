"""What a loader would refuse or misread of an adapter as it is."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Final

from loratool.adapter.build import strip_wrappers
from loratool.adapter.findings import Finding, finding
from loratool.adapter.model import Adapter, Site
from loratool.loaders.features import features_of
from loratool.loaders.loader import Fate, Loader, Mend, Rule
from loratool.schemes import scheme_named

__all__ = ["MISREADS", "NOTES", "REFUSES", "check_for", "listed", "mending", "warning"]

REFUSES, SCALES, MISREADS, NOTES = "LT201", "LT202", "LT203", "LT204"
CODE_OF: Final = {Fate.REFUSED: REFUSES, Fate.MISREAD: MISREADS, Fate.NOTED: NOTES}
SHOWN: Final = 5


def check_for(adapter: Adapter, loader: Loader) -> Iterator[Finding]:
    """Yield what the loader would refuse (LT201) or misread (LT202, LT203), and notes (LT204).

    Only headers are read, and alphas. An adapter in a scheme that the loader does not know gets
    one finding for that, and those that conversion cannot mend.
    """
    is_read = adapter.scheme in loader.reads or adapter.scheme in loader.tolerates
    if not is_read:
        yield finding(
            REFUSES,
            adapter.weights,
            f"is in the scheme {adapter.scheme!r}; {loader.title} reads "
            f"{', '.join(sorted(loader.reads))}",
            mending(Mend.CONVERT, loader),
        )
    if adapter.scheme in loader.tolerates:
        words = loader.tolerates[adapter.scheme]
        yield warning(MISREADS, adapter.weights, f"has {words}", mending(Mend.CONVERT, loader))
    yield from _features(adapter, loader, is_read=is_read)
    yield from _ranks(adapter, loader, is_read=is_read)
    if not is_read:
        return
    if adapter.scheme not in loader.direct:
        yield from _files(adapter, loader)
    yield from _names(adapter, loader)
    yield from _scales(adapter, loader)
    for check in loader.checks:
        yield from check(adapter, loader)


def mending(mend: Mend, loader: Loader) -> str:
    """Return the next step, as a hint."""
    command = f"loratool convert ADAPTER --for {loader.name}"
    match mend:
        case Mend.CONVERT:
            return f"{command} -o OUT"
        case Mend.TO_LORA:
            return f"{command} --to-lora -o OUT"
        case Mend.APPROXIMATE:
            return (
                "merge it into the base: loratool merge BASE ADAPTER -o OUT; or come near it: "
                f"{command} --to-lora --base BASE --rank R -o OUT"
            )
    return (
        "merge it into the base: loratool merge BASE ADAPTER -o OUT; or leave it out: "
        f"{command} --drop PATTERN -o OUT"
    )


def listed(names: Sequence[str]) -> str:
    """Return the first of ``names`` and how many there are."""
    return names[0] if len(names) == 1 else f"{names[0]}…, {len(names)} in all"


def _modules(count: int) -> str:
    return "1 module" if count == 1 else f"{count} modules"


def warning(code: str, where: object, message: str, hint: str | None = None) -> Finding:
    """Return a finding of this code, as a warning."""
    made = finding(code, where, message, hint)
    return Finding(made.code, "warning", made.where, made.message, made.hint)


def _by(rule: Rule, where: object, message: str, loader: Loader) -> Finding:
    hint = None if rule.fate is Fate.NOTED else mending(rule.mend, loader)
    return finding(CODE_OF[rule.fate], where, message, hint)


def _features(adapter: Adapter, loader: Loader, *, is_read: bool) -> Iterator[Finding]:
    for feature, found in features_of(adapter).items():
        rule = loader.rules.get(feature)
        if rule is None or (not is_read and rule.mend is Mend.CONVERT):
            continue
        if not is_read and not found.names:
            continue  # fields of a configuration that is not its own
        where = f"in {listed(found.names)}" if found.names else f"by {', '.join(found.fields)}"
        yield _by(rule, adapter.weights, f"has {feature.value}, {where}: {rule.words}", loader)


def _ranks(adapter: Adapter, loader: Loader, *, is_read: bool) -> Iterator[Finding]:
    ranks = Counter(site.rank for site in adapter.sites if site.is_plain and site.rank)
    if not ranks:
        return
    highest, largest = max(ranks), loader.largest_rank
    if largest is not None and highest > largest:
        count = sum(count for rank, count in ranks.items() if rank > largest)
        yield finding(
            REFUSES,
            adapter.weights,
            f"has rank {highest} ({_modules(count)} above {largest}); {loader.title} accepts at "
            f"most {largest}",
            f"shrink it first: loratool truncate ADAPTER --rank {largest} -o OUT",
        )
    elif loader.default_rank is not None and highest > loader.default_rank:
        needed = loader.next_rank(highest)
        yield finding(
            NOTES,
            adapter.weights,
            f"has rank {highest}: start {loader.title} with {loader.rank_option} {needed}, its "
            f"default is {loader.default_rank}",
        )
    if is_read and len(ranks) > 1 and loader.mixed_ranks is not None:
        parts = ", ".join(f"{rank} ({_modules(count)})" for rank, count in sorted(ranks.items()))
        yield _by(
            loader.mixed_ranks,
            adapter.weights,
            f"has modules of the ranks {parts}: {loader.mixed_ranks.words}",
            loader,
        )


def _files(adapter: Adapter, loader: Loader) -> Iterator[Finding]:
    hint = mending(Mend.CONVERT, loader)
    if loader.file_names and adapter.weights.name not in loader.file_names:
        names = " or ".join(loader.file_names)
        yield finding(
            REFUSES,
            adapter.weights,
            f"{loader.title} looks for {names}, and for no other name",
            hint,
        )
    config = adapter.config
    if config is None:
        if loader.required:
            yield finding(
                REFUSES,
                adapter.folder,
                f"there is no adapter_config.json, which {loader.title} needs",
                f"{hint} --alpha ALPHA",
            )
        return
    missing = [name for name in loader.required if name not in config.raw]
    if missing:
        yield finding(
            REFUSES,
            adapter.folder / "adapter_config.json",
            f"does not say {', '.join(missing)}, which {loader.title} needs",
            hint,
        )
    is_regex = isinstance(config.target_modules, str)
    if is_regex and loader.regex_targets is not None:
        words = ("all", "all-linear")
        if config.target_modules not in words:
            yield _by(
                loader.regex_targets,
                adapter.folder / "adapter_config.json",
                f"target_modules is a regular expression: {loader.regex_targets.words}",
                loader,
            )


def _names(adapter: Adapter, loader: Loader) -> Iterator[Finding]:
    if loader.named is not None and adapter.name is not None:
        yield _by(
            loader.named,
            adapter.weights,
            f"has keys with the adapter's name {adapter.name!r}: {loader.named.words}",
            loader,
        )
    if loader.wrapped is not None:
        scheme = scheme_named(adapter.scheme)
        parsed = {key.module for key in map(scheme.keys.parse, adapter.tensors) if key is not None}
        bare = {name: name.replace("base_model.model.", "") for name in parsed}
        wrapped = sorted(name for name, rest in bare.items() if strip_wrappers(rest) != rest)
        if wrapped:
            yield _by(
                loader.wrapped,
                adapter.weights,
                f"has keys with the prefix of a wrapper ({listed(wrapped)}): "
                f"{loader.wrapped.words}",
                loader,
            )
    for leaf, fusion in loader.fusions.items():
        fused = [site.module for site in adapter.sites if _is_fused(site, leaf)]
        if fused:
            yield finding(
                NOTES,
                adapter.weights,
                f"has {leaf} in one ({listed(fused)}), not as {', '.join(fusion.parts)}: "
                f"{loader.fused}",
                f"where the base has them apart: {mending(Mend.CONVERT, loader)} --base BASE",
            )


def _is_fused(site: Site, leaf: str) -> bool:
    return site.module.rpartition(".")[2] == leaf and not site.parameters


def _scales(adapter: Adapter, loader: Loader) -> Iterator[Finding]:
    """Yield one finding for each wrong factor, with the modules that get it."""
    factor_of = loader.scale.of(adapter)
    wrong: dict[tuple[float, float], list[str]] = defaultdict(list)
    for site in adapter.sites:
        if not site.is_plain or site.variant.is_compact or not site.rank:
            continue
        applied, own = factor_of(site), site.scaling.factor
        if applied is not None and not math.isclose(applied, own, rel_tol=1e-9, abs_tol=1e-30):
            wrong[applied, own].append(site.label)
    groups = sorted(wrong.items(), key=lambda item: -len(item[1]))
    for (applied, own), names in groups[:SHOWN]:
        yield finding(
            SCALES,
            adapter.weights,
            f"{loader.title} would apply {applied:g} instead of {own:g} to {names[0]}"
            f"{'…' if len(names) > 1 else ''} ({_modules(len(names))}): it takes "
            f"{loader.scale.words}",
            mending(Mend.CONVERT, loader),
        )
    if rest := groups[SHOWN:]:
        count = sum(len(names) for _, names in rest)
        yield finding(
            SCALES,
            adapter.weights,
            f"{loader.title} would apply {len(rest)} more wrong scales to {_modules(count)}",
            mending(Mend.CONVERT, loader),
        )
