"""Whether adapters can be for one model, by what their modules are called."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

from loratool.adapter.model import Adapter
from loratool.errors import UnsupportedError
from loratool.names.canonical import canonical_path
from loratool.names.families import family_named
from loratool.names.paths import families_of_modules
from loratool.names.pipelines import component_of
from loratool.names.spellings import spellings_of
from loratool.names.vocabulary import is_number

__all__ = ["check_one_model"]


def check_one_model(adapters: Sequence[Adapter], *, has_base: bool = False) -> None:
    """Refuse adapters that are for different models.

    Two adapters without a module in common may still be for one: of its U-Net and of its text
    encoder, or of different layers. They are not where their backbones are of different families,
    whatever their text encoders and single layers are called, or where both say what their base
    is, and it is called and built otherwise.

    Args:
        adapters: The adapters.
        has_base: Whether there is a base, which tells what is a language model of a pipeline.

    Raises:
        UnsupportedError: Two of them are.
    """
    for one, other in combinations(map(_Kin, adapters), 2):
        is_told = not has_base or (one.families and other.families)
        if not (is_told and one.differs_from(other)):
            continue
        has_common = bool(one.names & other.names)
        if has_common and not (one.families and other.families):
            continue
        paths = f"{one.adapter.path} and {other.adapter.path}"
        more = "" if has_common else ", and have no module in common"
        raise UnsupportedError(
            paths,
            f"are for different models ({one.words}; {other.words}){more}",
            hint="take adapters of one model at a time",
        )


@dataclass(frozen=True)
class _Kin:
    """What an adapter tells of the model that it is for."""

    adapter: Adapter

    def differs_from(self, other: _Kin) -> bool:
        """Whether the two are for different models, as far as they tell."""
        if self.families and other.families:
            return not self.families & other.families
        if self.roots and other.roots:
            return self._is_called_otherwise(other) and not self.roots & other.roots
        return bool((self.families and other.roots) or (self.roots and other.families))

    def _is_called_otherwise(self, other: _Kin) -> bool:
        return bool(self.base and other.base) and self.base != other.base

    @cached_property
    def families(self) -> frozenset[str]:
        """The families that its backbone may be of, by the one that they refine; maybe none."""
        modules = [m for m in self._modules if not _is_of_encoder(component_of(m, self._known)[0])]
        found = families_of_modules(modules)
        named = self.adapter.family
        if found and named is not None:
            found = [family_named(named)]
        return frozenset(family.refines or family.name for family in found)

    @cached_property
    def roots(self) -> frozenset[str]:
        """Where the blocks of a language model hang, if it is of one; wrappers do not count."""
        if self.families or any(component_of(m, self._known)[0] for m in self._modules):
            return frozenset()
        words = (canonical_path(module).split(".") for module in self._modules)
        ends = ((each, next((i for i, w in enumerate(each) if is_number(w)), 0)) for each in words)
        return frozenset(".".join(each[:end]) for each, end in ends if end)

    @cached_property
    def base(self) -> str:
        """What its base is called, without its owner or folder."""
        return (self.adapter.base_model or "").rstrip("/").rpartition("/")[2].lower()

    @cached_property
    def names(self) -> frozenset[str]:
        """Everything that its modules are called."""
        spelled = (spellings_of(site, self.adapter) for site in self.adapter.sites)
        return frozenset(name for each in spelled for name in (*each.names, *_all(each.parts)))

    @property
    def words(self) -> str:
        """What model that is."""
        if self.families:
            return " or ".join(sorted(self.families))
        return self.base or f"a language model with {min(self.roots)!r}"

    @property
    def _known(self) -> frozenset[str]:
        return self.adapter.components

    @cached_property
    def _modules(self) -> list[str]:
        unresolved = self.adapter.unresolved
        return [path for s in self.adapter.sites for path in unresolved.get(s.module, (s.module,))]


def _is_of_encoder(component: str | None) -> bool:
    return component is not None and component.startswith("text_encoder")


def _all(parts: Sequence[Sequence[str]]) -> Iterator[str]:
    return (name for part in parts for name in part)
