"""Dotted paths behind OneTrainer's names of components, where fused projections are apart."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from loratool.adapter.model import Site
from loratool.adapter.scheme import Context, Names
from loratool.adapter.slots import Slot
from loratool.errors import UnsupportedError
from loratool.names.families import claiming, family_named, unrefined
from loratool.names.family import Family
from loratool.names.omi import is_last_of, omi
from loratool.names.paths import having_most, is_native, with_several_encoders
from loratool.names.paths.component import EachAlone, text_path
from loratool.names.pipelines import BACKBONES, OMI_ENCODERS, SECOND, encoder_component

__all__ = ["OmiPaths"]

MODELS: Final = ("unet", "transformer")


@dataclass(frozen=True)
class OmiPaths(EachAlone):
    """``transformer.double_blocks.0.img_attn.qkv.0``, ``clip_l.text_model…``."""

    has_components: bool = True
    is_narrow: bool = True

    def name(self, module: str, component: str | None, local: str, context: Context) -> str:
        """Return the path behind OneTrainer's name of the component.

        Raises:
            UnsupportedError: It is in no component of a pipeline.
        """
        if component is None:
            raise UnsupportedError(
                module,
                f"is in no pipeline that is known, and the scheme {context.scheme!r} is for those",
                hint="write another scheme, such as with --to peft",
            )
        if component == SECOND:
            raise KeyError(component)
        if component in BACKBONES:
            return f"{'unet' if component in ('unet', 'prior') else 'transformer'}.{local}"
        return f"{OMI_ENCODERS.of(context.family)[component]}.{text_path(component, local)}"

    def spell(self, modules: Sequence[str], context: Context) -> list[str]:
        """Return what modules are called.

        Raises:
            UnsupportedError: One has no name, or OneTrainer would exchange its halves.
        """
        locals_ = [module.partition(".")[2] for module in modules]
        for module, local in zip(modules, locals_, strict=True):
            made = None
            if is_last_of(local, locals_) is not None and context.family is not None:
                made = self.own(family_named(context.family)).from_native(local)
            if made is not None and made.swapped != is_last_of(local, locals_):
                raise UnsupportedError(
                    module,
                    "is followed by no other block here, so that OneTrainer would take it for the "
                    "last one of the model and exchange its halves",
                    hint="write another scheme, such as with --to kohya",
                )
        return super().spell(modules, context)

    def own(self, family: Family) -> Family:
        """Return the family by OneTrainer's names, or with none but diffusers'."""
        return omi(family) or family.recut(())

    def unspell(
        self, sites: Sequence[Site], metadata: Mapping[str, str], base: Collection[str]
    ) -> Names:
        """Return what OneTrainer's names stand for."""
        return from_omi(sites, base)

    def writes_native(
        self, wish: str | None, families: Sequence[str], *, is_native: bool
    ) -> bool | None:
        """Return that it is so, unless somebody said otherwise."""
        return wish is None or wish == "native"


def from_omi(sites: Sequence[Site], base: Collection[str]) -> Names:
    """Return what OneTrainer's names stand for.

    Raises:
        UnsupportedError: Halves of a modulation are exchanged where no file of others has them so.
    """
    split = {site.module: site.module.partition(".")[::2] for site in sites}
    locals_ = tuple(dict.fromkeys(local for part, local in split.values() if part in MODELS))
    parts = {part for part, _ in split.values() if part not in MODELS}
    families = _families(locals_, has_more_encoders=len(parts) > 1)
    name = families[0].name if len(families) == 1 else OMI_ENCODERS.family(parts, families)
    families = [family for family in families if family.name == name] or families
    paths: dict[str, tuple[str, ...]] = {}
    known = set()
    for site in sites:
        part, local = split[site.module]
        if part in MODELS:
            found = _paths(site, local, families, locals_) or (f"{part}.{local}",)
            mine = [path for path in found if path in base or path.partition(".")[2] in base]
            paths[site.module] = tuple(mine or found)
            known |= {path.partition(".")[0] for path in paths[site.module]}
            continue
        component = encoder_component(part, name, OMI_ENCODERS)
        paths[site.module] = (f"{component}.{local}",) if component else ()
        known |= {component} if component else set()
    natives = [found[0].partition(".")[2] for found in paths.values() if found]
    return Names(paths, name, frozenset(known), any(map(is_native, natives)))


def _families(locals_: Sequence[str], *, has_more_encoders: bool) -> list[Family]:
    found = having_most(claiming(locals_), locals_, _has)
    if has_more_encoders:
        found = with_several_encoders(found)
    named = {omi(family) or family: family for family in found}
    return [named[family] for family in unrefined(list(named), locals_)]


def _has(family: Family, local: str) -> bool:
    own = omi(family)
    return family.has(local) or (own is not None and own.has(local))


def _paths(
    site: Site, local: str, families: Sequence[Family], others: Collection[str]
) -> tuple[str, ...]:
    """Return what a module of a backbone may be, with its component."""
    found = (
        f"{family.backbone}.{_path(site, local, family, others)}"
        for family in families
        if _has(family, local)
    )
    return tuple(dict.fromkeys(found))


def _path(site: Site, local: str, family: Family, others: Collection[str]) -> str:
    """Return diffusers' path of a module, or that of checkpoints with the same order of rows.

    Raises:
        UnsupportedError: The order is that of neither.
    """
    own = omi(family)
    made = own.from_native(local) if own is not None else None
    if made is None:
        return local
    module = made.modules[0]
    # OneTrainer exchanges the halves of B, and of nothing else.
    is_told = is_last_of(local, others) if family.name.startswith("sd3") else None
    is_swapped = (made.swapped if is_told is None else is_told) and Slot.UP in site.slots
    if not is_swapped:
        return module
    native = family.to_native(module)
    magnitude = site.slots.get(Slot.MAGNITUDE)
    has_others = magnitude is not None and magnitude.spec.shape[0] == site.out_features
    if not made.swapped or native is None or has_others:
        raise UnsupportedError(
            site.module,
            "has the halves of its B exchanged, as OneTrainer has them in the last block of a "
            f"file, and {'its magnitudes not' if has_others else 'this is not the last one'}",
            hint=f"leave it out with --skip '^{site.module}\\.'",
        )
    return native[0]
