"""Find the layers that an adapter means, wrap each once, and put its factors there."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial, reduce
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from loratool.adapter.fields import number_in
from loratool.adapter.model import HEAD_LEAVES, Adapter, ExtraKind, Site
from loratool.adapter.problems import CONVERT_HINT, check_plain, check_sound
from loratool.adapter.scheme import Told
from loratool.adapter.slots import Slot
from loratool.base.config import ModelConfig
from loratool.base.modules import ModuleIndex
from loratool.errors import AdapterError, OptionError, UnsupportedError
from loratool.live.control import Live
from loratool.live.factors import Factors, NewAdapter, new_factors
from loratool.live.kinds import LayerKind, float_dtype, kind_of
from loratool.names.embeddings import is_embedding
from loratool.plan.factors import site_deltas
from loratool.plan.gpu import Arithmetic, read_tensor, torch_dtype
from loratool.schemes.opening import open_adapter

__all__ = ["attach"]

FUSED_PARENTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
"""Modules whose forward pass reads the weights of their layers instead of calling them."""
LISTED = 6
HEADS = frozenset((*HEAD_LEAVES, "score", "classifier", "qa_outputs", "predictions"))
"""What output heads, and what they are in, are called."""


def attach(
    model: nn.Module,
    adapter: str | PathLike[str] | Adapter | NewAdapter | None = None,
    name: str = "default",
    *,
    targets: str | Sequence[str] = (),
    train_embeddings: bool = False,
    train_norms: bool = False,
    train_head: bool = False,
    fan_in_fan_out: bool = False,
    fold_on_eval: bool = False,
    activate: bool = True,
    **settings: Any,
) -> Live:
    """Attach an adapter to a model, from a file or a new one, and return the model's control.

    The base is frozen and neither copied nor changed; each layer is wrapped once, however many
    adapters come.

    Args:
        model: Any module.
        adapter: File or folder of an adapter, or an opened one; or nothing, for a new one.
        name: What to call it; without dots.
        targets: For a new adapter: ``"all-linear"`` (heads left out), a regular expression for
            whole paths, or a list of paths and dotted suffixes.
        train_embeddings: Leave embeddings of the base trainable.
        train_norms: Leave norms of the base trainable.
        train_head: Leave the output head of the base trainable.
        fan_in_fan_out: Layers of an unknown class store their weight as ``(in, out)``.
        fold_on_eval: ``eval()`` folds the active adapters in, ``train()`` takes them out.
        activate: Make it the one active adapter.
        **settings: For a new adapter: the fields of :class:`~loratool.live.factors.NewAdapter`
            (``rank``, ``alpha``, ``dropout``, ``rank_stabilised``, ``initialisation``, …).

    Raises:
        OptionError: A target means no layer, or the name is taken.
        AdapterError: Some of the adapter's modules are not in the model, or do not fit.
        UnsupportedError: The adapter or a layer is of a kind that a live layer cannot be.

    Warns:
        UserWarning: Some of the layers that the targets of a new adapter mean are left out.
    """
    live = Live.of(model) or Live(model)
    _check_name(name, live)
    switches = (train_embeddings, train_norms, train_head)
    if live.names and any(switches):
        raise OptionError("train_…", "what stays trainable is said with the first adapter")
    is_new = adapter is None or isinstance(adapter, NewAdapter)
    if is_new:
        new = adapter if isinstance(adapter, NewAdapter) else _settings(settings)
        if isinstance(adapter, NewAdapter) and settings:
            raise OptionError("attach", f"{', '.join(settings)}: the adapter says all that already")
        found = _new(live, new, targets, fan_in_fan_out=fan_in_fan_out)
    else:
        if settings or targets:
            given = ", ".join([*settings, *(["targets"] if targets else [])])
            raise OptionError("attach", f"{given}: an adapter from a file brings its own")
        opened = (
            adapter
            if isinstance(adapter, Adapter)
            else open_adapter(_path(adapter), base=_told(model))
        )
        found = _from_file(live, opened, fan_in_fan_out=fan_in_fan_out)
    if "" in found:
        raise OptionError(
            "attach", "the model itself is the layer to wrap; put it into an nn.Sequential first"
        )
    live.freeze(partial(_stays, switches=switches))
    live.install(name, found)
    live.shared.fold_on_eval = fold_on_eval or live.shared.fold_on_eval
    if activate:
        live.activate(name)
    else:
        live.activate(dict(live.active))
    return live


def _check_name(name: str, live: Live) -> None:
    """Refuse names that modules cannot have.

    Raises:
        OptionError: It is one.
    """
    is_text = bool(name) and isinstance(name, str)
    if not is_text or "." in name or hasattr(nn.ModuleDict, name) or name in live.names:
        raise OptionError("name", f"{name!r} is no name, has a dot, is reserved, or is taken")


def _settings(settings: dict[str, Any]) -> NewAdapter:
    known = {field.name for field in fields(NewAdapter)}
    unknown = settings.keys() - known
    if unknown:
        words = f"{', '.join(sorted(unknown))}: not known; known are {', '.join(sorted(known))}"
        raise OptionError("attach", words)
    return NewAdapter(**settings)


def _told(model: nn.Module) -> Told:
    """Return what a model says of itself, as transformers' models do."""
    read = getattr(getattr(model, "config", None), "to_dict", None)
    raw = read() if callable(read) else None
    config = ModelConfig(raw if isinstance(raw, dict) else {})
    return Told(config=config.language, is_tied=config.is_tied)


def _path(adapter: object) -> str | PathLike[str]:
    if not isinstance(adapter, str | PathLike):
        raise OptionError("attach", f"{type(adapter).__name__} is neither a path nor an adapter")
    return adapter


def _is_head(path: str) -> bool:
    """Whether a path leads to or into an output head."""
    return any(part in HEADS for part in path.split("."))


def _stays(path: str, module: nn.Module, *, switches: tuple[bool, bool, bool]) -> bool:
    """Whether the parameters of a module of the base stay trainable."""
    embeddings, norms, head = switches
    return (
        (embeddings and (isinstance(module, nn.Embedding) or is_embedding(path)))
        or (norms and "norm" in type(module).__name__.lower())
        or (head and _is_head(path))
    )


Found = dict[str, tuple[LayerKind, Factors]]


def _new(
    live: Live, new: NewAdapter, targets: str | Sequence[str], *, fan_in_fan_out: bool
) -> Found:
    if not targets:
        raise OptionError("targets", 'say what to adapt, such as "all-linear" or ["q_proj"]')
    matches = _matcher(targets)
    found: Found = {}
    refused: list[UnsupportedError] = []
    idle = dict.fromkeys([] if isinstance(targets, str) else targets)
    for path, module in live.layers_and_modules():
        matched = matches(path, module)
        if not matched:
            continue
        try:
            kind = kind_of(module, path, fan_in_fan_out=fan_in_fan_out)
            if kind is None:
                continue
            _check_parent(live, path)
        except UnsupportedError as error:
            refused.append(error)
        else:
            found[path] = (kind, new_factors(new, kind, module, path))
        for target in matched:
            idle.pop(target, None)
    if not found and refused:
        raise refused[0]
    if not found or idle:
        raise OptionError("targets", f"{list(idle) or targets!r} means no layer of the model")
    if refused:
        first = f"{len(refused)} layer(s) left out: {refused[0]}"
        warnings.warn(first + (", …" if len(refused) > 1 else ""), stacklevel=3)
    return found


def _matcher(targets: str | Sequence[str]) -> Callable[[str, nn.Module], Sequence[str]]:
    """Return what tells which of the targets mean a layer."""
    if targets == "all-linear":
        return lambda path, module: (
            [targets]
            if (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D")
            and not _is_head(path)
            else []
        )
    if isinstance(targets, str):
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise OptionError("targets", f"{targets!r} is no regular expression: {error}") from None
        return lambda path, _: [targets] if pattern.fullmatch(path) else []
    return lambda path, _: [t for t in targets if path == t or path.endswith(f".{t}")]


def _check_parent(live: Live, path: str) -> None:
    """Refuse layers that their parent does not call.

    Raises:
        UnsupportedError: An adapter there would silently do nothing.
    """
    parent, _, leaf = path.rpartition(".")
    owner = live.model.get_submodule(parent) if parent else live.model
    if isinstance(owner, FUSED_PARENTS) and leaf in ("out_proj", "linear1", "linear2"):
        raise UnsupportedError(
            path,
            f"{type(owner).__name__} reads the weight of this layer instead of calling it, so "
            "that an adapter there would do nothing",
            hint="merge the adapter into the weights: loratool merge",
        )


def _from_file(live: Live, adapter: Adapter, *, fan_in_fan_out: bool) -> Found:
    _check(adapter)
    modules = dict(live.layers_and_modules())
    names = [f"{path}.weight" for path in modules]
    index = ModuleIndex(names)
    found: Found = {}
    missing: list[str] = []
    for site in adapter.sites:
        path = index.find(site.module, parameter="weight")
        if path is None or path not in modules:
            missing.append(site.module)
            continue
        flag = fan_in_fan_out or bool(adapter.field("fan_in_fan_out"))
        kind = kind_of(modules[path], path, fan_in_fan_out=flag)
        if kind is None:
            missing.append(site.module)
            continue
        _check_parent(live, path)
        found[path] = (kind, _factors(site, adapter, kind, modules[path], path))
    if missing:
        listed = ", ".join(missing[:LISTED]) + (", …" if len(missing) > LISTED else "")
        raise AdapterError(
            adapter.path, f"{len(missing)} of its modules are not in the model: {listed}"
        )
    return found


def _check(adapter: Adapter) -> None:
    """Refuse what a live layer does not compute.

    Raises:
        UnsupportedError: It would be computed wrongly or in part.
        AdapterError: The adapter is broken.
    """
    for site in adapter.sites:
        check_sound(site, adapter)
        is_bound = bool(site.variant.undetermined) and not site.variant.is_decomposed
        if site.parameters or site.nesting or is_bound:
            raise UnsupportedError(
                f"{adapter.path}: {site.label}",
                "adapts raw parameters, an attention's inner projection, or depends on the base "
                "otherwise than a live layer can",
                hint="merge it into the weights: loratool merge",
            )
        check_plain(site, adapter, is_named=False)
    config = adapter.config
    if config is not None and config.init.changes_base:
        raise UnsupportedError(adapter.path, config.init.refusal, hint=CONVERT_HINT)
    if config is not None and config.flag("alora_invocation_tokens"):
        raise UnsupportedError(adapter.path, "an aLoRA acts only after its invocation tokens")
    extras = [e for e in adapter.extras if e.kind not in (ExtraKind.STATE, ExtraKind.BASE_COPY)]
    if extras:
        listed = ", ".join(extra.name for extra in extras[:LISTED])
        raise UnsupportedError(
            adapter.path,
            f"also replaces {len(extras)} tensors, which live layers do not: {listed}",
            hint="merge it into the weights, or load those tensors yourself and use a copy "
            "without them (loratool rescale --scale 1 --skip …)",
        )


def _factors(
    site: Site, adapter: Adapter, kind: LayerKind, module: nn.Module, path: str
) -> Factors:
    weight = module.weight
    assert isinstance(weight, Tensor) and site.down is not None and site.up is not None
    arithmetic = Arithmetic(torch.float64, torch.device("cpu"))
    (delta,) = site_deltas(site, adapter, arithmetic)
    out, into = kind.sizes(weight)
    if (
        kind.kind is not site.kind
        or site.out_features != out
        or (delta.down.numel() != delta.rank * torch.Size(into).numel())
    ):
        raise AdapterError(
            f"{adapter.path}: {site.label}",
            f"has {site.kind.value} factors for {[site.out_features, delta.shape[1]]}; the model's "
            f"{path!r} is {kind.kind.value} of {[out, *into]}",
        )
    # As precise as the file: a fold is then what a merge of the file is.
    stored = (torch_dtype(tensor.spec.dtype) for tensor in (site.down, site.up))
    dtype = reduce(torch.promote_types, stored, float_dtype(weight))
    options: dict[str, Any] = {"dtype": dtype, "device": weight.device}
    ones = [1] * (len(into) - 1)
    magnitude = site.slots.get(Slot.MAGNITUDE)
    bias = site.slots.get(Slot.UP_BIAS)
    return Factors(
        delta.down.reshape(delta.rank, *into).to(**options),
        delta.up.reshape(out, delta.rank, *ones).to(**options),
        delta.scale,
        dropout=number_in(
            adapter.config.raw if adapter.config else {}, "lora_dropout", where=adapter.path
        ),
        magnitude=read_tensor(magnitude).flatten().to(**options) if magnitude else None,
        bias=read_tensor(bias).to(**options) if bias else None,
    )
