"""llama.cpp: ``.gguf`` with the tensors' own names, the rows in its order, one alpha for all."""

from __future__ import annotations

import json
import re
import struct
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from loratool.adapter.keys import KeyTable, Template, transposed
from loratool.adapter.model import FILE_ALPHA_KEY, INVOCATION_KEY, Kind, Site
from loratool.adapter.part import Part
from loratool.adapter.scaling import Scaling
from loratool.adapter.scheme import Home, Scheme, Told, Written
from loratool.adapter.slots import Slot
from loratool.errors import AdapterError, UnsupportedError
from loratool.files.spec import StoredTensor
from loratool.names.gguf import (
    Architecture,
    Attention,
    Held,
    architecture_named,
    architecture_of,
    attention_in_config,
    attention_in_values,
)
from loratool.names.paths.gguf import GgufPaths, is_tensor, tensor_of
from loratool.schemes.parts.roles import Roles
from loratool.schemes.parts.settings import Settings
from loratool.schemes.parts.stacks import one_of_stack, stacked
from loratool.values.expr import Expr, Taken, is_power_of_two

__all__ = ["CLAIM", "SCHEME"]

CLAIM: Final = {"keys": r"^(blk\.\d+\.\w+|token_embd|output|position_embd)\.weight\.lora_[ab]$"}

ARCHITECTURE: Final = "general.architecture"
BASE_KEY: Final = "general.base_model"
HUB: Final = "https://huggingface.co/"
MOST_EXPERTS: Final = 4096
TABLE: Final = "token_embd"
EXPERTS: Final = re.compile(r"blk\.\d+\.ffn_(gate|up|down)_exps")


@dataclass(frozen=True, slots=True)
class TurnedTable:
    """As A turned, ``(vocabulary, r)``, and B, ``(dim, r)``, under the names of a linear layer's.

    Files are turned as they are read, for their keys tell which is which.
    """

    def stored(self, down: Expr, up: Expr) -> dict[Slot, Expr]:
        """Return A turned, and B."""
        return {Slot.DOWN: down.turned(), Slot.UP: up}

    def read(self, down: StoredTensor, up: StoredTensor) -> Mapping[Slot, StoredTensor]:
        """Return both in the slots of embeddings."""
        return {Slot.EMBEDDING_DOWN: down, Slot.EMBEDDING_UP: up}


@dataclass(frozen=True)
class GgufRoles(Roles):
    """Matrices, with the rows of B as llama.cpp has them, and experts in one tensor.

    Attributes:
        paths: Which tensors modules are.
    """

    paths: GgufPaths = field(default_factory=GgufPaths)

    def view(self, slot: Slot, tensor: StoredTensor) -> StoredTensor:
        """Return a stored tensor; A of the embedding turned.

        Raises:
            UnsupportedError: It cannot be, for it is in blocks.
        """
        is_table = tensor.spec.name.startswith(f"{TABLE}.") and slot is Slot.DOWN
        return transposed(tensor) if is_table and len(tensor.spec.shape) == 2 else tensor

    def apart(self, site: Site) -> list[Site]:
        """Return one site for each expert of a stack."""
        down, up = site.slots.get(Slot.DOWN), site.slots.get(Slot.UP)
        if down is None or up is None or not EXPERTS.fullmatch(site.module):
            return [site]
        shapes = down.spec.shape, up.spec.shape
        if any(len(shape) != 3 or 0 in shape for shape in shapes):
            return [site]
        if shapes[0][0] != shapes[1][0] or shapes[0][0] > MOST_EXPERTS:
            return [site]
        return [one_of_stack(site, f"{site.module}.{n}", n) for n in range(shapes[0][0])]

    def read(self, site: Site) -> Site:
        """Return ``site`` with the rows of B as transformers has them."""
        up = site.slots.get(Slot.UP)
        held = self._held(site)
        is_matrix = up is not None and len(up.spec.shape) == 2
        if up is not None and is_matrix and held is not None and not held.is_same:
            rows = held.rows(self.paths.attention).of_tensor(up.spec.shape[0], site.label)
            axes = rows.swapped
            found = up.exchanging((axes[0], axes[2], axes[1])) if axes is not None else None
            if not rows.is_same and found is None:
                raise UnsupportedError(site.label, "has rows in an order that is not read")
            site = replace(site, slots={**site.slots, Slot.UP: found or up})
        return super().read(site)

    def _held(self, site: Site) -> Held | None:
        """Return what the tensor of a site has of its module."""
        if not site.spelled or is_tensor(site.module) or self.paths.architecture is None:
            return None
        tensor = tensor_of(site.spelled)
        found = self.paths.architecture.held(site.module)
        return next((held for held in found if held.tensor == tensor), None)

    def together(self, parts: Sequence[Part]) -> list[Part]:
        """Return ``parts`` as llama.cpp has them: projections cut, experts of a layer as one.

        Raises:
            UnsupportedError: An expert is missing, or has another rank than the rest.
        """
        stacks: dict[str, dict[int, Part]] = defaultdict(dict)
        made: list[Part] = []
        for part in parts:
            expert = EXPERT_OF.fullmatch(part.module)
            held = () if is_tensor(part.module) else self._tensors(part.module)
            if expert is not None:
                stacks[expert["tensor"]][int(expert["expert"])] = part
            elif len(held) == 1 and held[0].expert is not None:
                stacks[held[0].tensor][held[0].expert] = part
            elif len(held) > 1:
                made += [self._cut(part, one) for one in held]
            else:
                made.append(part)
        return [*made, *(stacked(name, members) for name, members in stacks.items())]

    def _tensors(self, module: str) -> tuple[Held, ...]:
        architecture = self.paths.architecture
        return architecture.held(module) if architecture is not None else ()

    def _cut(self, part: Part, held: Held) -> Part:
        """Return the part of a fused projection that has a tensor of its own."""
        if not part.is_plain or len(part.up.shape) != 2:
            raise UnsupportedError(
                part.module,
                f"is {part.variant.words or 'no matrix'}, and is cut in llama.cpp",
                hint="merge the adapter into its base instead",
            )
        rows = held.rows(self.paths.attention).of_module(part.up.shape[0], part.module)
        up = Taken(part.up, tuple(rows.indices().tolist()))
        made = part.factored(part.down, up, alpha=part.alpha, note="cut as llama.cpp has it")
        return replace(made, module=held.tensor)

    def stored(self, part: Part) -> Part:
        """Return ``part`` with the rows of B in the order of the file.

        Raises:
            NoPlaceError: One of its tensors is not stored.
        """
        made = super().stored(part)
        if is_tensor(part.module) or not part.is_plain or part.kind is not Kind.LINEAR:
            return made
        held = self._tensors(part.module)
        if not held or held[0].is_same:
            return made
        up = made.values[Slot.UP]
        rows = held[0].rows(self.paths.attention).of_module(up.shape[0], part.module)
        if rows.is_same:
            return made
        axes = rows.swapped
        up = up.exchanged(axes) if axes is not None else Taken(up, tuple(rows.indices().tolist()))
        return replace(made, values={**made.values, Slot.UP: up})


EXPERT_OF: Final = re.compile(
    r"(?P<tensor>blk\.\d+\.ffn_(gate|up|down)_exps)\.(?P<expert>[0-9]{1,9})"
)


@dataclass(frozen=True, slots=True)
class OneAlpha:
    """One number for all modules, divided by the rank of each; 0 would mean that there is none."""

    has_one_rank: bool = False

    def place(self, parts: Sequence[Part], *, fold: bool) -> list[Part]:
        """Return modules of one alpha: the commonest, with what others lack of it in B."""
        alphas = Counter(float(part.rank) if fold else part.written_alpha for part in parts)
        usable = [(alpha, count) for alpha, count in alphas.items() if _is_usable(alpha)]
        alpha = max(usable, key=lambda found: found[1])[0] if usable else 1.0
        return [_with_alpha(part, alpha) for part in parts]

    def record(self, part: Part) -> None:
        """Return nothing: the key values say it."""


def _is_usable(alpha: float) -> bool:
    """Whether a number may be the alpha of a file, a float32 that is not 0."""
    try:
        return single(alpha) not in (0.0, float("inf"), float("-inf"))
    except OverflowError:
        return False


def single(value: float) -> float:
    """Return a number rounded to float32."""
    (found,) = struct.unpack("<f", struct.pack("<f", value))
    return float(found)


def _with_alpha(part: Part, alpha: float) -> Part:
    if part.written_alpha == alpha or not part.is_plain:
        return part
    factor = part.scale * part.rank / alpha
    slot = part.slots[1]
    values = {**part.values, slot: part.values[slot].scaled(factor)}
    note = f"{factor:g} of its scale {part.scale:g} was multiplied into B, for the file's alpha"
    if is_power_of_two(factor):
        note += ", which is exact"
    return replace(
        part,
        values=values,
        scale=alpha / part.rank,
        alpha=alpha,
        notes=(*part.notes, note),
    )


@dataclass(frozen=True)
class GgufSettings(Settings):
    """Key values.

    Attributes:
        paths: Which tensors modules are.
    """

    keeps_invocation: bool = True
    paths: GgufPaths = field(default_factory=GgufPaths)

    def read(
        self,
        sites: tuple[Site, ...],
        metadata: Mapping[str, str],
        sidecar: Mapping[str, Any] | None,
        where: Path,
    ) -> tuple[Site, ...]:
        """Return ``sites`` with the alpha of all of them; one of 0 means a scale of 1.

        Raises:
            AdapterError: It is no number.
            UnsupportedError: It is no LoRA.
        """
        kind = metadata.get("adapter.type", "lora")
        if kind != "lora":
            raise UnsupportedError(where.parent, f"is an adapter of type {kind!r:.40}, not LoRA")
        text = metadata.get(FILE_ALPHA_KEY, "0")
        try:
            alpha = float(text)
        except ValueError:
            alpha = float("nan")
        if alpha != alpha or abs(alpha) == float("inf"):
            raise AdapterError(
                where.parent, f"{FILE_ALPHA_KEY} is {text!r:.40}, expected a number", code="LT015"
            )
        return tuple(replace(site, scaling=_scaling(site, alpha)) for site in sites)

    def base_model(self, metadata: Mapping[str, str]) -> str | None:
        """Return the model on the hub that it is for, or what that is called."""
        url = metadata.get(f"{BASE_KEY}.0.repo_url", "")
        return url.removeprefix(HUB) if url.startswith(HUB) else metadata.get(f"{BASE_KEY}.0.name")

    def metadata(self, written: Written) -> dict[str, str]:
        """Return what llama.cpp reads, what the file is for, and the heads that its rows need."""
        architecture, attention = self.paths.architecture, self.paths.attention
        found = {"general.type": "adapter"}
        if architecture is not None:
            found[ARCHITECTURE] = architecture.name
        found["general.name"] = written.metadata.get("general.name") or written.title
        found |= _base_model(written)
        found["adapter.type"] = "lora"
        parts = [part for part in written.parts if part.is_plain]
        if parts:
            found[FILE_ALPHA_KEY] = repr(single(parts[0].written_alpha))
        tokens = (written.config or {}).get("alora_invocation_tokens")
        if isinstance(tokens, list) and tokens and INVOCATION_KEY not in written.metadata:
            found[INVOCATION_KEY] = json.dumps(tokens)
        if architecture is not None and architecture.permutes and attention is not None:
            found[f"{architecture.name}.attention.head_count"] = _text(attention.query)
            found[f"{architecture.name}.attention.head_count_kv"] = _text(attention.key)
        return found

    def notes(self, written: Written) -> Iterator[str]:
        """Yield what of the scale is rounded."""
        for part in written.parts[:1]:
            if part.is_plain and single(part.written_alpha) != part.written_alpha:
                yield (
                    f"alpha {part.written_alpha!r} was rounded to {single(part.written_alpha)!r}, "
                    "a float32, as which llama.cpp reads it"
                )


def _text(counts: Sequence[int]) -> str:
    return str(counts[0]) if len(counts) == 1 else json.dumps(list(counts))


def _scaling(site: Site, alpha: float) -> Scaling:
    up = site.slots.get(Slot.UP)
    rank = up.spec.shape[-1] if up is not None and up.spec.shape else site.rows
    return Scaling(alpha or float(rank), rank)


def _base_model(written: Written) -> dict[str, str]:
    """Return the model that an adapter was trained on, where its configuration names one."""
    name = (written.config or {}).get("base_model_name_or_path")
    name = name or (written.sidecar or {}).get("model")
    if not isinstance(name, str) or not name or f"{BASE_KEY}.count" in written.metadata:
        return {}
    owner, _, leaf = name.rpartition("/")
    found = {f"{BASE_KEY}.count": "1", f"{BASE_KEY}.0.name": leaf}
    if owner and "/" not in owner and not owner.startswith((".", "~")):
        found[f"{BASE_KEY}.0.organization"] = owner
        found[f"{BASE_KEY}.0.repo_url"] = HUB + name
    return found


def _following(told: Told) -> Scheme:
    """Return the scheme for the architecture and the heads of one model."""
    architecture = _architecture(told)
    attention: Attention | None = None
    if architecture is not None:
        attention = (
            attention_in_values(architecture.name, told.base)
            or attention_in_config(told.config)
            or attention_in_values(architecture.name, told.metadata)
        )
    is_tied = told.is_tied is True
    paths = GgufPaths(architecture=architecture, attention=attention, is_tied=is_tied)
    return replace(
        SCHEME,
        paths=paths,
        roles=GgufRoles(embeddings=TurnedTable(), has_convolutions=False, paths=paths),
        settings=replace(SETTINGS, paths=paths),
    )


def _architecture(told: Told) -> Architecture | None:
    _check_architecture(told)
    for metadata in (told.metadata, told.base):
        name = metadata.get(ARCHITECTURE)
        if name is not None:
            has_experts = metadata.get(f"{name}.expert_count", "1") != "0"
            return architecture_named(name, has_experts=has_experts)
    return architecture_of(told.config)


def _check_architecture(told: Told) -> None:
    """Make sure that an adapter is for the architecture that its base is of.

    Raises:
        AdapterError: It says that it is for another one, which llama.cpp does not load.
    """
    own, base = (each.get(ARCHITECTURE) for each in (told.metadata, told.base))
    if own is None or own == base:
        return
    if base is None:
        one, other = architecture_named(own), architecture_of(told.config)
        # The names of some changed; which rows are paired did not.
        if one is not None and other is not None and one.permutes != other.permutes:
            base = other.name
    if base is not None:
        raise AdapterError(
            ARCHITECTURE,
            f"is {own!r:.40} in the adapter and {base!r:.40} in the base",
            hint="is this the base that the adapter was trained on?",
        )


SETTINGS: Final = GgufSettings(
    stale=r"general\.(type|alignment|file_type|quantization_version)|adapter\.(type|lora\.alpha)",
    naming=r"general\..*|adapter\..*|.*\.attention\.head_count(_kv)?",
)

SCHEME = Scheme(
    name="gguf",
    summary="llama.cpp: .gguf with its names and its order of rows, one alpha",
    example="blk.0.attn_q.weight.lora_a",
    keys=KeyTable(
        modules=r"blk\.\d+\.\w+|token_embd|output|position_embd",
        templates=(
            Template("{module}.weight.lora_a", Slot.DOWN),
            Template("{module}.weight.lora_b", Slot.UP),
        ),
    ),
    paths=GgufPaths(),
    scale=OneAlpha(),
    roles=GgufRoles(embeddings=TurnedTable(), has_convolutions=False),
    settings=SETTINGS,
    home=Home(suffix=".gguf", dtype="F32"),
    priority=4,
    follows=_following,
)
