"""From named tensors to sites and extras."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Final

from loratool.adapter.config import LoraConfig
from loratool.adapter.model import (
    HEAD_LEAVES,
    UNTOLD,
    Extra,
    ExtraKind,
    Kind,
    Site,
    in_registered_order,
)
from loratool.adapter.patterns import matches_target
from loratool.adapter.scaling import Scaling
from loratool.adapter.scheme import Scheme
from loratool.adapter.slots import AdapterKey, Slot
from loratool.adapter.variant import Choice, Variant
from loratool.adapter.wrapped import (
    ALPHAS,
    SCALES,
    is_of_layer,
    unwrapped_names,
    without_holder,
)
from loratool.errors import AdapterError
from loratool.files.container import read_bytes
from loratool.files.spec import StoredTensor

__all__ = ["Parts", "build_sites", "is_scaled_by_name", "strip_wrappers"]

WRAPPERS: Final = (
    "base_model.model.",
    "_orig_mod.",
    "module.",
    "_fsdp_wrapped_module.",
    "_checkpoint_wrapped_module.",
    "pipe.dit.",
)
"""What wrapping a model once more (PEFT, torch.compile, DDP, FSDP) puts before its modules.

DiffSynth-Studio has the model inside a pipeline, and may leave that in the names.
"""

INNER_WRAPPERS: Final = tuple(
    f".{name}."
    for name in ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "orig_module")
)

MAX_RANK: Final = 1 << 20
SCALARS: Final = {"F32": "<f", "F64": "<d", "F16": "<e", "I64": "<q", "I32": "<i"}
WIDENED: Final = {"BF16": (b"\x00\x00", "<f"), "F8_E5M2": (b"\x00", "<e")}
"""Types that others begin with: what lacks of those, and what they are."""
RANKS: Final = ("r", "rank", "lora_r", "lora_rank", "lora_dim")
"""What layers of tutorials call their rank."""
SAME: Final = 1e-5
"""What two records of one scale may differ by, rounded as they were."""
UNSCALED: Final = Scaling(None, 0)
SAVED_COPY: Final = re.compile(r"\.(modules_to_save|original_module)(\.[^.]+)?(?=\.)")


@dataclass(frozen=True, slots=True)
class Parts:
    """What the tensors of one adapter are.

    Attributes:
        sites: Adapted modules.
        extras: What belongs to no delta.
        notes: What is worth knowing, one sentence each.
        of_base: Keys of the weights of the base, where the file holds that too.
    """

    sites: tuple[Site, ...]
    extras: tuple[Extra, ...]
    notes: tuple[str, ...]
    of_base: frozenset[str] = frozenset()


@lru_cache(maxsize=1 << 13)
def strip_wrappers(module: str) -> str:
    """Return ``module`` without the prefixes of wrappers, and without ``._orig_mod``."""
    if module.startswith(WRAPPERS):
        prefix = next(prefix for prefix in WRAPPERS if module.startswith(prefix))
        return strip_wrappers(module.removeprefix(prefix))
    for inner in INNER_WRAPPERS:
        module = module.replace(inner, ".").removesuffix(inner[:-1])
    return module


def build_sites(
    tensors: Mapping[str, StoredTensor],
    scheme: Scheme,
    config: LoraConfig | None,
    choose: Choice,
    enabled: tuple[bool, ...] = (),
) -> Parts:
    """Sort ``tensors`` into sites and extras.

    Args:
        tensors: The tensors of one adapter by key.
        scheme: How the keys are to be read.
        config: What the configuration says, or ``None``.
        choose: Tells variants apart.
        enabled: Which parts of merged projections stacked factors are for.

    Raises:
        AdapterError: Two keys mean the same thing, or a factor has an impossible shape.
    """
    groups: dict[tuple[str, int], dict[Slot, StoredTensor]] = {}
    extras: list[Extra] = []
    wrapped = 0
    for key, tensor in tensors.items():
        parsed = scheme.keys.parse(key)
        if parsed is None:
            extras.append(_extra(key, tensor, scheme))
            continue
        module = strip_wrappers(parsed.module)
        wrapped += module != parsed.module
        if not scheme.keys.prefix:
            module = without_holder(module)
        if parsed.slot in (Slot.ROWS, Slot.STATE):
            kind = ExtraKind.ROWS if parsed.slot is Slot.ROWS else ExtraKind.STATE
            extras.append(Extra(key, module.replace(".base_layer", ""), kind, tensor))
            continue
        path, nesting = module, 0
        if "base_layer" in module:
            parts = module.split(".")
            nesting = parts.count("base_layer")
            path = ".".join(part for part in parts if part != "base_layer")
        slots = groups.setdefault((path, nesting), {})
        if parsed.slot in slots:
            raise AdapterError(key, f"{path!r} has two tensors for {parsed.slot.value!r}")
        slots[parsed.slot] = scheme.roles.view(parsed.slot, tensor)
    orphans = [place for place, slots in groups.items() if slots.keys() == {Slot.ALPHA}]
    for place in orphans:
        (alpha,) = groups.pop(place).values()
        extras.append(Extra(alpha.spec.name, f"{place[0]}.alpha", ExtraKind.STATE, alpha))
    sites = []
    for (module, nesting), slots in groups.items():
        _check_shapes(module, slots, scheme.keys.factor_slots)
        variant = choose(module, slots, config, enabled)
        settings = variant.settings(module, slots, config, tensors)
        of = _kind(variant, slots)
        raw: tuple[str, ...] = ()
        if of is Kind.LINEAR and config is not None and config.target_parameters:
            raw = in_registered_order(_parameters(module, config))
        stacked = enabled if variant.is_stacked else ()
        draft = Site(module, of, variant, slots, UNSCALED, nesting, raw, stacked, settings)
        scaling = _scaling(draft, config)
        # Not by dataclasses.replace: this is done for every module, and that takes longer.
        sites.append(Site(module, of, variant, slots, scaling, nesting, raw, stacked, settings))
    sites, extras = _with_stored_scales(sites, extras)
    sites, extras = _with_untold(sites, extras)
    adapted = {site.module for site in sites}
    shared = {t.spec.name for site in sites if site.settings for t in site.tensors}
    extras = [replace(e, kind=ExtraKind.SHARED) if e.key in shared else e for e in extras]
    of_base = _of_base(extras, sites, config)
    extras = [_with_base_copies(e, adapted) for e in extras if e.key not in of_base]
    notes = (
        (f"{wrapped} keys carry the prefix of a wrapper twice; PEFT would not apply them",)
        if wrapped and scheme.keys.prefix
        else ()
    )
    if orphans:
        notes = (*notes, f"{len(orphans)} alphas belong to no factors, such as {orphans[0][0]!r}")
    if of_base:
        example = min(of_base)
        words = f"{len(of_base)} weights of a base lie beside the factors, such as {example!r}"
        notes = (*notes, f"{words}; they are not the adapter's, and are not used")
    return Parts(tuple(sites), tuple(extras), notes, of_base)


def _extra(key: str, tensor: StoredTensor, scheme: Scheme) -> Extra:
    name = strip_wrappers(key.removeprefix(scheme.keys.prefix))
    if ".original_module." in name:
        return Extra(key, SAVED_COPY.sub("", name), ExtraKind.STATE, tensor)
    return Extra(key, SAVED_COPY.sub("", name), ExtraKind.FULL, tensor)


def _with_stored_scales(sites: list[Site], extras: list[Extra]) -> tuple[list[Site], list[Extra]]:
    """Give modules the scale or alpha that their layer keeps as a number beside the factors.

    Code of tutorials registers it as a buffer, or learns it.
    """
    found: dict[str, Extra] = {}
    for extra in extras:
        module, _, leaf = extra.name.rpartition(".")
        if leaf in (*ALPHAS, *SCALES) and extra.tensor.spec.elements == 1:
            found.setdefault(without_holder(module), extra)
    if not found:
        return sites, extras
    used: set[str] = set()
    for index, site in enumerate(sites):
        number = found.get(site.module)
        if number is None or not site.variant.is_scaled:
            continue
        value, rank = read_scalar(number.tensor), site.scaling.rank
        scaling = Scaling(value, rank)
        if number.name.rpartition(".")[2] in SCALES:
            scaling = Scaling(value * rank, rank, multiplier=value)
        if site.scaling.alpha is None:
            sites[index] = replace(site, scaling=scaling)
        elif not math.isclose(scaling.factor, site.scaling.factor, rel_tol=SAME):
            continue
        used.add(number.key)
    return sites, [extra for extra in extras if extra.key not in used]


def _with_untold(sites: list[Site], extras: list[Extra]) -> tuple[list[Site], list[Extra]]:
    """Say of modules what lies beside their factors that nobody knows the meaning of.

    A number that says their rank, or what was dropped in training, changes nothing.
    """
    places = {site.module: index for index, site in enumerate(sites)}
    kept: list[Extra] = []
    for extra in extras:
        holder, _, leaf = extra.name.rpartition(".")
        index = places.get(without_holder(holder))
        if index is None or extra.kind is not ExtraKind.FULL or is_of_layer(leaf):
            kept.append(extra)
            continue
        site = sites[index]
        if extra.tensor in site.settings.values():  # it is shared by several
            kept.append(extra)
            continue
        if _is_of_training(extra, leaf, site):
            kept.append(replace(extra, kind=ExtraKind.STATE))
            continue
        kept.append(extra)
        untold = (*site.settings.get(UNTOLD, ()), extra.tensor.spec)
        sites[index] = replace(site, settings={**site.settings, UNTOLD: untold})
    return sites, kept


def _is_of_training(extra: Extra, leaf: str, site: Site) -> bool:
    """Whether a number beside factors only says what they say, or nothing about them."""
    if extra.tensor.spec.elements != 1:
        return False
    return "dropout" in leaf or (leaf in RANKS and read_scalar(extra.tensor) == site.rows)


def _of_base(extras: list[Extra], sites: list[Site], config: LoraConfig | None) -> frozenset[str]:
    """Return the keys of a base's weights, where a file holds most of those that it adapts.

    PEFT itself stores such a copy of embeddings and heads alone. What the configuration says was
    trained as a whole belongs to the adapter.
    """
    whole = [extra for extra in extras if extra.kind is ExtraKind.FULL]
    linear = {
        site.module
        for site in sites
        if site.kind is not Kind.EMBEDDING and site.module.rpartition(".")[2] not in HEAD_LEAVES
    }
    unwrapped = unwrapped_names((extra.name for extra in whole), linear)
    names = {name.removesuffix(".weight") for name in unwrapped.values()}
    if 2 * len(names & linear) <= len(linear) or not linear:
        return frozenset()
    saved = config.modules_to_save if config is not None else ()
    has_biases = config is not None and config.raw.get("bias") not in (None, "none")

    def is_trained(extra: Extra) -> bool:
        module, _, leaf = extra.name.rpartition(".")
        is_saved = any(name in module.split(".") for name in saved)
        return is_saved or ".modules_to_save." in extra.key or (leaf == "bias" and has_biases)

    return frozenset(extra.key for extra in whole if not is_trained(extra))


def _with_base_copies(extra: Extra, adapted: set[str]) -> Extra:
    """Mark ``X.base_layer.weight`` beside a site on X as the copy that it is."""
    if extra.kind is not ExtraKind.FULL or ".base_layer" not in extra.name:
        return extra
    name = extra.name.replace(".token_adapter.base_layer", "").replace(".base_layer", "")
    module, _, leaf = name.rpartition(".")
    is_copy = leaf == "weight" and (module in adapted or ".token_adapter." in extra.name)
    return Extra(extra.key, name, ExtraKind.BASE_COPY if is_copy else extra.kind, extra.tensor)


def _kind(variant: Variant, slots: Mapping[Slot, StoredTensor]) -> Kind:
    """Return what kind of weight a site adapts."""
    embedded = {Slot.EMBEDDING_DOWN, Slot.EMBEDDING_UP, *variant.embedding_slots}
    if embedded & slots.keys():
        return Kind.EMBEDDING
    kernels = variant.kernel_slots & slots.keys()
    return Kind.CONV if any(len(slots[slot].spec.shape) > 2 for slot in kernels) else Kind.LINEAR


def _check_shapes(
    module: str, slots: Mapping[Slot, StoredTensor], factors: frozenset[Slot]
) -> None:
    for slot in factors & slots.keys():
        shape = slots[slot].spec.shape
        if len(shape) > 1 and min(shape[:2]) > MAX_RANK:
            raise AdapterError(module, f"a factor of shape {list(shape)} has no plausible rank")


def _parameters(module: str, config: LoraConfig | None) -> Iterator[str]:
    """Yield the raw parameters of ``module`` that ``target_parameters`` may name.

    A bare name (``down_proj``) could mean a parameter of any module; those that are targets
    themselves are ordinary modules.
    """
    if config is None:
        return
    is_target = bool(config.target_modules) and matches_target(config.target_modules or (), module)
    for target in config.target_parameters:
        parent, _, leaf = target.rpartition(".")
        name = f"{module}.{leaf}"
        if (parent and matches_target((target,), name)) or (not parent and not is_target):
            yield name


def _scaling(site: Site, config: LoraConfig | None) -> Scaling:
    rank = site.slots[Slot.UP].spec.shape[1] if site.enabled else site.rows
    if not site.variant.is_scaled:
        return Scaling(None, rank)
    own = site.variant.scaling(site, config)
    if own is not None:
        return own
    if Slot.ALPHA in site.slots:
        return Scaling(read_scalar(site.slots[Slot.ALPHA]), rank)
    if config is None:
        return Scaling(None, rank)
    if site.parameters:
        # Innermost is the parameter registered first. Where the names do not tell which that
        # is, only the base's shapes can; until then the order of the configuration serves.
        last = len(site.parameters) - 1
        return config.scaling_for(site.parameters[max(0, last - site.nesting)])
    if is_scaled_by_name(site, config):
        return config.scaling_for(site.pattern_path)
    return config.scaling_for(site.pattern_path, rank)


def is_scaled_by_name(site: Site, config: LoraConfig) -> bool:
    """Whether PEFT scales a site by the configured rank, although its factors have another.

    That is so for a head with the factors of the embedding that it is tied to, and where PiSSA
    or OLoRA took over a matrix that has no more ranks than the factors.
    """
    configured = config.rank_for(site.pattern_path)
    if site.rows == configured:
        return False
    smallest = min(site.in_features, site.out_features)
    is_whole = config.init.residual is not None and site.rows == smallest < configured
    is_head = site.module.rpartition(".")[2] in HEAD_LEAVES
    return is_whole or (is_head and config.flag("ensure_weight_tying"))


def read_scalar(tensor: StoredTensor) -> float:
    """Read a tensor of one element as a number.

    Raises:
        AdapterError: It has more elements than one, no numeric dtype, or is not finite.
    """
    spec = tensor.spec
    if spec.elements != 1 or spec.dtype not in (*SCALARS, *WIDENED, "F8_E4M3"):
        raise AdapterError(
            spec.name, f"expected one number, found {spec.dtype} of shape {list(spec.shape)}"
        )
    data = read_bytes(tensor)
    if spec.dtype == "F8_E4M3":
        value = _e4m3(data[0])
    elif spec.dtype in WIDENED:
        zeros, form = WIDENED[spec.dtype]
        value = float(struct.unpack(form, zeros + data)[0])
    else:
        value = float(struct.unpack(SCALARS[spec.dtype], data)[0])
    if not math.isfinite(value):
        raise AdapterError(spec.name, f"is {value}, expected a number")
    return value


def _e4m3(code: int) -> float:
    """Return the number that a byte is with 4 bits of exponent and 3 of mantissa (``e4m3fn``)."""
    exponent, mantissa = code >> 3 & 15, code & 7
    if (exponent, mantissa) == (15, 7):
        return math.nan
    size = math.ldexp(mantissa + 8 * (exponent > 0), max(exponent, 1) - 10)
    return -size if code & 128 else size


def adapter_names(keys: Mapping[str, AdapterKey | None]) -> list[str]:
    """Return the adapter names that occur inside keys, in order of appearance."""
    return list(
        dict.fromkeys(key.adapter for key in keys.values() if key and key.adapter is not None)
    )
