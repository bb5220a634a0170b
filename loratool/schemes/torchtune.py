"""torchtune: its names, queries and keys with their rows in pairs; alpha is in the recipe."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from loratool.adapter.keys import KeyTable, Template
from loratool.adapter.model import Site
from loratool.adapter.part import Part
from loratool.adapter.scheme import Home, Scheme, Told, Written
from loratool.adapter.slots import Slot
from loratool.errors import AdapterError, UnsupportedError
from loratool.files.spec import StoredTensor
from loratool.names.gguf import architecture_of, attention_in_config, plain_path
from loratool.names.paths.torchtune import TorchtunePaths, is_paired
from loratool.schemes.parts.model import described
from loratool.schemes.parts.peft_config import PeftSettings
from loratool.schemes.parts.roles import Roles
from loratool.schemes.parts.scales import ConfiguredScale, FoldedScale
from loratool.schemes.parts.settings import Settings
from loratool.values.expr import Expr, Scaled

__all__ = ["CLAIM", "SCHEME"]

CLAIM: Final = {
    "keys": r"^(layers\.\d+\..+|output)\.lora_[ab]\.weight$",
    "weights": ("adapter_model.pt",),
}

PAIRED: Final = frozenset(("llama", "gemma", "gemma2"))
IN_ORDER: Final = frozenset(("qwen2", "qwen3", "phi3"))
"""llama.cpp's names of the kinds of model that torchtune has (Mistral is one of Llama's)."""
FUSED: Final = re.compile(r"(?P<block>.+\.layers\.\d+\.)(self_attn\.qkv_proj|mlp\.gate_up_proj)")


@dataclass(frozen=True)
class TorchtuneRoles(Roles):
    """Matrices, with the rows of queries and keys as torchtune pairs them.

    Attributes:
        paths: What is known of the model.
    """

    paths: TorchtunePaths = field(default_factory=TorchtunePaths)

    def read(self, site: Site) -> Site:
        """Return ``site`` with its rows as transformers has them.

        Raises:
            AdapterError: They are not those of such heads.
        """
        if not self._moves(site.module, site.spelled):
            return site
        heads = self._heads(site.module)
        slots = dict(site.slots)
        for slot in (Slot.UP, Slot.MAGNITUDE):
            if slot in slots:
                slots[slot] = _unpaired(slots[slot], heads, site.label)
        return replace(site, slots=slots)

    def cut(self, parts: Sequence[Part]) -> list[Part]:
        """Return ``parts`` with Phi-3's projections apart."""
        made: list[Part] = []
        for part in parts:
            match = FUSED.fullmatch(plain_path(part.module))
            made += self._apart(part, match["block"]) if match else [part]
        return made

    def _apart(self, part: Part, block: str) -> Iterator[Part]:
        if not part.is_plain:
            raise UnsupportedError(
                part.module,
                f"is {part.variant.words or 'no matrix'}, and is in parts in torchtune",
                hint="merge the adapter into its base instead",
            )
        attention = self.paths.attention
        names: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
        shares: tuple[int, ...] = (1, 1)
        if part.module.endswith("qkv_proj"):
            heads = attention.at(None) if attention is not None else None
            names = tuple(f"self_attn.{side}_proj" for side in "qkv")
            shares = (heads.query, heads.key, heads.key) if heads is not None else (1, 1, 1)
        whole = part.up.shape[0]
        if whole % sum(shares):
            raise AdapterError(part.module, f"has {whole} rows, which {sum(shares)} do not divide")
        first = 0
        for name, share in zip(names, shares, strict=True):
            last = first + whole // sum(shares) * share
            up = part.up.rows(first, last)
            made = part.factored(part.down, up, alpha=part.alpha, note="cut as torchtune has it")
            yield replace(made, module=f"{block}{name}")
            first = last

    def stored(self, part: Part) -> Part:
        """Return ``part`` with its rows as torchtune has them.

        Raises:
            NoPlaceError: One of its tensors is not stored.
        """
        made = super().stored(part)
        if not self._moves(part.module, ""):
            return made
        heads = self._heads(part.module)
        values = dict(made.values)
        for slot in (Slot.UP, Slot.MAGNITUDE):
            if slot in values:
                values[slot] = _paired(values[slot], heads, part.label)
        return replace(made, values=values)

    def _moves(self, module: str, spelled: str) -> bool:
        is_known = self.paths.permutes is True and self.paths.attention is not None
        return is_known and is_paired(module) and SCHEME.keys.parse(f"{module}{DOWN}") is None

    def _heads(self, module: str) -> int:
        attention = self.paths.attention
        heads = attention.at(None) if attention is not None else None
        if heads is None:
            raise UnsupportedError(module, "is in a model whose layers have heads of their own")
        return heads.query if module.endswith("q_proj") else heads.key


def _unpaired(stored: StoredTensor, heads: int, where: str) -> StoredTensor:
    rows = stored.spec.shape[0]
    found = stored.exchanging((heads, rows // heads // 2, 2)) if rows >= 2 * heads else None
    if found is None:
        raise _misfit(where, rows, heads)
    return found


def _paired(value: Expr, heads: int, where: str) -> Expr:
    rows = value.shape[0]
    if rows % (2 * heads):
        raise _misfit(where, rows, heads)
    return value.exchanged((heads, 2, rows // heads // 2))


def _misfit(where: str, rows: int, heads: int) -> AdapterError:
    return AdapterError(
        where,
        f"has {rows} rows, which are no pairs of {heads} heads",
        hint="is this the base that it was trained on?",
    )


class RecipeSettings(Settings):
    """Nothing is recorded: the scale is in the recipe."""

    def notes(self, written: Written) -> Iterator[str]:
        """Yield what the recipe has to say, where the input said it."""
        parts = [item.part for item in written.modules]
        is_folded = any(isinstance(part.values.get(part.slots[1]), Scaled) for part in parts)
        if is_folded or written.config is not None:
            yield "torchtune keeps its scale in the recipe: set lora_alpha to lora_rank there"


def _following(told: Told) -> Scheme:
    """Return the scheme for the kind of one model, and its heads."""
    config = described(told)
    architecture = architecture_of(config)
    name = architecture.name if architecture is not None else ""
    permutes = True if name in PAIRED else False if name in IN_ORDER else None
    paths = TorchtunePaths(attention=attention_in_config(config), permutes=permutes)
    return replace(SCHEME, paths=paths, roles=TorchtuneRoles(has_convolutions=False, paths=paths))


DOWN: Final = ".lora_a.weight"

SCHEME = Scheme(
    name="torchtune",
    summary="torchtune: its names and order of rows; alpha is in the recipe",
    example="layers.0.attn.q_proj.lora_a.weight",
    keys=KeyTable(
        modules=r"layers\.\d+\.(attn\.\w+_proj|mlp\.(.+\.)?w[123])|output",
        templates=(
            Template("{module}" + DOWN, Slot.DOWN),
            Template("{module}.lora_b.weight", Slot.UP),
            Template("{module}.magnitude", Slot.MAGNITUDE),
        ),
    ),
    paths=TorchtunePaths(),
    scale=FoldedScale(),
    roles=TorchtuneRoles(has_convolutions=False),
    settings=RecipeSettings(),
    home=Home(weights_name="adapter_model.pt", suffix=".pt"),
    beside={"config": (ConfiguredScale(), PeftSettings())},
    follows=_following,
)
