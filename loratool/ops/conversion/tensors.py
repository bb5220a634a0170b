"""What the tensors of a module are called in a scheme, and the configuration around them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from loratool.adapter.build import read_scalar
from loratool.adapter.model import Adapter, Kind
from loratool.adapter.saving import OutputSite, lora_config, site_key
from loratool.adapter.scheme import KeyScheme, ScaleRule, Spelling
from loratool.adapter.slots import AdapterKey, Slot
from loratool.files.spec import TensorSpec
from loratool.names.conv1d import CONV1D_LEAVES
from loratool.names.experts import is_fusible_expert
from loratool.ops.algebra.extras import Extras
from loratool.ops.conversion.metadata import mlx_config
from loratool.ops.conversion.parts import Part
from loratool.ops.conversion.values import spec_of

__all__ = ["alpha_of", "output_site", "part_specs", "written_config"]


def part_specs(
    spelling: str, part: Part, scheme: KeyScheme, name: str, dtype: str | None
) -> dict[Slot, TensorSpec]:
    """Return what the tensors of ``part`` are called and stored as.

    Args:
        spelling: Its module, as the scheme spells it.
        part: The module.
        scheme: The scheme.
        name: The adapter's name, for schemes that have one.
        dtype: The dtype to write floats in, or ``None`` for theirs.
    """
    found = {}
    for slot, value in part.values.items():
        key = _key(spelling, part, scheme, slot, name)
        found[slot] = spec_of(key, value, dtype)
    return found


def _key(spelling: str, part: Part, scheme: KeyScheme, slot: Slot, name: str) -> str:
    if scheme.spelling is Spelling.BARE_FLAT:
        return scheme.format(AdapterKey(spelling, slot, name))
    if part.site.nesting:
        return site_key(scheme, nested_site(part, spelling), slot)
    return scheme.format(AdapterKey(spelling, slot))


def nested_site(part: Part, module: str) -> OutputSite:
    site = part.site
    return OutputSite(
        module=module,
        kind=part.kind,
        rank=1,
        alpha=1.0,
        dtype="F32",
        out=1,
        into=(1,),
        pattern_path="",
        nesting=site.nesting,
        is_parameter=bool(site.parameters),
    )


def alpha_of(spelling: str, part: Part, scheme: KeyScheme) -> tuple[str, float] | None:
    """Return the name and the number of a module's alpha tensor, where it has one."""
    if part.is_plain or part.variant in ("loha", "lokr", "glora", "cp"):
        return scheme.format(AdapterKey(spelling, Slot.ALPHA)), part.written_alpha
    stored = part.site.slots.get(Slot.ALPHA)
    if stored is None or part.variant not in ("oft", "boft"):
        return None
    return scheme.format(AdapterKey(spelling, Slot.ALPHA)), read_scalar(stored)


def output_site(part: Part, scheme: KeyScheme) -> OutputSite:
    """Return ``part`` as PEFT's configuration has to describe it."""
    site = part.site
    down = part.site.slots if not part.is_plain else None
    if down is not None:
        return replace(nested_site(part, part.module), pattern_path=part.module)
    values = part.values
    low = values.get(part.slots[0])
    assert low is not None
    shape = (low.shape[1], low.shape[0]) if scheme.is_transposed else low.shape
    high = values[part.slots[1]]
    out = high.shape[1] if scheme.is_transposed else high.shape[0]
    return OutputSite(
        module=part.module,
        kind=part.kind,
        rank=part.rank,
        alpha=part.written_alpha,
        dtype=low.dtype,
        out=out,
        into=tuple(shape[1:]),
        pattern_path=_pattern_path(part),
        nesting=site.nesting,
        experts=site.experts,
        is_parameter=bool(site.parameters),
        has_bias=Slot.UP_BIAS in values,
        is_expert=is_fusible_expert(part.module),
    )


def _pattern_path(part: Part) -> str:
    site = part.site
    if site.parameters:
        last = len(site.parameters) - 1
        return site.parameters[max(0, last - site.nesting)]
    return part.module.rpartition(".")[0] if site.nesting else part.module


def written_config(
    adapter: Adapter,
    scheme: KeyScheme,
    sites: Sequence[OutputSite],
    parts: Sequence[Part],
    extras: Extras,
    multiplier: float | None,
    alone: str | None,
) -> dict[str, Any] | None:
    """Return ``adapter_config.json``, PEFT's or mlx-lm's; ``None`` where there is none."""
    if scheme.scale is ScaleRule.MULTIPLIER:
        assert multiplier is not None
        return mlx_config(adapter, parts, multiplier)
    if not scheme.has_config:
        return None
    if alone is not None:
        sites = [
            replace(
                site,
                module=site.module.removeprefix(f"{alone}."),
                pattern_path=site.pattern_path.removeprefix(f"{alone}."),
            )
            for site in sites
        ]
    is_plain = adapter.config is not None and adapter.config.peft_type in ("LORA", "ADALORA")
    raw = dict(adapter.config.raw) if adapter.config is not None and is_plain else {}
    changes = dict(extras.config)
    if raw.get("fan_in_fan_out") or _looks_like_conv1d(sites):
        changes["fan_in_fan_out"] = True
    if any(Slot.MAGNITUDE in part.values for part in parts):
        changes["use_dora"] = True
    changes["use_rslora"] = False
    model = (adapter.sidecar or {}).get("model")
    if isinstance(model, str) and not raw.get("base_model_name_or_path"):
        changes["base_model_name_or_path"] = model
    is_same = adapter.scheme == scheme.name and not adapter.skipped
    config = lora_config(raw, sites, keep_targets=is_same, changes=changes)
    return config | {"use_dora": bool(changes.get("use_dora"))}


def _looks_like_conv1d(sites: Sequence[OutputSite]) -> bool:
    linear = [site for site in sites if site.kind is Kind.LINEAR]
    leaves = {site.module.rpartition(".")[2] for site in linear}
    return leaves <= CONV1D_LEAVES and any(
        site.module.endswith("c_attn") and site.out == 3 * site.into[0] for site in linear
    )
