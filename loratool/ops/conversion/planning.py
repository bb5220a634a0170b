"""From an opened adapter to the plan of the same deltas in another scheme, from headers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from loratool.adapter.model import Adapter, Extra, ExtraKind, Kind, Site
from loratool.adapter.saving import OutputSite, lora_config, site_key
from loratool.adapter.scheme import Embeddings, KeyScheme, ScaleRule, Spelling
from loratool.adapter.slots import AdapterKey, Slot
from loratool.adapter.variants import VARIANT_WORDS
from loratool.errors import AdapterError, OptionError, UnsupportedError
from loratool.files.container import PICKLE_SUFFIXES
from loratool.files.dtypes import DTYPES
from loratool.files.spec import TensorSpec
from loratool.names.conv1d import CONV1D_LEAVES
from loratool.names.experts import is_fusible_expert
from loratool.names.pipelines import component_of
from loratool.ops.algebra.extras import Carried, Extras, gather_extras
from loratool.ops.algebra.planning import check_place
from loratool.ops.algebra.provenance import history_metadata
from loratool.ops.algebra.sidecars import carried_files
from loratool.ops.conversion.base import Base
from loratool.ops.conversion.experts import stack_experts
from loratool.ops.conversion.initial import without_initial
from loratool.ops.conversion.metadata import (
    kept_metadata,
    kohya_metadata,
    mlx_config,
    module_names,
    positional_metadata,
)
from loratool.ops.conversion.parts import Part, part_of
from loratool.ops.conversion.plain import Approximation, shaped_like, to_plain
from loratool.ops.conversion.plan import ConversionPlan, OutputPart
from loratool.ops.conversion.renaming import families_of, names_native, to_hub, to_native
from loratool.ops.conversion.scales import placed_scales
from loratool.ops.conversion.spelling import spelled, with_components, written_order
from loratool.ops.conversion.values import (
    Arranged,
    Scaled,
    Value,
    flipped,
    reshaped,
    scaled,
    spec_of,
)
from loratool.ops.merging.mergeable import HARMLESS_INITS
from loratool.ops.plan import Sidecar
from loratool.ops.targets.preparing import prepare, refusals, uniform_rank
from loratool.ops.targets.target import Target

__all__ = ["Wishes", "plan_conversion"]

WEIGHT_DTYPES: Final = ("F64", "F32", "F16", "BF16")
RAW_VARIANTS: Final = frozenset(VARIANT_WORDS)
HISTORY: Final = "loratool"
BUNDLE: Final = re.compile(r"bundle_emb\.(?P<token>.+?)\.(string_to_param\.\*|clip_l)", re.DOTALL)
TOKEN: Final = re.compile(r"<(?P<token>[^<>]+)>", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Wishes:
    """What a conversion is asked for, beyond the scheme.

    Attributes:
        output: Where it goes.
        base: The base, where one was given.
        initial: The adapter as it was before training, where its initialisation changed the base.
        dtype: The dtype to write (``F32``), or ``None``.
        family: Which pipeline the modules belong to, where names do not tell.
        naming: ``native`` or ``diffusers`` for the backbone, or ``None`` for what is usual.
        component: Write this component of a pipeline only, in its own names.
        name: The adapter's name inside the file, for schemes that have one.
        drop: Regular expressions of what may be left out.
        to_lora: Whether to write plain LoRA whatever the variant.
        rank: Rank of what has to be approximated for that.
        fold: Fold all scales into the factors.
        pad: Give all modules this rank, the missing ones zero.
        target: The loader that it is for, where one was named.
        options: What was asked for, for the metadata; without it the history of the input is
            that of the output.
        history: The history to record instead of either.
        digest: SHA-256 of the input's weights.
    """

    output: Path
    base: Base | None = None
    initial: Adapter | None = None
    dtype: str | None = None
    family: str | None = None
    naming: str | None = None
    component: str | None = None
    name: str | None = None
    drop: tuple[str, ...] = ()
    to_lora: bool = False
    rank: int | None = None
    fold: bool = False
    pad: int | None = None
    target: Target | None = None
    options: Mapping[str, Any] | None = None
    history: Mapping[str, str] | None = None
    digest: str | None = None


def plan_conversion(adapter: Adapter, scheme: KeyScheme, wishes: Wishes) -> ConversionPlan:
    """Return the plan; raises where the scheme cannot express something, and says what.

    Raises:
        UnsupportedError: The scheme cannot express it.
        AdapterError: The adapter is broken, or its names cannot be told.
    """
    check_place(wishes.output, scheme.name, has_config=scheme.has_config)
    _check_names(adapter)
    _check_config(adapter, has_initial=wishes.initial is not None)
    target = wishes.target
    if target is not None:
        refusals(adapter, target, drop=wishes.drop, to_lora=wishes.to_lora)
    dropping = _Dropping(wishes.drop)
    sites = [site for site in adapter.sites if not dropping.takes(site.label)]
    _check_nesting(sites, adapter, scheme)
    parts = [part_of(site, adapter) for site in sites]
    if wishes.initial is not None:
        parts = without_initial(parts, wishes.initial)
    parts, others = _of_component(parts, wishes.component)
    dropping.found += others
    if not parts:
        raise AdapterError(adapter.path, "has no delta that would be written")
    parts, approximations = _plain(parts, adapter, wishes)
    pad = wishes.pad
    if target is not None:
        parts = prepare(parts, target, wishes.base)
        pad = pad or uniform_rank(parts, target)
    naming = families_of([p.module for p in parts], wishes.family or adapter.family)
    family = wishes.family or adapter.family
    if family is None and len(naming.families) == 1:
        family = naming.families[0].name
    native = _is_native(scheme, family, wishes.naming)
    if scheme.spelling not in (Spelling.PATH, Spelling.BARE_FLAT) and naming.families:
        parts = with_components(parts, naming.families[0].backbone)
    elif scheme.spelling is Spelling.FLAT or scheme.spelling is Spelling.PIPELINE:
        parts = with_components(parts, None)
    if native:
        shapes = {m: w.spec.shape for m, w in wishes.base.weights.items()} if wishes.base else {}
        parts = to_native(parts, naming, shapes)
    else:
        parts = to_hub(parts, naming)
    if wishes.base is not None:
        parts = [_fitted(part, wishes.base) for part in parts]
    parts = _padded(parts, pad, scheme)
    if scheme.scale is ScaleRule.MULTIPLIER:
        parts = stack_experts(parts)
    is_folded = wishes.fold or (target is not None and target.fold)
    rule = ScaleRule.FOLDED if is_folded else scheme.scale
    parts, multiplier = placed_scales(parts, rule)
    if is_folded and scheme.scale is ScaleRule.MULTIPLIER:
        multiplier = 1.0
    parts = [_slotted(part, scheme) for part in parts]
    names = spelled(parts, scheme, family, component=wishes.component)
    output_parts, constants, alphas = [], {}, []
    name = wishes.name or adapter.name or "default"
    for spelling in written_order(names):
        part = names[spelling]
        specs = _specs(spelling.partition("\0")[0], part, scheme, name, wishes.dtype)
        output_parts.append(
            OutputPart(part, specs, approximations.get(id(part.site)), scheme.is_transposed)
        )
        if scheme.scale is ScaleRule.ALPHA:
            alpha = _alpha(spelling, part, scheme)
            if alpha is not None:
                constants[alpha[0]] = alpha[1]
                alphas.append(Carried(TensorSpec(alpha[0], "F32", ()), (), constant=alpha[1]))
    output_sites = [_output_site(part, scheme) for part in names.values()]
    extras = _extras(adapter, output_sites, scheme, dropping, wishes.dtype)
    if scheme.spelling is Spelling.POSITION:
        extras.notes.append(
            "its modules are numbered in the order that cloneofsimo/lora had when it was written: "
            "attention, feed-forward, cross-attention"
        )
    _check_unique([s for p in output_parts for s in p.specs.values()], alphas, extras.carried)
    config = _config(adapter, scheme, output_sites, list(names.values()), extras, multiplier)
    if config is not None and target is not None:
        config |= target.config
    sidecars, left, file_notes = _files(adapter, wishes.output)
    title = wishes.output.stem
    is_torch = _is_torch(wishes.output, scheme)
    metadata = {
        **kept_metadata(adapter),
        **(
            kohya_metadata(adapter, list(names.values()), family, title)
            if scheme.spelling is Spelling.FLAT
            else {}
        ),
        **(positional_metadata(names) if scheme.spelling is Spelling.POSITION else {}),
        **{t: "<embed>" for t in _tokens(extras) if scheme.spelling is Spelling.POSITION},
        **module_names(names, scheme),
        **_history(adapter, wishes),
    }
    return ConversionPlan(
        parts=tuple(output_parts),
        constants=constants,
        carried=(*alphas, *extras.carried),
        metadata={} if is_torch else metadata,
        sidecars=tuple(sidecars),
        config=config,
        weights_name=_weights_name(wishes.output, scheme),
        is_torch=is_torch,
        is_hashed=scheme.spelling is Spelling.FLAT and not is_torch,
        stamps=_stamps(adapter, wishes),
        scheme=scheme.name,
        family=family,
        notes=tuple(
            dict.fromkeys([*_notes(adapter, scheme, names, wishes), *extras.notes, *file_notes])
        ),
        dropped=(
            *dropping.found,
            *extras.dropped,
            *((key, "skipped as asked") for key in adapter.skipped),
            *left,
        ),
    )


def _history(adapter: Adapter, wishes: Wishes) -> dict[str, str]:
    if wishes.history is not None:
        return {k: v for k, v in wishes.history.items() if k in ("format", HISTORY)}
    if wishes.options is None:
        return {k: adapter.metadata[k] for k in ("format", HISTORY) if k in adapter.metadata}
    inputs = [(adapter.path.resolve().name, wishes.digest)]
    return history_metadata("convert", inputs, wishes.options)


class _Dropping:
    """What ``--drop`` leaves out, and what it has left out so far."""

    def __init__(self, patterns: Sequence[str]) -> None:
        try:
            self.patterns = [re.compile(text) for text in patterns]
        except re.error as error:
            raise OptionError("--drop", f"not a regular expression: {error}") from None
        self.found: list[tuple[str, str]] = []

    def takes(self, name: str) -> bool:
        """Whether ``name`` is left out; then it is noted."""
        if any(pattern.search(name) for pattern in self.patterns):
            self.found.append((name, "dropped as asked"))
            return True
        return False


def _check_names(adapter: Adapter) -> None:
    """Refuse to go on with modules whose names are not known.

    Raises:
        AdapterError: There are some; the message lists them.
    """
    if not adapter.unresolved:
        return
    name, paths = next(iter(adapter.unresolved.items()))
    count = len(adapter.unresolved)
    listed = ", ".join(repr(n) for n in list(adapter.unresolved)[:3])
    more = f" and {count - 3} more" if count > 3 else ""
    if paths:
        raise AdapterError(
            adapter.path,
            f"{count} module names could stand for several paths: {name!r} for "
            f"{' or '.join(map(repr, paths[:4]))}",
            hint="give --base, whose names settle it (only its headers are read)",
        )
    raise AdapterError(
        adapter.path,
        f"{count} module names are not known: {listed}{more}",
        hint="give --base, whose names settle it (only its headers are read), or leave them out "
        "with --skip",
    )


def _check_config(adapter: Adapter, *, has_initial: bool) -> None:
    config = adapter.config
    if config is None:
        return
    for field, words in (
        ("alora_invocation_tokens", "an activated LoRA, which acts after its tokens only"),
        ("arrow_config", "an Arrow router, which mixes adapters by input"),
        ("layer_replication", "for a stack of replicated layers, which only PEFT can name"),
    ):
        if config.flag(field):
            raise UnsupportedError(adapter.path, f"{field}: it is {words}")
    is_changed = config.init not in HARMLESS_INITS or config.init in ("pissa", "olora")
    if is_changed and not has_initial:
        raise UnsupportedError(
            adapter.path,
            f"init_lora_weights is {config.init!r}: its delta is relative to a base that the "
            "initialisation changed",
            hint="give the adapter as it was initialised: --initial FOLDER",
        )


def _check_nesting(sites: Sequence[Site], adapter: Adapter, scheme: KeyScheme) -> None:
    """Refuse what only PEFT's configuration can say about a module.

    Raises:
        UnsupportedError: There is such a module, and the scheme has no configuration of PEFT.
    """
    if scheme.scale is ScaleRule.CONFIG:
        return
    for site in sites:
        if site.parameters or site.nesting:
            what = (
                "adapts a raw parameter (target_parameters), such as fused experts"
                if site.parameters
                else "is inside an nn.MultiheadAttention"
            )
            raise UnsupportedError(
                f"{adapter.path}: {site.label}",
                f"{what}, which only PEFT's configuration can say",
                hint="leave it out with --skip, or merge the adapter into its base",
            )


def _of_component(
    parts: Sequence[Part], component: str | None
) -> tuple[list[Part], list[tuple[str, str]]]:
    if component is None:
        return list(parts), []
    kept, others = [], []
    for part in parts:
        if component_of(part.module)[0] in (component, None):
            kept.append(part)
        else:
            others.append((part.module, f"not in --component {component}"))
    return kept, others


def _plain(
    parts: Sequence[Part], adapter: Adapter, wishes: Wishes
) -> tuple[list[Part], dict[int, Approximation]]:
    """Return plain parts where that was asked for, and how good the approximations are."""
    made, found = [], {}
    for part in parts:
        if not wishes.to_lora:
            made.append(part)
            continue
        plain, approximation = to_plain(part, adapter, wishes.base, wishes.rank)
        made.append(plain)
        if approximation is not None:
            found[id(plain.site)] = approximation
    return made, found


def _is_native(scheme: KeyScheme, family: str | None, naming: str | None) -> bool:
    """Whether the scheme is written with the names of original checkpoints."""
    if scheme.spelling not in (Spelling.FLAT, Spelling.NATIVE):
        if naming == "native":
            raise OptionError("--naming", f"the scheme {scheme.name!r} has diffusers' names only")
        return False
    if naming is not None:
        return naming == "native"
    return scheme.spelling is Spelling.NATIVE or names_native(family)


def _fitted(part: Part, base: Base) -> Part:
    """Return ``part`` with kernels as the base has them; its shapes are checked.

    Raises:
        AdapterError: It does not fit.
    """
    weight = base.find(part.module)
    if weight is None or not part.is_plain:
        return part
    shape = weight.spec.shape
    made = shaped_like(part, shape)
    out, into = made.up.shape[0], made.down.shape[1:]
    # GPT-2's Conv1D is (in, out), and an embedding (vocabulary, dim).
    if shape != (*into, out) and (shape != (out, *into) or made.kind is Kind.EMBEDDING):
        raise AdapterError(
            part.module,
            f"its delta has the shape {[out, *into]}, the base's weight {list(shape)}",
            hint="is this the base that it was trained on?",
        )
    return made


def _padded(parts: Sequence[Part], rank: int | None, scheme: KeyScheme) -> list[Part]:
    """Return parts of one rank where that is asked for, or needed by the scheme.

    Raises:
        OptionError: A module has a higher rank.
    """
    if scheme.scale is ScaleRule.MULTIPLIER and rank is None:
        rank = max(part.rank for part in parts)
    if rank is None:
        return list(parts)
    made = []
    for part in parts:
        if not part.is_plain:
            raise UnsupportedError(
                part.module, f"is a {part.variant} and has no ranks", hint="add --to-lora"
            )
        if part.rank > rank:
            raise OptionError(
                f"rank {rank}",
                f"{part.module!r} has rank {part.rank}",
                hint=f"shrink it first: loratool truncate ADAPTER --rank {rank} -o OUT",
            )
        made.append(part if part.rank == rank else _widened(part, rank))
    return made


def _widened(part: Part, rank: int) -> Part:
    down, up = part.down, part.up
    wide_down = Arranged(((down, 0, 0),), (rank, *down.shape[1:]), down.dtype)
    wide_up = Arranged(((up, 0, 0),), (up.shape[0], rank, *up.shape[2:]), up.dtype)
    return part.factored(wide_down, wide_up, note=f"filled with zeros up to rank {rank}")


def _slotted(part: Part, scheme: KeyScheme) -> Part:
    """Return ``part`` with its tensors in the roles that ``scheme`` has.

    Raises:
        UnsupportedError: It has no place for one of them.
    """
    values = dict(part.values)
    if part.kind is Kind.EMBEDDING and part.is_plain:
        values = _embedding(part, scheme)
    if part.is_plain and part.kind is Kind.CONV and not scheme.has_convolutions:
        raise _no_place(part, scheme, "the factors of a convolution")
    if Slot.MAGNITUDE in values:
        values[Slot.MAGNITUDE] = _magnitude(part, scheme)
    bias = values.get(Slot.UP_BIAS)
    if bias is not None and _writes_plain_bias(scheme):
        del values[Slot.UP_BIAS]
        values[Slot.BIAS] = scaled(bias, part.scale)
    plain_bias = values.get(Slot.BIAS)
    if plain_bias is not None and part.is_plain and not _writes_plain_bias(scheme):
        if part.scale == 0:
            raise _no_place(part, scheme, "a bias beside a delta of scale 0")
        del values[Slot.BIAS]
        values[Slot.UP_BIAS] = scaled(plain_bias, 1 / part.scale)
    if scheme.is_transposed:
        for slot in (Slot.DOWN, Slot.UP):
            if slot in values and len(values[slot].shape) == 2:
                values[slot] = flipped(values[slot])
    for slot in values:
        if not scheme.has_name_for(slot):
            words = VARIANT_WORDS.get(part.variant) if not part.is_plain else None
            raise _no_place(part, scheme, words or f"its {slot.value}")
    if not part.is_plain and scheme.scale is not ScaleRule.ALPHA:
        raise _no_place(part, scheme, VARIANT_WORDS.get(part.variant, part.variant))
    return replace(part, values=values)


def _writes_plain_bias(scheme: KeyScheme) -> bool:
    """Whether a scheme stores biases as they are added, not multiplied by the scale."""
    return scheme.scale is ScaleRule.ALPHA


def _no_place(part: Part, scheme: KeyScheme, what: str) -> UnsupportedError:
    hint = "leave it out with --drop, which says so in the report"
    if not part.is_plain:
        hint = "make it a plain LoRA with --to-lora"
    return UnsupportedError(
        part.module, f"the scheme {scheme.name!r} has no place for {what}", hint=hint
    )


def _embedding(part: Part, scheme: KeyScheme) -> dict[Slot, Value]:
    down, up = part.down, part.up
    others = {s: v for s, v in part.values.items() if s not in part.slots}
    match scheme.embeddings:
        case Embeddings.SLOTS:
            return {Slot.EMBEDDING_DOWN: down, Slot.EMBEDDING_UP: up, **others}
        case Embeddings.FACTORS:
            return {Slot.DOWN: down, Slot.UP: up, **others}
        case Embeddings.WEIGHT:
            return {Slot.DOWN: flipped(up), Slot.UP: flipped(down), **others}
    raise _no_place(part, scheme, "the factors of an embedding")


def _magnitude(part: Part, scheme: KeyScheme) -> Value:
    """Return DoRA's magnitudes in the shape that the scheme has for them.

    Raises:
        UnsupportedError: They are of the inputs, which only LyCORIS' files have.
    """
    value = part.values[Slot.MAGNITUDE]
    size = max(value.shape, default=1)
    is_input_wise = len(value.shape) > 1 and value.shape[0] == 1 and value.shape[1] > 1
    is_input_wise = is_input_wise and not (
        len(value.shape) > 2
        and value.shape[1] == part.up.shape[0]
        and part.site.kind is Kind.CONV
        and scheme.name != "kohya"
    )
    if part.kind is Kind.EMBEDDING:
        if scheme.scale is ScaleRule.ALPHA:
            raise _no_place(part, scheme, "magnitudes of an embedding")
        return reshaped(value, (size,))
    is_peft_conv = part.kind is Kind.CONV and value.shape[:2] == (1, part.up.shape[0])
    if is_input_wise and not is_peft_conv:
        if scheme.scale is ScaleRule.ALPHA:
            return value
        raise _no_place(part, scheme, "magnitudes of the inputs (LyCORIS, wd_on_out=False)")
    if scheme.scale is ScaleRule.ALPHA:
        return reshaped(value, (size, *(1,) * (len(part.down.shape) - 1)))
    if part.kind is Kind.CONV:
        return reshaped(value, (1, size, *(1,) * (len(part.down.shape) - 2)))
    return reshaped(value, (size,))


def _specs(
    spelling: str, part: Part, scheme: KeyScheme, name: str, dtype: str | None
) -> dict[Slot, TensorSpec]:
    found = {}
    for slot, value in part.values.items():
        key = _key(spelling, part, scheme, slot, name)
        found[slot] = spec_of(key, value, dtype)
    return found


def _key(spelling: str, part: Part, scheme: KeyScheme, slot: Slot, name: str) -> str:
    if scheme.spelling is Spelling.BARE_FLAT:
        return scheme.format(AdapterKey(spelling, slot, name))
    if part.site.nesting:
        return site_key(scheme, _nested(part, spelling), slot)
    return scheme.format(AdapterKey(spelling, slot))


def _nested(part: Part, module: str) -> OutputSite:
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


def _alpha(spelling: str, part: Part, scheme: KeyScheme) -> tuple[str, float] | None:
    """Return the name and the number of a module's alpha tensor, where it has one."""
    if part.is_plain or part.variant in ("loha", "lokr", "glora", "cp"):
        return scheme.format(AdapterKey(spelling, Slot.ALPHA)), part.written_alpha
    stored = part.site.slots.get(Slot.ALPHA)
    if stored is None or part.variant not in ("oft", "boft"):
        return None
    from loratool.adapter.build import read_scalar

    return scheme.format(AdapterKey(spelling, Slot.ALPHA)), read_scalar(stored)


def _output_site(part: Part, scheme: KeyScheme) -> OutputSite:
    site = part.site
    component = component_of(part.module)[0]
    down = part.site.slots if not part.is_plain else None
    if down is not None:
        return replace(_nested(part, part.module), pattern_path=part.module)
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
        pattern_path=_pattern_path(part, component),
        nesting=site.nesting,
        experts=site.experts,
        is_parameter=bool(site.parameters),
        has_bias=Slot.UP_BIAS in values,
        is_expert=is_fusible_expert(part.module),
    )


def _pattern_path(part: Part, component: str | None) -> str:
    site = part.site
    if site.parameters:
        last = len(site.parameters) - 1
        return site.parameters[max(0, last - site.nesting)]
    return part.module.rpartition(".")[0] if site.nesting else part.module


def _extras(
    adapter: Adapter,
    sites: Sequence[OutputSite],
    scheme: KeyScheme,
    dropping: _Dropping,
    dtype: str | None,
) -> Extras:
    """Return what travels beside the deltas.

    Raises:
        UnsupportedError: The scheme has no place for something.
    """
    kept = [extra for extra in adapter.extras if not dropping.takes(extra.key)]
    if scheme.is_open:
        return gather_extras(
            [replace(adapter, extras=tuple(kept))], sites, scheme, policy="error", dtype=dtype
        )
    result = Extras()
    for extra in kept:
        if extra.kind is ExtraKind.STATE:
            result.dropped.append((extra.key, "only training needs it"))
        elif ".vera_" in extra.key:
            continue
        elif (key := _token_key(extra, scheme)) is not None:
            shape = extra.tensor.spec.shape
            shape = (1, *shape) if len(shape) == 1 and scheme.spelling is Spelling.FLAT else shape
            if scheme.spelling is Spelling.POSITION and shape[:1] == (1,) and len(shape) == 2:
                shape = shape[1:]
            spec = TensorSpec(key, extra.tensor.spec.dtype, shape)
            stored = replace(extra.tensor, spec=replace(extra.tensor.spec, shape=shape))
            result.carried.append(Carried(spec, (stored,)))
        else:
            raise UnsupportedError(
                extra.key,
                f"is no part of a delta, and the scheme {scheme.name!r} has no place for it",
                hint="leave it out with --drop, such as --drop "
                f"'{re.escape(extra.key.rpartition('.')[0] or extra.key)}'",
            )
    return result


def _token_key(extra: Extra, scheme: KeyScheme) -> str | None:
    """Return the name of a trained token's embedding, where ``extra`` is one and has a place."""
    match = TOKEN.fullmatch(extra.name) or BUNDLE.fullmatch(extra.name)
    if match is None:
        return None
    if scheme.spelling is Spelling.POSITION:
        return f"<{match['token']}>"
    if scheme.spelling in (Spelling.FLAT, Spelling.NATIVE):
        is_kept = extra.name.startswith("bundle_emb.")
        return extra.name if is_kept else f"bundle_emb.{match['token']}.string_to_param.*"
    return None


def _tokens(extras: Extras) -> Iterator[str]:
    for item in extras.carried:
        if TOKEN.fullmatch(item.spec.name):
            yield item.spec.name


def _check_unique(
    specs: Sequence[TensorSpec], alphas: Sequence[Carried], carried: Sequence[Carried]
) -> None:
    names = Counter([*(s.name for s in specs), *(c.spec.name for c in (*alphas, *carried))])
    name, count = names.most_common(1)[0]
    if count > 1:
        raise UnsupportedError(name, "would be the name of two tensors")


def _config(
    adapter: Adapter,
    scheme: KeyScheme,
    sites: Sequence[OutputSite],
    parts: Sequence[Part],
    extras: Extras,
    multiplier: float | None,
) -> dict[str, Any] | None:
    if scheme.scale is ScaleRule.MULTIPLIER:
        assert multiplier is not None
        return mlx_config(adapter, parts, multiplier)
    if not scheme.has_config:
        return None
    components = {component_of(site.module)[0] for site in sites}
    alone = components.pop() if len(components) == 1 else None
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


def _files(
    adapter: Adapter, output: Path
) -> tuple[list[Sidecar], list[tuple[str, str]], list[str]]:
    sidecars, left, notes = carried_files([adapter])
    if output.suffix.lower() in (".safetensors", *PICKLE_SUFFIXES):
        left = [*left, *((s.name, "the output is a single file") for s in sidecars)]
        return [], left, notes
    return sidecars, left, notes


def _is_torch(output: Path, scheme: KeyScheme) -> bool:
    suffix = output.suffix.lower()
    if suffix in PICKLE_SUFFIXES:
        return True
    return suffix != ".safetensors" and scheme.written_suffix in PICKLE_SUFFIXES


def _weights_name(output: Path, scheme: KeyScheme) -> str:
    if output.suffix.lower() in (".safetensors", *PICKLE_SUFFIXES):
        return ""
    return scheme.weights_name or f"{output.name}{scheme.written_suffix}"


def _stamps(adapter: Adapter, wishes: Wishes) -> dict[Path, Any]:
    initial = wishes.initial
    more = {initial.weights: initial.stamp} if initial is not None else {}
    return {adapter.weights: adapter.stamp, **more}


def _notes(
    adapter: Adapter, scheme: KeyScheme, names: Mapping[str, Part], wishes: Wishes
) -> Iterator[str]:
    yield from adapter.notes
    missing = [s for s in adapter.sites if s.scaling.alpha is None and s.is_plain]
    if missing:
        some = "" if len(missing) == len(adapter.sites) else f" for {len(missing)} modules"
        yield f"alpha is not recorded{some}; the scale is taken as 1 (--alpha says otherwise)"
    zero = [s for s in adapter.sites if s.scaling.alpha == 0]
    if zero:
        yield (
            f"alpha is 0 in {len(zero)} modules, so that their delta is zero; trainers of kohya's "
            "kind may mean alpha = rank by it (--alpha says so)"
        )
    components = {component_of(part.module)[0] for part in names.values()}
    if scheme.name == "peft" and len(components) > 1:
        listed = ", ".join(sorted(c or "no component" for c in components))
        yield (
            f"holds modules of {listed}; PEFT loads it on a module that has all of them, or one "
            "of them alone with --component"
        )
    folded_alphas = any(isinstance(p.values.get(p.slots[1]), Scaled) for p in names.values())
    if scheme.name == "loralib" and (folded_alphas or adapter.config is not None):
        yield "loralib keeps its scale in the code: make the layers with lora_alpha = r"
    arguments = adapter.metadata.get("ss_network_args", "")
    if "split_qkv" in arguments:
        yield (
            "was trained with split_qkv and stored fused: by its alpha every loader applies a "
            "third or a quarter of the strength of training, and so does this conversion"
        )
    dtypes = {v.dtype for p in names.values() for v in p.values.values()}
    strange = {d for d in dtypes if d not in WEIGHT_DTYPES and DTYPES[d].is_float}
    if strange:
        yield f"has factors of {', '.join(sorted(strange))}; few loaders read them (--dtype)"
