"""Open an adapter: find its files, detect its scheme, sort its tensors. Headers only."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from loratool.adapter.build import adapter_names, build_sites
from loratool.adapter.config import CONFIG_NAME, LoraConfig, parse_config
from loratool.adapter.model import HISTORY_KEY, Adapter, Site
from loratool.adapter.recognise import PEFT_TYPES, describe_keys
from loratool.adapter.scaling import Scaling
from loratool.adapter.scheme import KeyScheme, ScaleRule, are_transposed
from loratool.adapter.slots import Slot
from loratool.adapter.variant import Choice
from loratool.errors import AdapterError, OptionError, UnsupportedError
from loratool.files.container import WeightsFile
from loratool.files.containers import is_weights, model_suffixes, open_weights
from loratool.files.json import read_json_object
from loratool.files.spec import StoredTensor

__all__ = ["detect_scheme", "find_weights", "is_mlx_config", "open_adapter_file", "usual_names"]

USUAL_STEMS: Final = ("adapter_model", "pytorch_lora_weights", "adapters")


def open_adapter_file(
    path: Path,
    schemes: Sequence[KeyScheme],
    choose: Choice,
    *,
    types: Collection[str],
    adapter_name: str | None = None,
    alpha: float | None = None,
    skip: Sequence[str] = (),
    enabled: Sequence[bool] = (),
) -> Adapter:
    """Open the adapter at ``path``, a weights file or the folder that holds it.

    Args:
        path: File or folder.
        schemes: The key schemes to try.
        choose: Tells variants apart.
        types: The values of ``peft_type`` that are read.
        adapter_name: Which of several adapters in the folder or in the file.
        alpha: Alpha for all sites where the file and its sidecars record none.
        skip: Regular expressions; keys that match anywhere are left out.
        enabled: Which parts of merged projections stacked factors are for (``enable_lora``),
            where no configuration says so.

    Raises:
        FileFormatError: A file breaks the rules of its format.
        AdapterError: There is no adapter, or it contradicts itself.
        UnsupportedError: It is of a kind that has no delta or is not read yet.
    """
    if alpha is not None and not math.isfinite(alpha):
        raise OptionError("--alpha", f"{alpha} is no finite number")
    weights, notes = find_weights(path, adapter_name)
    config_path = weights.parent / CONFIG_NAME
    raw = read_json_object(config_path) if config_path.is_file() else None
    is_foreign = raw is not None and is_mlx_config(raw)
    config = None
    if raw is not None and not is_foreign:
        config = parse_config(raw, where=config_path)
        _check_type(config, types, config_path)
    file = open_weights(weights)
    scheme = detect_scheme(file, schemes)
    tensors, name, more = _select(file, scheme, adapter_name, weights)
    skipped = _skipped(tensors, skip)
    tensors = {key: tensor for key, tensor in tensors.items() if key not in skipped}
    parts = build_sites(tensors, scheme, config, choose, _enabled(config, enabled))
    sites = parts.sites
    if is_foreign and raw is not None and scheme.scale is ScaleRule.MULTIPLIER:
        sites = _multiplied(sites, raw, config_path)
    settings = scheme.settings(file.metadata)
    if settings is not None:
        configs = _component_configs(settings, sites)
        sites = tuple(_configured(site, configs) for site in sites)
    if alpha is not None:
        sites = tuple(_with_alpha(site, alpha) for site in sites)
    return Adapter(
        path=path,
        weights=weights,
        scheme=scheme.name,
        sites=sites,
        extras=parts.extras,
        config=config,
        metadata=file.metadata,
        tensors=tensors,
        stamp=file.stamp,
        name=name,
        skipped=tuple(skipped),
        notes=(*notes, *parts.notes, *more, *file.notes),
        sidecar=raw if is_foreign else None,
    )


def is_mlx_config(raw: Mapping[str, Any]) -> bool:
    """Whether an ``adapter_config.json`` is mlx-lm's, not PEFT's."""
    return raw.get("peft_type") is None and ("fine_tune_type" in raw or "lora_parameters" in raw)


def _multiplied(sites: tuple[Site, ...], raw: Mapping[str, Any], path: Path) -> tuple[Site, ...]:
    """Return ``sites`` with mlx-lm's scale, which is the multiplier itself."""
    parameters = raw.get("lora_parameters")
    if parameters is None:
        return sites
    if not isinstance(parameters, dict):
        raise AdapterError(path, f"lora_parameters is {parameters!r:.40}, expected an object")
    scale = parameters.get("scale")
    if scale is None:
        return sites
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
        raise AdapterError(path, f"lora_parameters.scale is {scale!r:.40}, expected a number")
    return tuple(
        replace(
            site,
            scaling=Scaling(scale * site.rank, site.rank, multiplier=float(scale)),
        )
        for site in sites
    )


def _component_configs(
    settings: Mapping[str, Any], sites: Iterable[Site]
) -> Mapping[str, LoraConfig]:
    """Return what the metadata says about each component that has sites.

    Raises:
        AdapterError: A field that matters holds something impossible.
        UnsupportedError: The delta is relative to a base that the initialisation changed.
    """
    components = dict.fromkeys(site.module.partition(".")[0] for site in sites)
    configs = {
        name: parse_config(settings[name], where=f"metadata: {name}")
        for name in components
        if name in settings
    }
    for name, config in configs.items():
        if config.init.changes_base:
            raise UnsupportedError(f"metadata: {name}", config.init.refusal)
    return configs


def _configured(site: Site, configs: Mapping[str, LoraConfig]) -> Site:
    """Return ``site`` with what the metadata says about its component's ranks and alphas."""
    component, _, local = site.module.partition(".")
    config = configs.get(component)
    if config is None or Slot.ALPHA in site.slots or site.scaling.alpha is not None:
        return site
    return replace(site, scaling=config.scaling_for(local, site.rank))


def _with_alpha(site: Site, alpha: float) -> Site:
    """Return ``site`` with ``alpha`` where it records none, or 0, which trainers read as none."""
    own = site.scaling.alpha
    is_missing = own is None or (own == 0 and Slot.ALPHA in site.slots)
    if not is_missing or not site.variant.is_scaled:
        return site
    return replace(site, scaling=Scaling(alpha, site.scaling.rank or site.rank))


def _enabled(config: LoraConfig | None, given: Sequence[bool]) -> tuple[bool, ...]:
    if given:
        return tuple(given)
    stacked = config.raw.get("enable_lora") if config is not None else None
    if isinstance(stacked, list) and any(stacked):
        return tuple(bool(item) for item in stacked)
    return ()


def usual_names() -> Iterator[str]:
    """Yield what a weights file in a folder may be called, the first ones first."""
    yield from (f"{stem}{suffix}" for stem in USUAL_STEMS for suffix in model_suffixes())


def find_weights(path: Path, adapter_name: str | None = None) -> tuple[Path, tuple[str, ...]]:
    """Return the weights file that ``path`` means, and what was found beside it."""
    if not path.exists():
        raise AdapterError(path, "no such file or folder")
    if not path.is_file() and not path.is_dir():
        raise AdapterError(path, "neither a file nor a folder")
    if path.is_file():
        if path.name == CONFIG_NAME:
            return find_weights(path.parent, adapter_name)
        return path, ()
    if adapter_name and "/" not in adapter_name and (path / adapter_name / CONFIG_NAME).is_file():
        return find_weights(path / adapter_name)
    others = sorted(config.parent.name for config in path.glob(f"*/{CONFIG_NAME}"))
    found = [path / name for name in usual_names() if (path / name).is_file()]
    if not found:
        found = sorted(file for file in path.iterdir() if is_weights(file) and file.is_file())
        if len(found) > 1:
            names = ", ".join(file.name for file in found[:6])
            raise AdapterError(path, f"several weights files: {names}", hint="name one of them")
    if not found:
        what = "holds no adapter: expected adapter_model.safetensors or adapter_model.bin"
        if others:
            raise AdapterError(
                path,
                f"holds several adapters, each in a folder: {', '.join(others)}",
                hint=f"name one, such as {path / others[0]}",
            )
        raise AdapterError(path, what)
    notes = []
    if len(found) > 1:
        notes.append(f"{found[1].name} lies beside {found[0].name} and was not read")
    if others:
        notes.append(f"more adapters in sub-folders, not read: {', '.join(others)}")
    return found[0], tuple(notes)


def detect_scheme(file: WeightsFile, schemes: Sequence[KeyScheme]) -> KeyScheme:
    """Return the scheme that recognises most factors in ``file``.

    Raises:
        AdapterError: None recognises any; the message shows what the keys look like.
    """
    if len(schemes) == 1:
        if schemes[0].factor_keys(file.tensors):
            return schemes[0]  # as somebody said
        raise AdapterError(
            file.path,
            f"none of its {len(file.tensors)} keys is a factor in the scheme {schemes[0].name!r}",
            hint="leave --from out, and the scheme is detected",
        )
    scores = [(scheme.recognise(file.tensors), scheme.priority, scheme) for scheme in schemes]
    best, _, scheme = max(scores, key=lambda item: item[:2], default=(0, 0, None))
    if scheme is None or best == 0:
        raise AdapterError(file.path, f"no known scheme: {describe_keys(list(file.tensors))}")
    return _settled(file, scheme, schemes)


def _settled(file: WeightsFile, scheme: KeyScheme, schemes: Sequence[KeyScheme]) -> KeyScheme:
    """Return ``scheme``, or the one of the same keys and turned factors that the file names.

    Raises:
        AdapterError: The factors fit both, and the file does not say which it is.
    """
    pairs = scheme.pairs(file.tensors)
    rivals = {
        other.name: other
        for other in schemes
        if other.templates == scheme.templates
        and (other is scheme or other.is_transposed != scheme.is_transposed)
    }
    if len(rivals) == 1 or not pairs or are_transposed(pairs) is not None:
        return scheme
    said = _written_as(file.metadata)
    if said in rivals:
        return rivals[said]
    names = sorted(rivals)
    raise AdapterError(
        file.path,
        f"may be {' or '.join(map(repr, names))}: its factors fit both ways round, and the keys "
        "are the same",
        hint=f"say which: loratool convert ADAPTER --from {names[0]} --to peft -o OUT (or --from "
        f"{' or '.join(names[1:])})",
    )


def _written_as(metadata: Mapping[str, str]) -> str | None:
    """Return the scheme that loratool's own history says the file was written in."""
    try:
        said = json.loads(metadata.get(HISTORY_KEY, "{}"))["options"]["to"]
    except (ValueError, RecursionError, KeyError, TypeError):
        return None
    return said if isinstance(said, str) else None


def _check_type(config: LoraConfig, types: Collection[str], path: Path) -> None:
    if config.peft_type in types:
        return
    words = PEFT_TYPES.get(config.peft_type, "a PEFT type that is not read yet")
    raise UnsupportedError(
        path,
        f"peft_type is {config.peft_type}: {words}",
        hint="if it has a merge of its own, do that with peft and save the model",
    )


def _skipped(keys: Iterable[str], skip: Sequence[str]) -> list[str]:
    try:
        patterns = [re.compile(text) for text in skip]
    except re.error as error:
        raise AdapterError("--skip", f"not a regular expression: {error}") from None
    return [key for key in keys if any(pattern.search(key) for pattern in patterns)]


def _select(
    file: WeightsFile, scheme: KeyScheme, adapter_name: str | None, where: Path
) -> tuple[Mapping[str, StoredTensor], str | None, tuple[str, ...]]:
    """Return the tensors of one adapter, where a file holds several."""
    parsed = {key: scheme.parse(key) for key in file.tensors}
    names = adapter_names(parsed)
    if not names:
        return file.tensors, None, ()
    if adapter_name is not None and adapter_name not in names:
        raise AdapterError(where, f"no adapter {adapter_name!r}: it holds {', '.join(names)}")
    if adapter_name is None and len(names) > 1:
        raise AdapterError(
            where,
            f"holds several adapters: {', '.join(names)}",
            hint="choose one with --adapter-name",
        )
    name = adapter_name or names[0]
    tensors = {
        key: file.tensors[key]
        for key, meaning in parsed.items()
        if meaning is None or meaning.adapter in (None, name)
    }
    left = len(file.tensors) - len(tensors)
    notes = (f"{left} tensors of other adapters in the file were not read",) if left else ()
    return tensors, name, notes
