"""From the spelling of a file to dotted module paths, and never by guessing.

Paths inside a pipeline begin with the component (``unet.down_blocks.0…``). Where a file does
not tell a path, the module keeps the spelling of the file and is listed as unresolved.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Final

from loratool.adapter.build import strip_wrappers
from loratool.adapter.model import Adapter, Kind, Site
from loratool.adapter.scheme import Embeddings, KeyScheme, Spelling, transposed
from loratool.adapter.slots import Slot
from loratool.files.spec import StoredTensor
from loratool.names.diffusion import FAMILIES, Family, family_named, family_of, unflatten
from loratool.names.diffusion.flattening import flatten
from loratool.names.embeddings import is_embedding
from loratool.names.pipelines import (
    COMFY_ENCODERS,
    KOHYA_ENCODERS,
    component_of,
    encoder_component,
    encoder_kinds,
    is_text_model,
    split_flat,
    split_native,
)
from loratool.names.positions import text_paths, unet_paths
from loratool.names.switched import expert_path

__all__ = ["MODULES_KEY", "is_fused", "other_names", "paths_of", "spell_out"]

MODULES_KEY: Final = "loratool_modules"
"""Metadata: flattened names and the paths that they stand for, where no vocabulary has them."""

BACKBONE_KINDS: Final = (
    "unet",
    "ldm-unet",
    "flux",
    "bfl-flux",
    "flux2",
    "bfl-flux2",
    "sd3",
    "mmdit-sd3",
    "wan",
    "native-wan",
    "qwen-image",
)
PROPORTIONS: Final = (
    (".linear1", True, {"flux": 7.0, "flux2": 9.0}),
    (".linear2", False, {"flux": 5.0, "flux2": 4.0}),
    ("_mlp.0", True, {"flux": 4.0, "flux2": 6.0}),
    ("_mlp.2", False, {"flux": 4.0, "flux2": 3.0}),
)
"""Native layers, whether outputs are counted in inputs or the other way, and the ratios."""
PIPELINES: Final = frozenset((Spelling.FLAT, Spelling.NATIVE, Spelling.PIPELINE))
BACKBONE_PARTS: Final = ("unet", "transformer", "")


@cache
def is_fused(family: str | None) -> bool:
    """Whether the original checkpoints of a family fuse what diffusers has apart.

    The paths of such a file stay native: one module there is several in diffusers.
    """
    if family is None:
        return False
    rows = family_named(family).rows
    return any(len(row.hub.modules) > 1 or row.hub.swapped for row in rows)


@dataclass(frozen=True)
class _Names:
    """Module to its paths: one where it is known, several where it is ambiguous, else none."""

    paths: Mapping[str, tuple[str, ...]]
    family: str | None = None


def spell_out(adapter: Adapter, scheme: KeyScheme, base: Collection[str] = ()) -> Adapter:
    """Return ``adapter`` with dotted module paths, as far as they can be told.

    Args:
        adapter: As it was opened.
        scheme: Its scheme.
        base: Module paths of the base, if it is at hand; they come before all vocabularies.
    """
    if scheme.is_transposed:
        experts = tuple(each for site in adapter.sites for each in _experts(site))
        adapter = replace(adapter, sites=experts)
    modules = tuple(dict.fromkeys(site.module for site in adapter.sites))
    match scheme.spelling:
        case Spelling.FLAT:
            names = _from_flat(modules, adapter.metadata, base)
        case Spelling.BARE_FLAT:
            names = _from_bare_flat(modules, adapter.metadata, base)
        case Spelling.NATIVE:
            names = _from_native(modules)
        case Spelling.PIPELINE:
            names = _from_pipeline(modules)
        case Spelling.POSITION:
            names = _from_positions(adapter.sites)
        case _:
            names = _Names({module: (module,) for module in modules}, _family_name(modules))
    if names.family is None:
        names = replace(names, family=_family_by_shape(adapter.sites, names.paths))
    clashes = _clashes(names.paths)
    sites = []
    unresolved = {}
    for site in adapter.sites:
        paths = names.paths[site.module]
        if len(paths) != 1 or paths[0] in clashes:
            unresolved[site.module] = paths
            sites.append(site)
            continue
        sites.append(_shaped(replace(site, module=paths[0]), scheme))
    return replace(adapter, sites=tuple(sites), unresolved=unresolved, family=names.family)


def _family_by_shape(sites: Sequence[Site], paths: Mapping[str, tuple[str, ...]]) -> str | None:
    """Return which of two models with the same native names has layers of these proportions.

    The feed-forward layers of Flux.1 have four times their width, those of Flux.2 three times,
    twice for the gate.
    """
    votes = set()
    for site in sites:
        found = paths.get(site.module, ())
        name = found[0] if len(found) == 1 else ""
        if component_of(name)[0] != "transformer" or not site.in_features:
            continue
        for ending, of_inputs, proportions in PROPORTIONS:
            if name.endswith(ending):
                pair = (site.out_features, site.in_features)
                large, small = pair if of_inputs else pair[::-1]
                ratio = large / small if small else 0
                votes |= {family for family, value in proportions.items() if value == ratio}
    return votes.pop() if len(votes) == 1 else None


def other_names(module: str, family: str | None) -> list[str]:
    """Return what a module of a pipeline's backbone is called in the other naming, if it is one."""
    component, local = component_of(module)
    families = [family_named(family)] if family else [f for f in FAMILIES if f.has(local)]
    found: dict[str, None] = {}
    for item in families if component is not None else ():
        native = item.to_native(local)
        if native is not None and len(native[1].modules) == 1 and not native[1].swapped:
            found[native[0]] = None
        hub = item.from_native(local)
        if hub is not None and len(hub.modules) == 1 and not hub.swapped:
            found[hub.modules[0]] = None
    return list(found)


def paths_of(names: Sequence[str], scheme: KeyScheme) -> Mapping[str, tuple[str, ...]]:
    """Return what flattened names may stand for, as far as vocabularies tell."""
    is_bare = scheme.spelling is Spelling.BARE_FLAT
    return (_from_bare_flat if is_bare else _from_flat)(names, {}, ()).paths


def _clashes(paths: Mapping[str, tuple[str, ...]]) -> set[str]:
    """Return paths that two names of the file would stand for."""
    seen: dict[str, int] = defaultdict(int)
    for found in paths.values():
        if len(found) == 1:
            seen[found[0]] += 1
    return {path for path, count in seen.items() if count > 1}


def _shaped(site: Site, scheme: KeyScheme) -> Site:
    """Return ``site`` with the factors of an embedding as such, and none with idle kernels."""
    if site.kind is Kind.LINEAR and is_embedding(site.module) and site.is_plain:
        return _embedded(site, scheme)
    if site.kind is Kind.CONV and scheme.spelling in PIPELINES and _is_attention(site.module):
        return _flattened(site)
    return site


def _experts(site: Site) -> list[Site]:
    """Return one site for each expert of a module that stacks their factors (mlx-lm)."""
    down, up = site.down, site.up
    if down is None or up is None or not len(down.spec.shape) == len(up.spec.shape) == 3:
        return [site]
    paths = [expert_path(site.module, index) for index in range(down.spec.shape[0])]
    if None in paths or up.spec.shape[0] != len(paths) or up.spec.shape[2] != down.spec.shape[1]:
        return [site]
    rank = down.spec.shape[1]
    scaling = site.scaling
    multiplier = scaling.multiplier
    alpha = scaling.alpha if multiplier is None else multiplier * rank
    return [
        replace(
            site,
            module=path or "",
            kind=Kind.LINEAR,
            slots={Slot.DOWN: _part(down, index), Slot.UP: _part(up, index)},
            scaling=replace(scaling, alpha=alpha, rank=rank),
        )
        for index, path in enumerate(paths)
    ]


def _part(stored: StoredTensor, index: int) -> StoredTensor:
    """Return one of the matrices that a tensor of three dimensions holds."""
    shape = stored.spec.shape[1:]
    size = stored.spec.nbytes // stored.spec.shape[0]
    return replace(
        stored, spec=replace(stored.spec, shape=shape), offset=stored.offset + index * size
    )


def _embedded(site: Site, scheme: KeyScheme) -> Site:
    slots = dict(site.slots)
    down, up = slots.pop(Slot.DOWN, None), slots.pop(Slot.UP, None)
    if down is None or up is None or scheme.embeddings in (Embeddings.SLOTS, Embeddings.NONE):
        return site
    if scheme.embeddings is Embeddings.WEIGHT:
        down, up = transposed(up), transposed(down)
    slots |= {Slot.EMBEDDING_DOWN: down, Slot.EMBEDDING_UP: up}
    return replace(site, slots=slots, kind=Kind.EMBEDDING)


def _is_attention(module: str) -> bool:
    leaf = module.rpartition(".")[2]
    return leaf in ("to_q", "to_k", "to_v", "q_proj", "k_proj", "v_proj") or module.endswith(
        (".to_out.0", ".ff.net.0.proj", ".ff.net.2")
    )


def _flattened(site: Site) -> Site:
    """Return a site on a linear layer whose factors are stored with kernels of 1 × 1."""
    slots = dict(site.slots)
    for slot in (Slot.DOWN, Slot.UP):
        stored = slots.get(slot)
        if stored is None or stored.strides is not None or set(stored.spec.shape[2:]) - {1}:
            return site
        slots[slot] = replace(stored, spec=replace(stored.spec, shape=stored.spec.shape[:2]))
    return replace(site, slots=slots, kind=Kind.LINEAR)


def _family_name(modules: Iterable[str], hint: str | None = None) -> str | None:
    backbone = [
        local
        for component, local in map(component_of, modules)
        if component is None or not component.startswith("text_encoder")
    ]
    found = family_of(backbone) if backbone else None
    return found.name if found is not None else hint


def _from_pipeline(modules: Sequence[str]) -> _Names:
    family = _family_name(modules)
    backbone = family_named(family).backbone if family else None
    paths = {}
    for module in modules:
        component, local = component_of(module)
        if component is None and is_text_model(local):
            component = "text_encoder"
        elif component is None:
            component = backbone
        local = strip_wrappers(local)
        paths[module] = (f"{component}.{local}" if component else local,)
    return _Names(paths, family)


def _from_native(modules: Sequence[str]) -> _Names:
    split = {module: split_native(module) for module in modules}
    backbone = [local for part, local in split.values() if part == "diffusion_model"]
    families = _fitting(backbone)
    encoders = {part for part, _ in split.values()} - {"diffusion_model", ""}
    name = _sole_name(backbone) or _family_of_encoders(encoders)
    paths = {}
    for module, (part, local) in split.items():
        if part == "diffusion_model":
            paths[module] = _hub_paths(local, families)
        else:
            component = encoder_component(part, name, COMFY_ENCODERS)
            paths[module] = (f"{component}.{local}",) if component else ()
    return _Names(paths, name)


def _family_of_encoders(encoders: Collection[str]) -> str | None:
    """Return the family that text encoders alone tell, by ComfyUI's names."""
    if "t5xxl" in encoders:
        return "sd3" if "clip_g" in encoders else "flux"
    return "sdxl" if "clip_g" in encoders else None


def _fitting(modules: Collection[str]) -> list[Family]:
    """Return every family that has all of ``modules``."""
    return [f for f in FAMILIES if modules and all(f.has(module) for module in modules)]


def _sole_name(modules: Collection[str]) -> str | None:
    found = family_of(modules) if modules else None
    return found.name if found else None


def _hub_paths(local: str, families: Sequence[Family]) -> tuple[str, ...]:
    """Return what a path of a backbone may be, with its component."""
    if not families:
        return (local,)
    return tuple(dict.fromkeys(_hub_path(local, family) for family in families))


def _hub_path(local: str, family: Family) -> str:
    """Return the path with its component; diffusers' own where that is the same module."""
    if not is_fused(family.name):
        fusion = family.from_native(local)
        if fusion is not None:
            return f"{family.backbone}.{fusion.modules[0]}"
    return f"{family.backbone}.{local}"


def _from_flat(
    modules: Sequence[str], metadata: Mapping[str, str], base: Collection[str]
) -> _Names:
    split = {module: split_flat(module) for module in modules}
    known = _recorded(metadata)
    backbone = {
        module: _candidates(flat, BACKBONE_KINDS)
        for module, (part, flat) in split.items()
        if module not in known and part in BACKBONE_PARTS
    }
    locals_ = [path for paths in backbone.values() for path in paths]
    families = _families_of(backbone)
    name = families[0].name if len(families) == 1 else _sole_name(locals_)
    name = name or _family_of_parts(part for part, _ in split.values())
    of_base = _by_flat(base)
    paths: dict[str, tuple[str, ...]] = {}
    for module, (part, flat) in split.items():
        if module in known:
            paths[module] = (known[module],)
        elif flat in of_base:
            paths[module] = tuple(_with_component(path, part, name) for path in of_base[flat])
        elif encoder_kinds(part):
            paths[module] = _encoder_paths(part, flat, name)
        elif backbone.get(module) and families:
            paths[module] = tuple(
                dict.fromkeys(
                    _hub_path(path, family)
                    for family in families
                    for path in backbone[module]
                    if family.has(path)
                )
            )
        else:
            paths[module] = () if part else _candidates(flat, ("language-model",))
    return _Names(paths, name)


def _families_of(backbone: Mapping[str, tuple[str, ...]]) -> list[Family]:
    """Return every family that has a path for all of the names that any family has."""
    named = [paths for paths in backbone.values() if paths]
    found = [f for f in FAMILIES if named and all(any(map(f.has, paths)) for paths in named)]
    if len(found) == 2 and all(family.name.startswith("sd3") for family in found):
        return found[:1]
    return found


def _encoder_paths(part: str, flat: str, family: str | None) -> tuple[str, ...]:
    found = _candidates(flat, encoder_kinds(part))
    if family == "flux" and part == "te2":  # OneTrainer's name of Flux's T5
        component: str | None = "text_encoder_2"
    else:
        component = encoder_component(part, family, KOHYA_ENCODERS)
    return tuple(f"{component}.{path}" for path in found) if component else ()


def _family_of_parts(parts: Iterable[str]) -> str | None:
    """Return the family that text encoders alone tell, by kohya's names."""
    found = set(parts)
    if "te3" in found:
        return "sd3" if "te2" in found else "flux"
    return "sdxl" if "te2" in found else None


def _with_component(path: str, part: str, family: str | None) -> str:
    """Return a path of the base with its component, where the base is only that component."""
    if component_of(path)[0] is not None or not part:
        return path
    if part.startswith("te"):
        component = encoder_component(part, family, KOHYA_ENCODERS)
    else:
        component = family_named(family).backbone if family else "unet"
    return f"{component}.{path}" if component else path


def _by_flat(base: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Return the base's paths by flattened path, with and without their component."""
    found: dict[str, dict[str, None]] = defaultdict(dict)
    for path in base:
        found[flatten(path)][path] = None
        component, local = component_of(path)
        if component is not None:
            found[flatten(local)][path] = None
    return {flat: tuple(paths) for flat, paths in found.items()}


def _from_bare_flat(
    modules: Sequence[str], metadata: Mapping[str, str], base: Collection[str]
) -> _Names:
    known = _recorded(metadata)
    of_base = _by_flat(base)
    paths: dict[str, tuple[str, ...]] = {}
    for module in modules:
        if module in known:
            paths[module] = (known[module],)
        elif module in of_base:
            paths[module] = of_base[module]
        else:
            paths[module] = _bare_candidates(module)
    return _Names(paths, _family_name(p for found in paths.values() for p in found))


def _bare_candidates(flat: str) -> tuple[str, ...]:
    for component in ("unet", "transformer", "text_encoder_2", "text_encoder_3", "text_encoder"):
        if flat.startswith(f"{component}_"):
            rest = flat.removeprefix(f"{component}_")
            is_text = component.startswith("text")
            kinds = ("clip", "t5") if is_text else BACKBONE_KINDS
            found = _candidates(rest, kinds)
            if found:
                return tuple(f"{component}.{path}" for path in found)
    return _candidates(flat, ("any",))


def _candidates(flat: str, kinds: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(path for kind in kinds for path in unflatten(flat, kind)))


def _recorded(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return what the metadata records about flattened names, where it can be true."""
    try:
        found = json.loads(metadata.get(MODULES_KEY, "{}"))
    except (ValueError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {
        name: path
        for name, path in found.items()
        if isinstance(path, str) and name.endswith(flatten(component_of(path)[1]))
    }


def _from_positions(sites: Sequence[Site]) -> _Names:
    groups: dict[str, dict[int, Site]] = defaultdict(dict)
    for site in sites:
        component, _, number = site.module.partition(":")
        groups[component][int(number)] = site
    paths: dict[str, tuple[str, ...]] = {}
    for component, numbered in groups.items():
        ordered = [numbered[number] for number in sorted(numbered)]
        is_whole = sorted(numbered) == list(range(len(numbered)))
        if not is_whole:
            found = None
        elif component == "unet":
            found = unet_paths([(site.out_features, site.in_features) for site in ordered])
        else:
            found = text_paths(len(ordered))
        for place, site in enumerate(ordered):
            paths[site.module] = (f"{component}.{found[place]}",) if found else ()
    return _Names(paths, "sd1" if "unet" in groups else None)
