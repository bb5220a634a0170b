"""PEFT's ``adapter_config.json`` for modules that are written."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from loratool.adapter.config import KNOWN_FIELDS
from loratool.adapter.part import Part
from loratool.adapter.patterns import matches_target
from loratool.adapter.slots import Slot
from loratool.names.experts import is_fusible_expert

__all__ = ["exact_number", "lora_config", "needs_default", "scale_fields", "target_fields"]

FIRST_RELEASE_FIELDS: Final = ("enable_lora", "merge_weights")
"""Fields of PEFT's first releases, which later ones warn about."""

VARIANT_FIELDS: Final[dict[str, Any]] = {
    "use_dora": False,
    "use_rslora": False,
    "use_bdlora": None,
    "use_qalora": False,
    "kasa_config": None,
    "velora_config": None,
    "monteclora_config": None,
    "eva_config": None,
    "corda_config": None,
    "lora_ga_config": None,
    "loftq_config": {},
}
"""Fields that would make something else of plain factors, and what they are for those."""

ADALORA_FIELDS: Final = (
    "beta1",
    "beta2",
    "deltaT",
    "init_r",
    "orth_reg_weight",
    "target_r",
    "tfinal",
    "tinit",
    "total_step",
)


def lora_config(
    old: Mapping[str, Any],
    parts: Sequence[Part],
    *,
    keep_targets: bool,
    changes: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return a configuration for plain LoRA factors, written as PEFT writes it.

    The commonest rank and its alpha become ``r`` and ``lora_alpha``; all other modules get
    anchored patterns, which mean exactly one module each (peft 0.15 and later).

    Args:
        old: The configuration to start from; may be empty.
        parts: What is written.
        keep_targets: Keep the fields that choose modules, where they mean these modules.
        changes: Further fields to set.
    """
    config = dict(old)
    for name in (*FIRST_RELEASE_FIELDS, *ADALORA_FIELDS):
        config.pop(name, None)
    for name in [name for name in config if name not in KNOWN_FIELDS and not config[name]]:
        del config[name]
    config |= {
        "peft_type": "LORA",
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_bias": any(Slot.UP_BIAS in part.values for part in parts),
    }
    config |= {name: value for name, value in VARIANT_FIELDS.items() if name in config}
    config.setdefault("bias", "none")
    config.setdefault("base_model_name_or_path", None)
    config.setdefault("task_type", None)
    config |= scale_fields(parts)
    fields = target_fields(parts)
    if not (keep_targets and _covers(old, fields["target_modules"])):
        config |= {
            name: value
            for name, value in fields.items()
            if value is not None or config.get(name) is not None
        }
    return dict(sorted({**config, **(changes or {})}.items()))


def target_fields(parts: Sequence[Part]) -> dict[str, Any]:
    """Return the fields that make ``parts``, and nothing else, the targets."""
    modules = [part for part in parts if part.parameter is None and part.is_target]
    return {
        "target_modules": list(dict.fromkeys(part.pattern_path for part in modules)),
        "target_parameters": [part.parameter for part in parts if part.parameter is not None]
        or None,
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }


def _covers(config: Mapping[str, Any], modules: Iterable[str]) -> bool:
    """Whether the targets of a configuration include all of ``modules``."""
    targets = config.get("target_modules")
    if not isinstance(targets, str | list):
        return not list(modules)
    return all(matches_target(targets, module) for module in modules)


def scale_fields(parts: Sequence[Part]) -> dict[str, Any]:
    """Return rank, alpha and the patterns that say exactly what ``parts`` have."""
    # PEFT warns about patterns that mean raw parameters, and loses those of experts that it
    # fuses on loading: both get the numbers without one.
    plain = [part for part in parts if needs_default(part)] or parts
    counts = Counter((part.rank, part.written_alpha) for part in plain)
    (rank, alpha), _ = counts.most_common(1)[0] if counts else ((1, 1.0), 0)
    patterns = sorted({part.pattern_path: part for part in parts}.items())
    return {
        "r": rank,
        "lora_alpha": exact_number(alpha),
        "rank_pattern": {
            _anchored(path): part.rank for path, part in patterns if part.rank != rank
        },
        "alpha_pattern": {
            _anchored(path): exact_number(part.written_alpha)
            for path, part in patterns
            if part.written_alpha != alpha
        },
    }


def needs_default(part: Part) -> bool:
    """Whether a rank has to be the configuration's own: PEFT has no patterns for it."""
    return part.parameter is not None or is_fusible_expert(part.module)


def _anchored(path: str) -> str:
    return "^" + re.escape(path)


def exact_number(value: float) -> int | float:
    """Return a whole number as an ``int``, as people write them."""
    return int(value) if float(value).is_integer() else value
