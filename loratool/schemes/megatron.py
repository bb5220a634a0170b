"""Megatron's adapters, as NeMo and Megatron-Bridge save them: projections in one, by groups."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from loratool.adapter.keys import KeyTable, Template
from loratool.adapter.model import Site
from loratool.adapter.part import Part
from loratool.adapter.scheme import RANKS, Home, Scheme, Told, Written
from loratool.adapter.slots import AdapterKey, Slot
from loratool.errors import AdapterError, UnsupportedError
from loratool.files.container import read_bytes
from loratool.files.gathered import Gathered, Piece, StoredSource
from loratool.files.spec import StoredTensor
from loratool.files.yaml import read_flat_yaml
from loratool.names.gguf import EXPERT_COUNTS, architecture_of, attention_in_config
from loratool.names.paths.megatron import FUSED, MegatronPaths, part_of
from loratool.schemes.parts.model import described
from loratool.schemes.parts.roles import Roles
from loratool.schemes.parts.scales import FoldedScale
from loratool.schemes.parts.settings import Settings
from loratool.schemes.parts.stacks import one_of_stack
from loratool.values.expr import Expr, concatenated

__all__ = ["CLAIM", "SCHEME"]

CLAIM: Final = {
    "keys": r"(\.adapter(\.adapter_\w+)?|\.adapter_layer\.lora_\w+_adapter(\.\w+_adapter)?)"
    r"\.linear_(in|out)\.weight$",
    "weights": ("model_weights.ckpt",),
}

SIDES: Final = {"linear_in": Slot.DOWN, "linear_out": Slot.UP}
KEY: Final = re.compile(
    r"(?P<module>.+)\.adapter(\.adapter_(?P<part>q|k|v|gate|up))?\.(?P<side>linear_in|linear_out)"
    r"\.weight",
    re.DOTALL,
)
MAGNITUDE: Final = re.compile(r"(?P<module>.+)\.adapter\.weight_magnitude", re.DOTALL)
FIRST: Final = re.compile(
    r"(?P<block>.+)\.adapter_layer\.lora_(?P<name>\w+?)_adapter(\.(?P<part>q|k|v|gate|up)_adapter)?"
    r"\.(?P<side>linear_in|linear_out)\.weight",
    re.DOTALL,
)
FIRST_NAMES: Final = {
    "kqv": "linear_qkv",
    "unfused_kqv": "linear_qkv",
    "dense_attention": "linear_proj",
    "hto4h": "linear_fc1",
    "unfused_hto4h": "linear_fc1",
    "4htoh": "linear_fc2",
}
"""What NeMo 1 called its adapters, and the layers that they are of."""
PARTS: Final = ("q", "k", "v", "gate", "up")
MODEL: Final = "model_config.yaml"
GATED: Final = frozenset(
    ("llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "olmo", "olmo2", "mistral3")
)
"""llama.cpp's names of kinds of model whose modules are those of Llama's."""
EXPERTS: Final = {
    "linear_fc1.gate": "mlp.experts.{}.gate_proj",
    "linear_fc1.up": "mlp.experts.{}.up_proj",
    "linear_fc2": "mlp.experts.{}.down_proj",
}
MIXTRAL: Final = {
    "linear_fc1.gate": "block_sparse_moe.experts.{}.w1",
    "linear_fc1.up": "block_sparse_moe.experts.{}.w3",
    "linear_fc2": "block_sparse_moe.experts.{}.w2",
}
OF_EXPERTS: Final = {"qwen3moe": EXPERTS, "olmoe": EXPERTS}
"""The same of kinds whose MLPs are experts, with what transformers calls these."""
ALL_LAYERS: Final = re.compile(
    r"(?P<layers>(.+\.)?(decoder|encoder)\.layers)\.(?P<leaf>(?![0-9]{1,9}\.).+)", re.DOTALL
)
LOCAL_EXPERT: Final = re.compile(
    r"(?P<experts>.+\.mlp\.experts)\.local_experts\.(?P<number>[0-9]{1,9})\.(?P<leaf>linear_fc[12])",
    re.DOTALL,
)
GROUPED: Final = re.compile(r"(?P<experts>.+\.mlp\.experts)\.(?P<leaf>linear_fc[12])", re.DOTALL)


class MegatronKeys(KeyTable):
    """Keys in which a part of a fused layer stands behind the adapter."""

    def _parse(self, key: str) -> AdapterKey | None:
        if match := KEY.fullmatch(key):
            part = f".{match['part']}" if match["part"] else ""
            return AdapterKey(match["module"] + part, SIDES[match["side"]])
        if match := MAGNITUDE.fullmatch(key):
            return AdapterKey(match["module"], Slot.MAGNITUDE)
        match = FIRST.fullmatch(key)
        name = FIRST_NAMES.get(match["name"]) if match is not None else None
        if match is None or name is None:
            return None
        part = f".{match['part']}" if match["part"] else ""
        return AdapterKey(f"{match['block']}.{name}{part}", SIDES[match["side"]])

    def format(self, key: AdapterKey) -> str:
        module, _, part = key.module.rpartition(".")
        if module and part in PARTS and key.slot is not Slot.MAGNITUDE:
            inner = KeyTable.format(self, replace(key, module="x")).removeprefix("x.adapter")
            return f"{module}.adapter.adapter_{part}{inner}"
        return super().format(key)


@dataclass(frozen=True, slots=True)
class Shape:
    """What tells the parts of fused layers, and which modules one of all experts is.

    Attributes:
        heads: Of queries; 0 where nothing tells.
        groups: Of keys and values.
        is_gated: Whether the first layer of an MLP is two.
        experts: How many experts a layer has; 0 where nothing tells.
    """

    heads: int = 0
    groups: int = 0
    is_gated: bool = False
    experts: int = 0


@dataclass(frozen=True)
class MegatronRoles(Roles):
    """Matrices; fused ones are read as their parts, which share A.

    Attributes:
        shape: What tells them.
    """

    shape: Shape = field(default_factory=Shape)

    def apart(self, site: Site) -> list[Site]:
        """Return the projections that a fused layer is, of each expert, where that is known.

        Raises:
            AdapterError: Its rows are not those of such heads.
        """
        layers = self._layers(site)
        experts = (expert for layer in layers for expert in self._experts(layer))
        return [part for expert in experts for part in self._parts(expert)]

    def _layers(self, site: Site) -> list[Site]:
        """Return one site for each layer, where those of all layers are stacked.

        Megatron's distributed checkpoints have them so, unless layers differ.
        """
        match = ALL_LAYERS.fullmatch(site.module)
        counts = {slot.spec.shape[0] if slot.spec.shape else 0 for slot in site.slots.values()}
        is_stack = all(len(stored.spec.shape) > 2 for stored in site.slots.values())
        if match is None or not is_stack or len(counts) != 1 or Slot.DOWN not in site.slots:
            return [site]
        name = f"{match['layers']}.{{}}.{match['leaf']}".format
        return [one_of_stack(site, name(n), n) for n in range(counts.pop())]

    def _experts(self, site: Site) -> list[Site]:
        """Return one site for each expert that a layer is of, where it is of any.

        All of them share one adapter, or a grouped layer has theirs stacked.
        """
        if match := LOCAL_EXPERT.fullmatch(site.module):
            return [replace(site, module=f"{match['experts']}.{match['number']}.{match['leaf']}")]
        match = GROUPED.fullmatch(site.module)
        down, up = site.slots.get(Slot.DOWN), site.slots.get(Slot.UP)
        if match is None or down is None or up is None or set(site.slots) != {Slot.DOWN, Slot.UP}:
            return [site]
        names = f"{match['experts']}.{{}}.{match['leaf']}".format
        sides = down.spec.shape, up.spec.shape
        if all(len(shape) == 3 for shape in sides) and sides[0][0] == sides[1][0]:
            return [one_of_stack(site, names(n), n) for n in range(sides[0][0])]
        if all(len(shape) == 2 for shape in sides):
            found = [replace(site, module=names(n)) for n in range(self.shape.experts)]
            return found or [site]
        return [site]

    def _parts(self, site: Site) -> list[Site]:
        leaf = site.module.rpartition(".")[2]
        up = site.slots.get(Slot.UP)
        if up is None or len(up.spec.shape) != 2:
            return [site]
        if leaf == "linear_qkv" and self.shape.heads:
            heads, groups = self.shape.heads, self.shape.groups
            each = heads // groups
            return self._cut(site, groups, {"q": each, "k": 1, "v": 1})
        is_spread = site.settings.get(RANKS, 1) > 1 and ".mlp.experts." in site.module
        if leaf == "linear_fc1" and self.shape.is_gated and not is_spread:
            # Each rank has gate and up of its own columns.
            return self._cut(site, site.settings.get(RANKS, 1), {"gate": 1, "up": 1})
        return [site]

    def together(self, parts: Sequence[Part]) -> list[Part]:
        """Return ``parts`` with fused layers as one, where all of them share their A.

        Else they stay projections of their own, which is Megatron-Bridge's canonical form: an
        adapter is in one form or in the other.
        """
        layers: dict[str, dict[str, Part]] = defaultdict(dict)
        for part in parts:
            place = part_of(part.module)
            if place is not None:
                layers[place[0]][place[1]] = part
        if not all(self._is_one(name, members) for name, members in layers.items()):
            return list(parts)
        others = [part for part in parts if part_of(part.module) is None]
        return [*others, *(self._fused(name, members) for name, members in layers.items())]

    def _groups(self, layer: str) -> int:
        if not layer.endswith("linear_qkv"):
            return 1
        return self.shape.groups

    def _is_one(self, layer: str, members: Mapping[str, Part]) -> bool:
        """Whether the parts of a layer are all there and share A, and their order is known."""
        names, groups = FUSED[layer.rpartition(".")[2]], self._groups(layer)
        found = [members[name] for name in names if name in members]
        if len(found) < len(names) or not groups or not all(part.is_plain for part in found):
            return False
        first = found[0]
        return all(
            part.down == first.down
            and part.scale == first.scale
            and part.values.keys() == first.values.keys()
            and part.up.shape[0] % groups == 0
            for part in found
        )

    def _fused(self, layer: str, members: Mapping[str, Part]) -> Part:
        names, groups = FUSED[layer.rpartition(".")[2]], self._groups(layer)
        parts = [members[name] for name in names]
        first = parts[0]
        values = dict(first.values)
        for slot in (first.slots[1], Slot.MAGNITUDE):
            if slot in values:
                values[slot] = _by_groups([part.values[slot] for part in parts], groups)
        note = "fused as Megatron has it"
        return replace(first, module=layer, values=values, site=None, notes=(*first.notes, note))

    def _cut(self, site: Site, groups: int, shares: Mapping[str, int]) -> list[Site]:
        rows = site.slots[Slot.UP].spec.shape[0]
        count = groups * sum(shares.values())
        if rows % count:
            raise AdapterError(
                site.label,
                f"has {rows} rows, which are no {count} equal parts",
                hint="is this the base that it was trained on?",
                code="LT022",
            )
        size, first, made = rows // count, 0, []
        for name, share in shares.items():
            last = first + share * size
            slots = dict(site.slots)
            for slot in (Slot.UP, Slot.MAGNITUDE):
                if slot in slots:
                    slots[slot] = _kept(slots[slot], groups, first, last, site.label)
            made.append(replace(site, module=f"{site.module}.{name}", slots=slots))
            first = last
        return made


def _by_groups(values: Sequence[Expr], groups: int) -> Expr:
    """Return rows of each of ``values`` for the first group, then those for the second, ..."""
    pieces = []
    for group in range(groups):
        for value in values:
            height = value.shape[0] // groups
            pieces.append(value.rows(group * height, (group + 1) * height))
    return concatenated(pieces) if len(pieces) > 1 else pieces[0]


class MegatronSettings(Settings):
    """Nothing is recorded: the scale is in the run's configuration."""

    def notes(self, written: Written) -> Iterator[str]:
        """Yield what the run has to say."""
        is_fused = any(
            item.part.module.rpartition(".")[2] in FUSED and item.part.site is None
            for item in written.modules
        )
        kind = "LoRA" if is_fused else "CanonicalLoRA"
        yield f"Megatron keeps its scale in the run: make the layers with {kind}, alpha = dim"


def _kept(stored: StoredTensor, groups: int, first: int, last: int, where: str) -> StoredTensor:
    found = stored.keeping(groups, first, last)
    if found is None:
        raise AdapterError(where, "has rows that are not stored one after the other")
    return found


def _join(name: str, shards: Sequence[StoredTensor]) -> StoredTensor:
    """Return a tensor from its parts on the ranks.

    A layer whose outputs are spread has its rank spread in A and its outputs in B, one whose inputs
    are has them spread in A and its outputs in B too.

    Raises:
        AdapterError: The parts do not fit.
        UnsupportedError: How they are spread is not known.
    """
    key = SCHEME.keys.parse(name)
    first = shards[0]
    if key is None or key.slot not in (Slot.DOWN, Slot.UP) or len(first.spec.shape) != 2:
        if len({read_bytes(shard) for shard in shards}) == 1:
            return first
        raise UnsupportedError(name, "differs between tensor-parallel ranks, and is no factor")
    leaves = key.module.split(".")
    spreads_inputs = any(leaf in leaves for leaf in ("linear_proj", "linear_fc2"))
    axis = 1 if key.slot is Slot.DOWN and spreads_inputs else 0
    if key.slot is Slot.DOWN and not axis and len({read_bytes(shard) for shard in shards}) == 1:
        return first  # which some releases keep whole on every rank
    kept = {(shard.spec.dtype, shard.spec.shape[1 - axis]) for shard in shards}
    if len(kept) > 1:
        raise AdapterError(name, "has parts of different shapes on the tensor-parallel ranks")
    pieces, start = [], 0
    for shard in shards:
        place = (0, start) if axis else (start, 0)
        pieces.append(Piece(place, shard.spec.shape, StoredSource(shard)))
        start += shard.spec.shape[axis]
    sides = (first.spec.shape[0], start) if axis else (start, first.spec.shape[1])
    spec = replace(first.spec, shape=sides)
    return StoredTensor(spec, first.path, 0, whole=Gathered(spec, tuple(pieces)))


def _following(told: Told) -> Scheme:
    """Return the scheme for the heads of one model."""
    config = described(told)
    folder = told.folder
    paths = [each / MODEL for each in (folder, folder.parent)] if folder is not None else []
    path = next((each for each in paths if each.is_file()), None)
    beside = read_flat_yaml(path) if path is not None else {}
    architecture = architecture_of(config)
    name = architecture.name if architecture is not None else "unknown"
    kind = (
        ""
        if not config or name in (*GATED, *OF_EXPERTS)
        else f"{config.get('architectures') or name}"[:80]
    )
    attention = attention_in_config(config)
    found = attention.at(None) if attention is not None else None
    heads = found.query if found is not None else _count(beside, "num_attention_heads")
    groups = found.key if found is not None else _count(beside, "num_query_groups") or heads
    if not groups or heads % groups:
        heads = groups = 0
    activation = beside.get("activation")
    is_gated = name in (*GATED, *OF_EXPERTS) or (
        isinstance(activation, str) and "glu" in activation
    )
    experts = next((_count(config, key) for key in EXPERT_COUNTS if _count(config, key)), 0)
    shape = Shape(heads, groups, is_gated, experts)
    roles = MegatronRoles(has_convolutions=False, shape=shape)
    spelled = OF_EXPERTS.get(name, {}) if experts else {}
    if experts and name in GATED:
        spelled = MIXTRAL if config.get("architectures") == ["MixtralForCausalLM"] else {}
    return replace(SCHEME, paths=MegatronPaths(kind=kind, experts=spelled), roles=roles)


def _count(fields: Mapping[str, Any], key: str) -> int:
    value = fields.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


SCHEME = Scheme(
    name="megatron",
    summary="NeMo, Megatron-Bridge: linear_qkv by groups, linear_fc1",
    example="decoder.layers.0.self_attention.linear_proj.adapter.linear_in.weight",
    keys=MegatronKeys(
        modules=r"(.+\.)?(decoder|encoder)\.layers\.([0-9]{1,9}\.)?"
        r"(self_attention|mlp(\.experts(\.local_experts\.[0-9]{1,9})?)?)\.linear_.+|(.+\.)?output_layer",
        templates=(
            Template("{module}.adapter.linear_in.weight", Slot.DOWN),
            Template("{module}.adapter.linear_out.weight", Slot.UP),
            Template("{module}.adapter.weight_magnitude", Slot.MAGNITUDE),
        ),
    ),
    paths=MegatronPaths(),
    scale=FoldedScale(),
    roles=MegatronRoles(has_convolutions=False),
    settings=MegatronSettings(),
    home=Home(weights_name="model_weights.ckpt", suffix=".ckpt"),
    priority=4,
    join=_join,
    follows=_following,
)
