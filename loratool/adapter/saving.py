"""How an adapter is written: its tensors' names and shapes, and its ``adapter_config.json``."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from loratool.adapter.config import KNOWN_FIELDS
from loratool.adapter.model import Kind
from loratool.adapter.patterns import matches_target
from loratool.adapter.scheme import KeyScheme
from loratool.adapter.slots import AdapterKey, Slot
from loratool.errors import UnsupportedError
from loratool.files.spec import TensorSpec

__all__ = [
    "OutputSite",
    "exact_number",
    "lora_config",
    "scale_fields",
    "site_key",
    "site_specs",
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


@dataclass(frozen=True, slots=True)
class OutputSite:
    """One adapted module as it is written.

    Attributes:
        module: Its dotted path.
        kind: Linear, conv or embedding.
        rank: Rank of one delta.
        alpha: What the configuration (or a tensor) says; the scale is ``alpha / rank``.
        dtype: Of its factors, as a header calls it.
        out: Rows of B.
        into: Shape of A without its rank: ``(in,)``, or ``(in, *kernel)``.
        pattern_path: What the patterns of the configuration are matched against.
        nesting: How many ``base_layer`` steps its keys have.
        experts: How many deltas the factors stack.
        is_parameter: Whether it adapts a raw parameter (``target_parameters``).
        is_target: Whether the configuration has to name it among the targets.
        has_bias: Whether a bias is stored beside B.
        is_expert: Whether it is one of many experts that libraries fuse on loading.
    """

    module: str
    kind: Kind
    rank: int
    alpha: float
    dtype: str
    out: int
    into: tuple[int, ...]
    pattern_path: str
    nesting: int = 0
    experts: int = 1
    is_parameter: bool = False
    is_target: bool = True
    has_bias: bool = False
    is_expert: bool = False

    @property
    def needs_default(self) -> bool:
        """Whether its rank has to be the configuration's own: PEFT has no patterns for it."""
        return self.is_parameter or self.is_expert

    @property
    def down_shape(self) -> tuple[int, ...]:
        """Shape of A."""
        return (self.rank * self.experts, *self.into)

    @property
    def up_shape(self) -> tuple[int, ...]:
        """Shape of B."""
        ones = (1,) * (len(self.into) - 1)
        return (self.out, self.rank * self.experts, *ones)

    @property
    def rank_elements(self) -> int:
        """How many elements one rank takes in both factors."""
        one = replace(self, rank=1)
        return _elements(one.down_shape) + _elements(one.up_shape)


def _elements(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def site_key(scheme: KeyScheme, site: OutputSite, slot: Slot) -> str:
    """Return the name of a tensor of ``site``.

    Raises:
        UnsupportedError: The scheme has no name for it.
    """
    path = site.module
    if site.nesting and site.is_parameter:
        path += ".base_layer" * site.nesting
    elif site.nesting:  # the output projection inside an nn.MultiheadAttention
        parent, _, leaf = path.rpartition(".")
        path = f"{parent}{'.base_layer' * site.nesting}.{leaf}"
    try:
        return scheme.format(AdapterKey(path, slot))
    except KeyError:
        raise UnsupportedError(
            site.module,
            f"the scheme {scheme.name!r} has no name for {slot.value!r}",
            hint="write another scheme with --to, such as --to peft",
        ) from None


def site_specs(scheme: KeyScheme, site: OutputSite, *, with_alpha: bool) -> dict[Slot, TensorSpec]:
    """Return what the tensors of ``site`` are called and what they are.

    Args:
        scheme: How keys are named.
        site: The module.
        with_alpha: Whether alpha is stored as a tensor.

    Raises:
        UnsupportedError: The scheme cannot express it.
    """
    is_embedding = site.kind is Kind.EMBEDDING
    shapes = {
        Slot.EMBEDDING_DOWN if is_embedding else Slot.DOWN: site.down_shape,
        Slot.EMBEDDING_UP if is_embedding else Slot.UP: site.up_shape,
    }
    if site.has_bias:
        shapes[Slot.UP_BIAS] = (site.out,)
    specs = {
        slot: TensorSpec(site_key(scheme, site, slot), site.dtype, shape)
        for slot, shape in shapes.items()
    }
    if with_alpha:
        specs[Slot.ALPHA] = TensorSpec(site_key(scheme, site, Slot.ALPHA), "F32", ())
    return specs


def lora_config(
    old: Mapping[str, Any],
    sites: Sequence[OutputSite],
    *,
    keep_targets: bool,
    changes: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return a configuration for plain LoRA factors, written as PEFT writes it.

    The commonest rank and its alpha become ``r`` and ``lora_alpha``; all other modules get
    anchored patterns, which mean exactly one module each (peft 0.15 and later).

    Args:
        old: The configuration to start from; may be empty.
        sites: What is written.
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
        "lora_bias": any(site.has_bias for site in sites),
    }
    config |= {name: value for name, value in VARIANT_FIELDS.items() if name in config}
    config.setdefault("bias", "none")
    config.setdefault("base_model_name_or_path", None)
    config.setdefault("task_type", None)
    config |= scale_fields(sites)
    fields = target_fields(sites)
    if not (keep_targets and _covers(old, fields["target_modules"])):
        config |= {
            name: value
            for name, value in fields.items()
            if value is not None or config.get(name) is not None
        }
    return dict(sorted({**config, **(changes or {})}.items()))


def target_fields(sites: Sequence[OutputSite]) -> dict[str, Any]:
    """Return the fields that make ``sites``, and nothing else, the targets."""
    modules = [site for site in sites if not site.is_parameter and site.is_target]
    return {
        "target_modules": list(dict.fromkeys(site.pattern_path for site in modules)),
        "target_parameters": [s.pattern_path for s in sites if s.is_parameter] or None,
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


def scale_fields(sites: Sequence[OutputSite]) -> dict[str, Any]:
    """Return rank, alpha and the patterns that say exactly what ``sites`` have."""
    # PEFT warns about patterns that mean raw parameters, and loses those of experts that it
    # fuses on loading: both get the numbers without one.
    plain = [site for site in sites if site.needs_default] or sites
    counts = Counter((site.rank, site.alpha) for site in plain)
    (rank, alpha), _ = counts.most_common(1)[0] if counts else ((1, 1.0), 0)
    patterns = {site.pattern_path: site for site in sites}.items()
    return {
        "r": rank,
        "lora_alpha": exact_number(alpha),
        "rank_pattern": {
            _anchored(path): site.rank for path, site in sorted(patterns) if site.rank != rank
        },
        "alpha_pattern": {
            _anchored(path): exact_number(site.alpha)
            for path, site in sorted(patterns)
            if site.alpha != alpha
        },
    }


def _anchored(path: str) -> str:
    return "^" + re.escape(path)


def exact_number(value: float) -> int | float:
    """Return a whole number as an ``int``, as people write them."""
    return int(value) if float(value).is_integer() else value
