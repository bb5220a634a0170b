"""What a loader would refuse or misread of an adapter as it is."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, Final

from loratool.adapter.build import strip_wrappers
from loratool.adapter.findings import Finding, finding
from loratool.adapter.model import Adapter, Site
from loratool.ops.targets.features import features_of
from loratool.ops.targets.scales import applied_factor, common_alphas
from loratool.ops.targets.target import Fate, Mend, Rule, ScaleReading, Target
from loratool.schemes import scheme_named

__all__ = ["check_for", "listed", "mending"]

REFUSES, SCALES, MISREADS, NOTES = "LT201", "LT202", "LT203", "LT204"
CODE_OF: Final = {Fate.REFUSED: REFUSES, Fate.MISREAD: MISREADS, Fate.NOTED: NOTES}
SHOWN: Final = 5
BLOCK: Final = re.compile(r"(?:^|\.)(?:layers?|h|blocks?)\.(\d+)\.(?P<local>.+)$", re.DOTALL)
NAMELESS: Final = re.compile(
    r"transformer\.(final_layer|img_in|txt_in|time_in|vector_in|guidance_in)(\..+)?", re.DOTALL
)
"""Modules of Flux that diffusers converts to keys without prefix, and then drops."""


def check_for(adapter: Adapter, target: Target) -> Iterator[Finding]:
    """Yield what the loader would refuse (LT201) or misread (LT202, LT203), and notes (LT204).

    Only headers are read, and alphas. An adapter in a scheme that the loader does not know gets
    one finding for that, and those that conversion cannot mend.
    """
    is_read = adapter.scheme in target.reads or adapter.scheme in target.tolerates
    if not is_read:
        yield finding(
            REFUSES,
            adapter.weights,
            f"is in the scheme {adapter.scheme!r}; {target.title} reads "
            f"{', '.join(sorted(target.reads))}",
            mending(Mend.CONVERT, target),
        )
    if adapter.scheme in target.tolerates:
        words = target.tolerates[adapter.scheme]
        yield _warning(MISREADS, adapter.weights, f"has {words}", mending(Mend.CONVERT, target))
    yield from _features(adapter, target, is_read=is_read)
    yield from _ranks(adapter, target, is_read=is_read)
    if not is_read:
        return
    yield from _files(adapter, target)
    yield from _names(adapter, target)
    yield from _scales(adapter, target)
    if target.scale is ScaleReading.MULTIPLIER:
        yield from _blocks(adapter, target)
    if target.scale is ScaleReading.DIFFUSERS:
        yield from _pipelines(adapter, target)


def mending(mend: Mend, target: Target) -> str:
    """Return the next step, as a hint."""
    command = f"loratool convert ADAPTER --for {target.name}"
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


def _warning(code: str, where: object, message: str, hint: str | None = None) -> Finding:
    made = finding(code, where, message, hint)
    return Finding(made.code, "warning", made.where, made.message, made.hint)


def _by(rule: Rule, where: object, message: str, target: Target) -> Finding:
    hint = None if rule.fate is Fate.NOTED else mending(rule.mend, target)
    return finding(CODE_OF[rule.fate], where, message, hint)


def _features(adapter: Adapter, target: Target, *, is_read: bool) -> Iterator[Finding]:
    for feature, found in features_of(adapter).items():
        rule = target.rules.get(feature)
        if rule is None or (not is_read and rule.mend is Mend.CONVERT):
            continue
        if not is_read and not found.names:
            continue  # fields of a configuration that is not its own
        where = f"in {listed(found.names)}" if found.names else f"by {', '.join(found.fields)}"
        yield _by(rule, adapter.weights, f"has {feature.value}, {where}: {rule.words}", target)


def _ranks(adapter: Adapter, target: Target, *, is_read: bool) -> Iterator[Finding]:
    ranks = Counter(site.rank for site in adapter.sites if site.is_plain and site.rank)
    if not ranks:
        return
    highest, largest = max(ranks), target.largest_rank
    if largest is not None and highest > largest:
        count = sum(count for rank, count in ranks.items() if rank > largest)
        yield finding(
            REFUSES,
            adapter.weights,
            f"has rank {highest} ({_modules(count)} above {largest}); {target.title} accepts at "
            f"most {largest}",
            f"shrink it first: loratool truncate ADAPTER --rank {largest} -o OUT",
        )
    elif target.default_rank is not None and highest > target.default_rank:
        needed = target.next_rank(highest)
        yield finding(
            NOTES,
            adapter.weights,
            f"has rank {highest}: start {target.title} with {target.rank_option} {needed}, its "
            f"default is {target.default_rank}",
        )
    if is_read and len(ranks) > 1 and target.mixed_ranks is not None:
        parts = ", ".join(f"{rank} ({_modules(count)})" for rank, count in sorted(ranks.items()))
        yield _by(
            target.mixed_ranks,
            adapter.weights,
            f"has modules of the ranks {parts}: {target.mixed_ranks.words}",
            target,
        )


def _files(adapter: Adapter, target: Target) -> Iterator[Finding]:
    hint = mending(Mend.CONVERT, target)
    if target.file_names and adapter.weights.name not in target.file_names:
        names = " or ".join(target.file_names)
        yield finding(
            REFUSES,
            adapter.weights,
            f"{target.title} looks for {names}, and for no other name",
            hint,
        )
    config = adapter.config
    if config is None:
        if target.required:
            yield finding(
                REFUSES,
                adapter.folder,
                f"there is no adapter_config.json, which {target.title} needs",
                f"{hint} --alpha ALPHA",
            )
        return
    missing = [name for name in target.required if name not in config.raw]
    if missing:
        yield finding(
            REFUSES,
            adapter.folder / "adapter_config.json",
            f"does not say {', '.join(missing)}, which {target.title} needs",
            hint,
        )
    is_regex = isinstance(config.target_modules, str)
    if is_regex and target.regex_targets is not None:
        words = ("all", "all-linear")
        if config.target_modules not in words:
            yield _by(
                target.regex_targets,
                adapter.folder / "adapter_config.json",
                f"target_modules is a regular expression: {target.regex_targets.words}",
                target,
            )


def _names(adapter: Adapter, target: Target) -> Iterator[Finding]:
    if target.named is not None and adapter.name is not None:
        yield _by(
            target.named,
            adapter.weights,
            f"has keys with the adapter's name {adapter.name!r}: {target.named.words}",
            target,
        )
    if target.wrapped is not None:
        scheme = scheme_named(adapter.scheme)
        parsed = {key.module for key in map(scheme.parse, adapter.tensors) if key is not None}
        bare = {name: name.replace("base_model.model.", "") for name in parsed}
        wrapped = sorted(name for name, rest in bare.items() if strip_wrappers(rest) != rest)
        if wrapped:
            yield _by(
                target.wrapped,
                adapter.weights,
                f"has keys with the prefix of a wrapper ({listed(wrapped)}): "
                f"{target.wrapped.words}",
                target,
            )
    for leaf, fusion in target.fusions.items():
        fused = [site.module for site in adapter.sites if _is_fused(site, leaf)]
        if fused:
            yield finding(
                NOTES,
                adapter.weights,
                f"has {leaf} in one ({listed(fused)}), not as {', '.join(fusion.parts)}: "
                f"{target.fused}",
                f"where the base has them apart: {mending(Mend.CONVERT, target)} --base BASE",
            )


def _is_fused(site: Site, leaf: str) -> bool:
    return site.module.rpartition(".")[2] == leaf and not site.parameters


def _scales(adapter: Adapter, target: Target) -> Iterator[Finding]:
    """Yield one finding for each wrong factor, with the modules that get it."""
    alphas = common_alphas(adapter) if target.scale is ScaleReading.DIFFUSERS else {}
    wrong: dict[tuple[float, float], list[str]] = defaultdict(list)
    for site in adapter.sites:
        if not site.is_plain or site.variant.is_compact:
            continue
        applied, own = applied_factor(site, adapter, target.scale, alphas), site.scaling.factor
        if applied is not None and not math.isclose(applied, own, rel_tol=1e-9, abs_tol=1e-30):
            wrong[applied, own].append(site.label)
    groups = sorted(wrong.items(), key=lambda item: -len(item[1]))
    for (applied, own), names in groups[:SHOWN]:
        yield finding(
            SCALES,
            adapter.weights,
            f"{target.title} would apply {applied:g} instead of {own:g} to {names[0]}"
            f"{'…' if len(names) > 1 else ''} ({_modules(len(names))}): it takes "
            f"{target.scale.value}",
            mending(Mend.CONVERT, target),
        )
    if rest := groups[SHOWN:]:
        count = sum(len(names) for _, names in rest)
        yield finding(
            SCALES,
            adapter.weights,
            f"{target.title} would apply {len(rest)} more wrong scales to {_modules(count)}",
            mending(Mend.CONVERT, target),
        )


def _blocks(adapter: Adapter, target: Target) -> Iterator[Finding]:
    """Yield what mlx-lm's configuration and the modules' places in the blocks say."""
    where = adapter.folder / "adapter_config.json"
    raw = (adapter.sidecar or {}).get("lora_parameters")
    parameters: dict[str, Any] = raw if isinstance(raw, dict) else {}
    missing = [name for name in ("rank", "scale", "dropout") if name not in parameters]
    if missing:
        yield finding(
            REFUSES, where, f"lora_parameters does not say {', '.join(missing)}", _redo(target)
        )
    rank = parameters.get("rank")
    other = [
        s.label for s in adapter.sites if s.is_plain and isinstance(rank, int) and s.rank != rank
    ]
    if other and len({site.rank for site in adapter.sites}) == 1:
        yield finding(
            REFUSES,
            where,
            f"lora_parameters says rank {rank}, but the factors have {adapter.sites[0].rank}",
            _redo(target),
        )
    matches = {site.module: BLOCK.search(site.module) for site in adapter.sites}
    keys = parameters.get("keys")
    if isinstance(keys, list):
        left = [
            module
            for module, match in matches.items()
            if module not in keys and (match is None or match["local"] not in keys)
        ]
        if left:
            yield finding(
                MISREADS,
                where,
                f"lora_parameters.keys does not name {listed(left)}: mlx-lm makes no layer for it",
                _redo(target),
            )
    outside = [module for module, match in matches.items() if match is None]
    if outside:
        yield finding(
            NOTES,
            adapter.weights,
            f"has modules outside the blocks ({listed(outside)}): only newer releases of mlx-lm "
            "adapt them, by their full path in lora_parameters.keys",
        )
    yield from _uneven(adapter)


def _redo(target: Target) -> str:
    return f"write it anew: {mending(Mend.CONVERT, target)}"


def _uneven(adapter: Adapter) -> Iterator[Finding]:
    blocks: dict[str, set[int]] = defaultdict(set)
    for site in adapter.sites:
        match = BLOCK.search(site.module)
        if match is not None:
            blocks[match["local"]].add(int(match[1]))
    every = set().union(*blocks.values()) if blocks else set()
    partial = sorted(local for local, numbers in blocks.items() if numbers != every)
    if partial:
        yield _warning(
            MISREADS,
            adapter.weights,
            f"adapts {listed(partial)} in some of the {len(every)} blocks only: mlx-lm makes a "
            "layer in every one of them, and a strict loader misses its factors",
        )


def _pipelines(adapter: Adapter, target: Target) -> Iterator[Finding]:
    """Yield what diffusers' converters drop or do not exist for."""
    if adapter.scheme not in ("kohya", "comfy"):
        return
    if adapter.family is not None and adapter.family.startswith("sd3"):
        yield finding(
            REFUSES,
            adapter.weights,
            f"diffusers has no converter from {adapter.scheme} for Stable Diffusion 3",
            mending(Mend.CONVERT, target),
        )
    dropped = [site.module for site in adapter.sites if NAMELESS.fullmatch(site.module)]
    if dropped:
        yield finding(
            MISREADS,
            adapter.weights,
            f"diffusers converts {listed(dropped)} to keys without prefix, and drops them",
            mending(Mend.CONVERT, target),
        )
