"""``adapter_config.json``: what it says about the delta, tolerant of how real files say it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from loratool.adapter.fields import DECIDING, is_number, wrong_fields
from loratool.adapter.initialisations import Initialisation, initialisation
from loratool.adapter.patterns import pattern_value
from loratool.adapter.scaling import Scaling
from loratool.errors import AdapterError
from loratool.files.checkpoint import ADAPTER_CONFIG as CONFIG_NAME
from loratool.files.json import read_json_object

__all__ = ["CONFIG_NAME", "KNOWN_FIELDS", "LoraConfig", "parse_config", "read_config"]

OWN_ALPHA: Final = ("LOHA", "LOKR")
"""PEFT types whose alpha is called just that."""
TOKENS: Final = "TRAINABLE_TOKENS"
"""The PEFT type of rows of embeddings, which are chosen by a field of another name than LoRA's."""
UNRANKED: Final = ("OFT",)
"""PEFT types whose rank may be 0: then the size of blocks is told instead."""
DEFAULT_RANK: Final = 8
DEFAULT_ALPHA: Final = 8.0
LARGEST_RANK: Final = 1 << 20

KNOWN_FIELDS: Final = frozenset(
    """
    alora_invocation_tokens alpha_pattern arrow_config auto_mapping base_model_name_or_path
    bias corda_config ensure_weight_tying eva_config exclude_modules fan_in_fan_out
    inference_mode init_lora_weights kasa_config layer_replication layers_pattern
    layers_to_transform loftq_config lora_alpha lora_bias lora_dropout lora_ga_config
    megatron_config megatron_core modules_to_save monteclora_config peft_type peft_version
    qalora_group_size r rank_pattern revision runtime_config target_modules target_parameters
    task_type trainable_token_indices use_bdlora use_dora use_qalora use_rslora velora_config
    beta1 beta2 deltaT init_r orth_reg_weight target_r tfinal tinit total_step enable_lora
    merge_weights token_indices init_weights
    """.split()  # noqa: SIM905 - a list of fifty strings is harder to read
)
"""The fields of PEFT's LoRA and AdaLoRA, those of any type, and two of its first releases."""


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """The fields that matter, with PEFT's defaults; everything else stays in ``raw``."""

    raw: Mapping[str, Any]
    peft_type: str
    rank: int
    initial_rank: int
    alpha: float
    rank_pattern: Mapping[str, Any]
    alpha_pattern: Mapping[str, Any]
    use_rslora: bool
    use_dora: bool
    target_modules: str | tuple[str, ...] | None
    target_parameters: tuple[str, ...]
    modules_to_save: tuple[str, ...]
    init: Initialisation
    base_model: str | None

    def flag(self, name: str) -> bool:
        """Whether a field is set to something that counts (0, null, ``{}`` and "" do not)."""
        return bool(self.raw.get(name))

    def scaling_for(self, path: str, rank: int | None = None) -> Scaling:
        """Return the scaling of the module or parameter at ``path``.

        Args:
            path: The dotted path that patterns are matched against.
            rank: The rank to use instead of the configured one.
        """
        alpha = pattern_value(self.alpha_pattern, path, self.alpha)
        return Scaling(float(alpha), rank or self.rank_for(path), self.use_rslora)

    def rank_for(self, path: str) -> int:
        """Return the rank that the configuration gives to ``path``."""
        rank = pattern_value(self.rank_pattern, path, self.rank)
        if isinstance(rank, list):  # AdaLoRA keeps a mask of the ranks that were not pruned
            return sum(1 for kept in rank if kept)
        return int(rank)


def read_config(path: Path) -> LoraConfig:
    """Read ``adapter_config.json``.

    Raises:
        FileFormatError: Not a readable JSON object.
        AdapterError: A field that matters holds something impossible.
    """
    return parse_config(read_json_object(path), where=path)


def parse_config(raw: Mapping[str, Any], *, where: object) -> LoraConfig:
    """Interpret a configuration; booleans may be 0 and 1, and null means the default.

    Raises:
        AdapterError: A field that decides about the delta holds something impossible.
    """
    kind = raw.get("peft_type")
    for name, problem in wrong_fields(raw):
        if name in DECIDING:
            raise AdapterError(where, problem, code="LT015")
    if kind == TOKENS:
        raw = {**raw, "trainable_token_indices": raw.get("token_indices")}
    alpha = raw.get("alpha" if kind in OWN_ALPHA else "lora_alpha")
    return LoraConfig(
        raw=raw,
        peft_type=(kind or "LORA").upper(),
        rank=_rank(raw, "r", DEFAULT_RANK, where),
        initial_rank=_rank(raw, "init_r", 0, where),
        alpha=float(DEFAULT_ALPHA if alpha is None else alpha),
        rank_pattern=_patterns(raw, "rank_pattern", where),
        alpha_pattern=_patterns(raw, "alpha_pattern", where),
        use_rslora=bool(raw.get("use_rslora")),
        use_dora=bool(raw.get("use_dora")),
        target_modules=_targets(raw),
        target_parameters=_names(raw, "target_parameters"),
        modules_to_save=_names(raw, "modules_to_save"),
        init=initialisation(str(raw.get("init_lora_weights", True)).lower()),
        base_model=_text(raw.get("base_model_name_or_path")),
    )


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _rank(raw: Mapping[str, Any], name: str, default: int, where: object) -> int:
    rank = raw.get(name)
    if rank is None or (rank == 0 and type(rank) is int and raw.get("peft_type") in UNRANKED):
        return default
    if not _is_rank(rank):
        raise AdapterError(
            where, f"{name} is {rank!r:.40}, expected a positive whole number", code="LT015"
        )
    return int(rank)


def _patterns(raw: Mapping[str, Any], name: str, where: object) -> Mapping[str, Any]:
    value: Mapping[str, Any] = raw.get(name) or {}
    for key, entry in value.items():
        if name == "rank_pattern" and isinstance(entry, list):
            continue
        is_rank = name == "rank_pattern"
        if not (_is_rank(entry) if is_rank else is_number(entry)):
            raise AdapterError(
                where, f"{name}[{key!r:.60}] is {entry!r:.40}, expected a number", code="LT015"
            )
    return value


def _is_rank(value: Any) -> bool:
    return type(value) is int and 0 < value < LARGEST_RANK


def _names(raw: Mapping[str, Any], name: str) -> tuple[str, ...]:
    value = raw.get(name) or ()
    return (value,) if isinstance(value, str) else tuple(dict.fromkeys(value))


def _targets(raw: Mapping[str, Any]) -> str | tuple[str, ...] | None:
    value = raw.get("target_modules")
    if value is None or isinstance(value, str):
        return value
    return _names(raw, "target_modules")
