"""PEFT's ``adapter_config.json`` for modules that are written."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from loratool.adapter.config import CONFIG_NAME, KNOWN_FIELDS
from loratool.adapter.findings import Finding, finding
from loratool.adapter.model import Adapter, Kind
from loratool.adapter.part import Part
from loratool.adapter.patterns import matches_target
from loratool.adapter.scheme import Written
from loratool.adapter.slots import Slot
from loratool.names.conv1d import CONV1D_LEAVES
from loratool.names.experts import is_fusible_expert
from loratool.names.pipelines import component_of
from loratool.schemes.parts.settings import Settings

__all__ = [
    "PeftSettings",
    "exact_number",
    "lora_config",
    "needs_default",
    "scale_fields",
    "target_fields",
]

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


@dataclass(frozen=True)
class PeftSettings(Settings):
    """PEFT's ``adapter_config.json``.

    Attributes:
        is_own: Whether PEFT itself reads what lies beside it; else a script does.
    """

    file: str = CONFIG_NAME
    names_targets: bool = True
    names_saved: bool = True
    is_own: bool = False

    def config(self, written: Written) -> dict[str, Any] | None:
        """Return the configuration, as far as it can be what it was before."""
        raw = dict(written.config or {})
        changes = dict(written.changes)
        parts = written.parts
        if raw.get("fan_in_fan_out") or _looks_like_conv1d(parts):
            changes.setdefault("fan_in_fan_out", True)
        is_dora = any(Slot.MAGNITUDE in part.values for part in parts)
        changes |= {"use_dora": is_dora, "use_rslora": False}
        model = (written.sidecar or {}).get("model")
        if isinstance(model, str) and not raw.get("base_model_name_or_path"):
            changes.setdefault("base_model_name_or_path", model)
        keeps_targets = written.keeps_targets and written.source == written.scheme
        return lora_config(raw, parts, keep_targets=keeps_targets, changes=changes)

    def notes(self, written: Written) -> Iterator[str]:
        """Yield that PEFT loads what holds several models on one that has them all."""
        components = {component_of(item.part.module)[0] for item in written.modules}
        if self.is_own and len(components) > 1:
            listed = ", ".join(sorted(c or "no component" for c in components))
            yield (
                f"holds modules of {listed}; PEFT loads it on a module that has all of them, or "
                "one of them alone with --component"
            )

    def findings(self, adapter: Adapter) -> Iterator[Finding]:
        """Yield that there is none."""
        if adapter.config is None:
            # A merge takes what the tensors say, so that it is no error of the file.
            missing = finding(
                "LT015",
                adapter.folder,
                "there is no adapter_config.json, which PEFT needs",
                "write one with peft_type, r, lora_alpha and target_modules",
            )
            yield replace(missing, severity="warning")


def _looks_like_conv1d(parts: Sequence[Part]) -> bool:
    """Whether all linear modules are of GPT-2's kind: by their names, and a q, k, v in one."""
    linear = [part for part in parts if part.kind is Kind.LINEAR and part.is_plain]
    leaves = {part.module.rpartition(".")[2] for part in linear}
    return leaves <= CONV1D_LEAVES and any(
        part.module.endswith("c_attn") and part.up.shape[0] == 3 * part.down.shape[1]
        for part in linear
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
