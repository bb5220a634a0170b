"""Whether ``adapter_config.json`` and the tensors agree."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from loratool.adapter.config import KNOWN_FIELDS, LoraConfig
from loratool.adapter.fields import wrong_fields
from loratool.adapter.findings import Finding, finding
from loratool.adapter.model import Adapter, ExtraKind, Site
from loratool.adapter.patterns import matches_target, pattern_values, suffixes
from loratool.adapter.problems import check_adapter
from loratool.adapter.saved import absent_heads, absent_modules, is_listed
from loratool.errors import LoratoolError
from loratool.names.tied import HEAD_LEAVES
from loratool.schemes import scheme_named
from loratool.schemes.companions import companions

__all__ = ["check_config"]

TASK_TYPES: Final = frozenset(
    ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
)


def check_config(adapter: Adapter) -> Iterator[Finding]:
    """Yield findings on fields, patterns, targets and saved modules."""
    config = adapter.config
    if config is None:
        return
    where = adapter.folder / "adapter_config.json"
    yield from _fields(config, adapter, where)
    for name in () if config.peft_type == "ADALORA" else ("rank_pattern", "alpha_pattern"):
        yield from _patterns(name, getattr(config, name), adapter.sites, where)
    if scheme_named(adapter.scheme).settings.names_targets:
        yield from _targets(config, adapter, where)
        yield from _saved(config, adapter, where)
    yield from _tokens(adapter, where)
    if not any(True for _ in _broken(adapter)):
        try:
            check_adapter(adapter)
        except LoratoolError as error:
            yield finding("LT023", error.where, error.what, error.hint)


def _broken(adapter: Adapter) -> Iterator[str]:
    from loratool.adapter.problems import site_problems

    for site in adapter.sites:
        yield from (code for code, _ in site_problems(site, adapter))


def _fields(config: LoraConfig, adapter: Adapter, where: object) -> Iterator[Finding]:
    for _, problem in wrong_fields(config.raw):
        yield finding("LT015", where, problem)
    variants = {site.variant for site in adapter.sites}
    known = KNOWN_FIELDS.union(*(variant.fields for variant in variants))
    for name, value in config.raw.items():
        if name not in known and value not in (None, False, 0, "", [], {}):
            yield finding(
                "LT014", where, f"the field {name!r} is not known, and is set to {value!r:.60}"
            )
    is_scaled = any(variant.is_scaled for variant in variants)
    for name in ("r", "lora_alpha", "peft_type") if is_scaled else ("peft_type",):
        if config.raw.get(name) is None:
            yield finding("LT031", where, f"{name!r} is not said; PEFT's default applies")
    task = config.raw.get("task_type")
    if isinstance(task, str) and task not in TASK_TYPES:
        yield finding("LT014", where, f"task_type is {task!r}, which PEFT does not know")


def _names_of(site: Site) -> tuple[str, ...]:
    return site.parameters or (site.pattern_path,)


def _patterns(
    field: str, patterns: dict[str, Any] | Any, sites: tuple[Site, ...], where: object
) -> Iterator[Finding]:
    names = [name for site in sites for name in _names_of(site)]
    found = {name: pattern_values(patterns, name) for name in names}
    used = {key for hits in found.values() for key, _ in hits}
    for key in patterns:
        if key not in used:
            yield finding("LT010", where, f"{field}: {key!r} matches no module")
    for name in names:
        hits = found[name]
        if len({str(value) for _, value in hits}) > 1:
            listed = ", ".join(f"{key!r}: {value}" for key, value in hits)
            yield finding(
                "LT011",
                where,
                f"{field}: several entries mean {name!r} ({listed}); the first one counts",
                "the order changes when the file is saved again; make the keys exclusive",
            )


def _targets(config: LoraConfig, adapter: Adapter, where: object) -> Iterator[Finding]:
    modules = [site.module for site in adapter.sites if not site.parameters]
    targets = config.target_modules
    if targets is None:
        return
    if isinstance(targets, tuple):
        rows = [extra.name for extra in adapter.extras if extra.kind is ExtraKind.ROWS]
        known = {suffix for module in (*modules, *rows) for suffix in suffixes(module)}
        for target in targets:
            if target not in known:
                yield finding(
                    "LT012", where, f"the target {target!r} matches no module in the file"
                )
    for module in modules:
        parent, _, leaf = module.rpartition(".")
        if leaf in HEAD_LEAVES and config.flag("ensure_weight_tying"):
            continue  # the tied twin of an embedding that is a target
        if not matches_target(targets, module) and not matches_target(targets, parent):
            yield finding(
                "LT013",
                module,
                "is not among target_modules; PEFT would drop it without a word",
                "add it to target_modules",
            )


def _saved(config: LoraConfig, adapter: Adapter, where: object) -> Iterator[Finding]:
    full = [extra.name for extra in adapter.extras if extra.kind is ExtraKind.FULL]
    for name in absent_modules(adapter):
        yield finding(
            "LT016", where, f"modules_to_save lists {name!r}, but the file has no such tensor"
        )
    if config.modules_to_save:
        beside = [key for each in companions(adapter) for key in each.tensors]
        for name in absent_heads(adapter, beside):
            yield finding(
                "LT034",
                where,
                f"modules_to_save lists {name!r}, and no file holds it: the trained head is lost",
                "save the adapter again where it was trained; a loader would start it at random",
            )
    bias = config.raw.get("bias") or "none"
    for found in full:
        module = found.rpartition(".")[0]
        if not is_listed(adapter, module) and not (found.endswith(".bias") and bias != "none"):
            yield finding(
                "LT030", found, "is stored whole, though modules_to_save does not list it"
            )


def _tokens(adapter: Adapter, where: object) -> Iterator[Finding]:
    rows = [extra for extra in adapter.extras if extra.kind is ExtraKind.ROWS]
    indices = adapter.field("trainable_token_indices")
    if indices and not rows:
        yield finding("LT028", where, "trainable_token_indices is set, but no rows are stored")
    for extra in rows:
        count = extra.tensor.spec.shape[0] if extra.tensor.spec.shape else 0
        listed = indices
        if isinstance(indices, dict):
            listed = next((v for k, v in indices.items() if matches_target((k,), extra.name)), None)
        if not isinstance(listed, list) or len(listed) != count:
            expected = len(listed) if isinstance(listed, list) else "no"
            yield finding(
                "LT028", extra.key, f"holds {count} rows, but the configuration names {expected}"
            )
