"""Pipelines in one file: which prefix is which component, and what its modules are called there.

A single file has the backbone, and perhaps the text encoders and the autoencoder, one beside the
other. Each stands behind a prefix, with the names of the code that it was published with.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from loratool.base.config import ModelConfig
from loratool.base.layout import Fused, Headers, Layout
from loratool.names.family import Family
from loratool.names.open_clip import ATTENTION, OPEN_CLIP, PARAMETERS, PROJECTIONS, TEXT_PROJECTION
from loratool.names.paths import hub_path, plausible_families
from loratool.names.pipelines import ENCODERS

__all__ = ["BACKBONES", "Section", "SingleFile"]

BACKBONES: Final = ("model.diffusion_model.", "diffusion_model.", "pipe.dit.", "net.", "")
"""What may stand before the backbone's names, the longest first."""

BACKBONE: Final = "unet"
"""What a backbone of no family that is known is."""


@dataclass(frozen=True, slots=True)
class Section:
    """The tensors of one component.

    Attributes:
        prefix: What their names begin with.
        component: The component; empty for the backbone, whose family tells it.
        is_open_clip: Whether it is a text encoder in OpenCLIP's names.
    """

    prefix: str
    component: str = ""
    is_open_clip: bool = False

    def path(self, local: str) -> str:
        """Return the path that libraries have for a module inside it."""
        if self.is_open_clip and (fusion := OPEN_CLIP.from_native(local)) is not None:
            parts = fusion.modules
            local = parts[0] if len(parts) == 1 else parts[0].rpartition(".")[0]
        return f"{self.component}.{local}" if local else self.component


class SingleFile(Layout):
    """What the layouts of single files have in common.

    Attributes:
        usual: The families that come in such files, where names alone do not tell which it is.
    """

    usual: tuple[str, ...] = ()

    def sections(self, headers: Headers) -> Sequence[Section]:
        """Return the components beside the backbone that such files hold."""
        raise NotImplementedError

    def paths(self, headers: Headers) -> Mapping[str, str]:
        sections, family = _sorted(self, headers), _family(self, headers)
        found = {}
        for module, section in sections.items():
            local = module.removeprefix(section.prefix)
            if section.component:
                found[module] = section.path(local)
            else:
                found[module] = hub_path(local, family) if family else f"{BACKBONE}.{local}"
        return found

    def family(self, headers: Headers) -> str | None:
        found = _family(self, headers)
        return found.name if found is not None else None

    def parameters(self, headers: Headers) -> Mapping[str, str]:
        return {
            f"{section.prefix}{native}": f"{section.component}.{hub}"
            for section in self.sections(headers)
            if section.is_open_clip
            for native, hub in PARAMETERS.items()
        }

    def is_turned(self, path: str) -> bool:
        component, _, local = path.partition(".")
        return component in ENCODERS and local == TEXT_PROJECTION

    def components(self, headers: Headers) -> tuple[str, ...]:
        sections = _sorted(self, headers).values()
        others = {section.component for section in sections if section.component}
        family = _family(self, headers)
        backbone = family.backbone if family else BACKBONE
        has_backbone = any(not section.component for section in sections)
        return (*((backbone,) if has_backbone else ()), *sorted(others))

    def fused(self, module: str, config: ModelConfig) -> Fused | None:
        parent, _, leaf = module.rpartition(".")
        whole = module if leaf == ATTENTION else parent if leaf in PROJECTIONS else ""
        if not whole.endswith(f".{ATTENTION}") or whole.partition(".")[0] not in ENCODERS:
            return None
        return Fused(whole, tuple(f"{whole}.{each}" for each in PROJECTIONS))


def backbone_prefix(modules: Collection[str]) -> str:
    """Return what stands before the names of the backbone."""
    return next(p for p in BACKBONES if not p or any(m.startswith(p) for m in modules))


@lru_cache(maxsize=2)
def _sorted(layout: SingleFile, headers: Headers) -> Mapping[str, Section]:
    """Return the section of each module; that of the backbone's has no component."""
    sections = (*layout.sections(headers), Section(backbone_prefix(headers.modules)))
    found = {}
    for module in (*headers.modules, *headers.owners):
        mine = next((each for each in sections if module.startswith(each.prefix)), None)
        if mine is not None:
            found[module] = mine
    return found


@lru_cache(maxsize=2)
def _family(layout: SingleFile, headers: Headers) -> Family | None:
    """Return the family of the backbone."""
    sections = {module: _sorted(layout, headers).get(module) for module in headers.modules}
    known = {module: section for module, section in sections.items() if section is not None}
    encoders = {section.component for section in known.values()} & set(ENCODERS)
    backbone = [m.removeprefix(s.prefix) for m, s in known.items() if not s.component]
    families = plausible_families(backbone, encoders)
    fitting = [family for family in families if family.name in layout.usual]
    fitting = fitting or [f for f in families if set(f.encoders) == encoders]
    return next(iter(fitting or families), None)
