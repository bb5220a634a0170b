"""litgpt: its names, queries, keys and values stacked in one; the scale in hyperparameters.yaml."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from loratool.adapter.keys import KeyTable, Template
from loratool.adapter.model import Site
from loratool.adapter.part import Part
from loratool.adapter.scaling import Scaling
from loratool.adapter.scheme import Home, Scheme, Told, Written
from loratool.adapter.slots import Slot
from loratool.errors import AdapterError, UnsupportedError
from loratool.files.gathered import Gathered, Piece, StoredSource
from loratool.files.spec import StoredTensor
from loratool.files.yaml import read_flat_yaml
from loratool.names.gguf import attention_in_config
from loratool.names.litgpt import LLAMA, SIDES, WHOLE, Kind, kind_beside, kind_of
from loratool.names.paths.litgpt import LitgptPaths
from loratool.schemes.parts.model import described
from loratool.schemes.parts.roles import Roles
from loratool.schemes.parts.scales import MultiplierScale
from loratool.schemes.parts.settings import Settings
from loratool.values.expr import Constant, Expr, Stored, concatenated
from loratool.variants import variant_named

__all__ = ["CLAIM", "SCHEME"]

CLAIM: Final = {
    "keys": r"^(transformer\.h\.[0-9]{1,9}\.(attn\.(qkv|attn|proj)|mlp\..+)|lm_head)\.lora_[AB]$",
    "weights": ("lit_model.pth.lora",),
    "sidecar": "hyperparameters.yaml",
}

FLAGS: Final = ("lora_query", "lora_key", "lora_value")
ROWS: Final = {"q": "loratool_query_rows", "k": "loratool_key_rows", "v": "loratool_key_rows"}
"""Fields of loratool's own, for there may be no configuration of the model beside an adapter."""
MODEL: Final = "model_config.yaml"


class LitgptKeys(KeyTable):
    """loralib's keys in models of litgpt's."""

    def recognise(self, tensors: Mapping[str, StoredTensor]) -> int:
        """Count factors only where one is of a layer: any model may have a head."""
        own = any(".h." in key and self.factor_keys((key,)) for key in tensors)
        return self.factor_keys(tensors) if own else 0


@dataclass(frozen=True)
class Sizes:
    """Rows of queries, and of keys and of values.

    Attributes:
        query: Of queries.
        key: Of keys, and of values.
        groups: How many groups of heads they are of; 0 where nothing tells.
    """

    query: int
    key: int
    groups: int = 0

    def of(self, side: str) -> int:
        """Return the rows of one of q, k, v."""
        return self.query if side == "q" else self.key


@dataclass(frozen=True)
class LitgptRoles(Roles):
    """Matrices; of q, k and v those that are adapted stack their factors.

    Attributes:
        sizes: Rows of each, where something tells.
        sides: Which of them are adapted, where something tells.
        kind: The kind of model.
    """

    sizes: Sizes | None = None
    sides: tuple[str, ...] = ()
    kind: Kind = LLAMA

    def apart(self, site: Site) -> list[Site]:
        """Return the projections that a fused one stacks, where that is known.

        Raises:
            UnsupportedError: Its rows mix the projections.
        """
        down, up = site.slots.get(Slot.DOWN), site.slots.get(Slot.UP)
        name = site.module
        is_fused = (
            name.endswith((".attn.qkv", ".attn.attn")) and down is not None and up is not None
        )
        if not is_fused or down is None or up is None:
            return [site]
        if len(down.spec.shape) != 2 or len(up.spec.shape) != 2 or not up.spec.shape[1]:
            return [site]
        rank = up.spec.shape[1]
        count = down.spec.shape[0] // rank
        if count == 3 and name.endswith(".attn.attn"):
            raise UnsupportedError(
                site.module,
                "adapts all of queries, keys and values of litgpt's older layout, which adds the "
                "rows of each to rows of all",
                hint="merge it with litgpt (litgpt merge_lora), which does the same",
            )
        sides = self._sides(site, count)
        heights = self._heights(up.spec.shape[0], sides)
        if len(sides) != count or down.spec.shape[0] != count * rank or not heights:
            return [site]
        if self.kind.by_groups:
            return [self._whole(site, down, up, sides)] if self._groups else [site]
        made, first = [], 0
        alpha = site.scaling.alpha
        for index, (side, height) in enumerate(zip(sides, heights, strict=True)):
            slots = {
                Slot.DOWN: down.rows(index * rank, rank, down.spec.shape[1]),
                Slot.UP: up.rows(first, height, rank),
            }
            found = {slot: stored for slot, stored in slots.items() if stored is not None}
            first += height
            if len(found) == len(slots):
                made.append(
                    replace(
                        site,
                        module=f"{name}.{side}",
                        slots=found,
                        scaling=Scaling(alpha, rank),
                        enabled=(),
                        variant=variant_named("lora"),
                    )
                )
        return made if len(made) == count else [site]

    @property
    def _groups(self) -> int:
        """How many times the rows of queries, keys and values alternate; 0 where nothing tells."""
        if not self.kind.by_groups:
            return 1
        return self.sizes.groups if self.sizes is not None else 0

    def _whole(
        self, site: Site, down: StoredTensor, up: StoredTensor, sides: Sequence[str]
    ) -> Site:
        """Return all projections as the one that they are in transformers, group by group.

        Each keeps ranks of its own, and has no rows in those of the others.
        """
        sizes, groups, rank = self.sizes, self._groups, up.spec.shape[1]
        assert sizes is not None
        shares = {side: sizes.of(side) // groups for side in SIDES}
        pieces, first = [], 0
        for index, side in enumerate(sides):
            share = shares[side]
            begin = sum(shares[other] for other in SIDES[: SIDES.index(side)])
            for group in range(groups):
                rows = up.rows(first, share, rank)
                if rows is None:
                    return site
                place = (group * sum(shares.values()) + begin, index * rank)
                pieces.append(Piece(place, rows.spec.shape, StoredSource(rows)))
                first += share
        height = groups * sum(shares.values())
        spec = replace(up.spec, shape=(height, len(sides) * rank))
        joined = StoredTensor(spec, up.path, 0, whole=Gathered(spec, tuple(pieces)))
        return replace(
            site,
            module=f"{site.module.rpartition('.')[0]}.{WHOLE.partition('.')[2]}",
            slots={Slot.DOWN: down, Slot.UP: joined},
            scaling=Scaling(site.scaling.alpha, rank),
            enabled=(),
            variant=variant_named("lora"),
        )

    def _sides(self, site: Site, count: int) -> tuple[str, ...]:
        if count == len(SIDES):
            return SIDES
        if len(site.enabled) == len(SIDES):
            pairs = zip(SIDES, site.enabled, strict=True)
            return tuple(side for side, is_enabled in pairs if is_enabled)
        return self.sides

    def _heights(self, rows: int, sides: Sequence[str]) -> list[int]:
        if len(sides) == 1:
            return [rows]
        if self.sizes is None:
            return []
        heights = [self.sizes.of(side) for side in sides]
        return heights if sum(heights) == rows else []

    def cut(self, parts: Sequence[Part]) -> list[Part]:
        """Return ``parts`` with projections apart that are one in transformers.

        Raises:
            AdapterError: One has other rows than those of such heads.
            UnsupportedError: One is more than A and B, or nothing tells the heads.
        """
        return [piece for part in parts for piece in self._cut(part)]

    def together(self, parts: Sequence[Part]) -> list[Part]:
        """Return ``parts`` with queries, keys and values of a layer as one.

        Raises:
            UnsupportedError: They cannot be, or the rows of a missing one are not known.
        """
        groups: dict[str, dict[str, Part]] = defaultdict(dict)
        made: list[Part] = []
        for part in parts:
            own = self.kind.litgpt(part.module) or part.module
            name, _, side = own.rpartition(".")
            if side in SIDES and name.endswith(".attn.qkv"):
                groups[name][side] = part
            else:
                made.append(part)
        sides = [side for side in SIDES if any(side in group for group in groups.values())]
        return [*made, *(self._fused(name, group, sides) for name, group in groups.items())]

    def _cut(self, part: Part) -> Iterator[Part]:
        """Yield the modules that a projection of transformers is in litgpt; see :meth:`cut`."""
        names = self.kind.parts(part.module)
        if not names:
            yield part
            return
        self._check_plain(part)
        rows, groups, shares = part.up.shape[0], 1, [1] * len(names)
        if len(names) == len(SIDES):
            groups = self._groups
            if self.sizes is None or not groups:
                raise UnsupportedError(
                    part.module,
                    "is queries, keys and values in one, and how many rows each has nothing tells",
                    hint="give --base BASE",
                )
            shares = [self.sizes.of(side) // groups for side in SIDES]
            if groups * sum(shares) != rows:
                raise AdapterError(
                    part.module,
                    f"has {rows} rows, expected {groups * sum(shares)} of queries, keys and values",
                    hint="is this the base that it was trained on?",
                    code="LT022",
                )
        height, first = rows // groups, 0
        for name, share in zip(names, shares, strict=True):
            last = first + height * share // sum(shares)
            places = [(group * height + first, group * height + last) for group in range(groups)]
            first = last
            factors = _narrowed(part, places)
            if factors is not None:
                made = part.factored(*factors, note="cut as litgpt has it")
                yield replace(made, module=name, site=None)

    def _check_plain(self, part: Part) -> None:
        if not part.is_plain or len(part.values) > 2 or len(part.up.shape) != 2:
            raise UnsupportedError(
                part.module,
                f"is {part.variant.words or 'more than A and B'}, and is fused or in parts in "
                "litgpt",
                hint="merge the adapter into its base instead",
            )

    def _fused(self, name: str, group: Mapping[str, Part], sides: Sequence[str]) -> Part:
        first = next(iter(group.values()))
        for part in group.values():
            self._check_plain(part)
        scales = {part.scale for part in group.values()}
        scale = scales.pop() if len(scales) == 1 else 1.0
        downs: list[Expr] = []
        ups: list[Expr] = []
        for side in sides:
            found = group.get(side)
            if found is not None:
                downs.append(found.down)
                ups.append(found.up if found.scale == scale else found.up.scaled(found.scale))
                continue
            rows = self._missing(side, group)
            if not rows:
                raise UnsupportedError(
                    first.module,
                    "is fused with others in litgpt, and how many rows those have nothing tells",
                    hint="give --base BASE",
                )
            downs.append(Constant(0.0, first.down.shape, first.down.dtype))
            ups.append(Constant(0.0, (rows, first.rank), first.up.dtype))
        joint = first.factored(
            concatenated(downs), concatenated(ups), scale=scale, note="stacked as litgpt has it"
        )
        heights = tuple((side, up.shape[0]) for side, up in zip(sides, ups, strict=True))
        return replace(joint, module=name, rank=first.rank, stacked=heights)

    def _missing(self, side: str, group: Mapping[str, Part]) -> int:
        if self.sizes is not None:
            return self.sizes.of(side)
        twin = {"k": "v", "v": "k"}.get(side, "")
        return group[twin].up.shape[0] if twin in group else 0


@dataclass(frozen=True)
class LitgptSettings(Settings):
    """``hyperparameters.yaml``, with alpha, the rank, and what is adapted."""

    file: str = "hyperparameters.yaml"

    def load(self, path: Path) -> dict[str, Any]:
        """Read it."""
        return read_flat_yaml(path)

    def read(
        self,
        sites: tuple[Site, ...],
        metadata: Mapping[str, str],
        sidecar: Mapping[str, Any] | None,
        where: Path,
    ) -> tuple[Site, ...]:
        """Return ``sites`` with the scale, ``lora_alpha`` by ``lora_r``.

        Raises:
            AdapterError: They are no numbers.
        """
        alpha, rank = ((sidecar or {}).get(key) for key in ("lora_alpha", "lora_r"))
        if alpha is None or rank is None:
            return sites
        for key, value in (("lora_alpha", alpha), ("lora_r", rank)):
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not math.isfinite(value) or (key == "lora_r" and value < 1):
                raise AdapterError(
                    where, f"{key} is {value!r:.40}, expected a number", code="LT015"
                )
        return tuple(replace(site, scaling=Scaling(float(alpha), int(rank))) for site in sites)

    def config(self, written: Written) -> dict[str, Any] | None:
        """Return the fields that litgpt reads; the others stay what they were."""
        old = dict(written.sidecar or {})
        config = written.config or {}
        plain = [part for part in written.parts if part.is_plain]
        modules = [item.name for item in written.modules]
        sides = {side for item in written.modules for side, _ in item.part.stacked}
        found = {k: v for k, v in old.items() if not k.startswith(("lora_", "loratool_"))}
        model = config.get("base_model_name_or_path") or "BASE"
        found.setdefault("checkpoint_dir", f"checkpoints/{model}")
        rank = max(part.rank for part in plain)
        return {
            **found,
            "lora_r": rank,
            "lora_alpha": _number(plain[0].scale * rank),
            "lora_dropout": old.get("lora_dropout") or 0.0,
            **{flag: side in sides for flag, side in zip(FLAGS, SIDES, strict=True)},
            "lora_projection": any(name.endswith(".attn.proj") for name in modules),
            "lora_mlp": any(".mlp." in name for name in modules),
            "lora_head": "lm_head" in modules,
            **{ROWS[side]: rows for item in written.modules for side, rows in item.part.stacked},
        }


def _number(value: float) -> int | float:
    return int(value) if value.is_integer() else value


def _following(told: Told) -> Scheme:
    """Return the scheme for one model."""
    beside = _beside(told.folder, MODEL)
    run = _beside(told.folder, SETTINGS.file)
    config = described(told)
    kind = kind_of(config) or kind_beside(beside)
    is_unknown = bool(config.get("architectures")) and kind_of(config) is None
    unknown = str(config["architectures"])[:80] if is_unknown else ""
    if kind is None and not unknown and beside.get("mlp_class_name"):
        unknown = f"model_config.yaml says {str(beside['mlp_class_name'])[:40]}, and no name"
    sides = tuple(s for s, flag in zip(SIDES, FLAGS, strict=True) if run.get(flag) is True)
    sizes = _sizes(beside, config) or _sizes_written(run)
    roles = LitgptRoles(has_convolutions=False, sizes=sizes, sides=sides, kind=kind or LLAMA)
    return replace(SCHEME, paths=LitgptPaths(kind=kind, unknown=unknown), roles=roles)


def _narrowed(part: Part, places: Sequence[tuple[int, int]]) -> tuple[Expr, Expr] | None:
    """Return the factors of some rows of a part; ``None`` where it was read without such rows.

    They have all of A, or of what was read from litgpt the ranks that those rows had there.
    """
    down, up = part.down, part.up
    stored = up.tensor if isinstance(up, Stored) else None
    whole = stored.whole if stored is not None and stored.strides is None else None
    if stored is not None and isinstance(whole, Gathered) and whole.spec.shape == up.shape:
        ranks = {
            (piece.first[1], piece.first[1] + piece.shape[1])
            for piece in whole.pieces
            if any(first <= piece.first[0] < last for first, last in places)
        }
        if not ranks:
            return None
        if len(ranks) == 1:
            ((first, last),) = ranks
            down, up = down.rows(first, last), up.columns(first, last)
    pieces = [up.rows(first, last) for first, last in places]
    return down, concatenated(pieces) if len(pieces) > 1 else pieces[0]


def _beside(folder: Path | None, name: str) -> Mapping[str, Any]:
    path = folder / name if folder is not None else None
    return read_flat_yaml(path) if path is not None and path.is_file() else {}


def _sizes(model: Mapping[str, Any], config: Mapping[str, Any]) -> Sizes | None:
    heads = _count(model, "n_head")
    groups = _count(model, "n_query_groups") or heads
    size = _count(model, "head_size") or _count(model, "n_embd") // (heads or 1)
    if not heads or not size:
        attention = attention_in_config(config)
        found = attention.at(None) if attention is not None else None
        if found is None:
            return None
        heads = found.query
        groups = _falcon_groups(config) or found.key
        size = _count(config, "head_dim") or _count(config, "hidden_size") // heads
    return Sizes(heads * size, groups * size, groups) if size else None


def _falcon_groups(config: Mapping[str, Any]) -> int:
    """Return the groups of a Falcon, whose older files say a number of keys that is not used."""
    is_single = config.get("multi_query") and not config.get("new_decoder_architecture")
    return 1 if is_single else 0


def _sizes_written(run: Mapping[str, Any]) -> Sizes | None:
    query, key = (_count(run, ROWS[side]) for side in "qk")
    return Sizes(query, key) if query and key else None


def _count(fields: Mapping[str, Any], key: str) -> int:
    value = fields.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


SETTINGS: Final = LitgptSettings()

SCHEME = Scheme(
    name="litgpt",
    summary="litgpt: q, k and v stacked in one, its scale in hyperparameters.yaml",
    example="transformer.h.0.attn.proj.lora_A",
    keys=LitgptKeys(
        modules=r"transformer\.h\.[0-9]{1,9}\.(attn\.(qkv|attn|proj)"
        r"|mlp\.((shared_)?experts\.([0-9]{1,9}\.)?)?(fc|fc_1|fc_2|proj|gate))|lm_head",
        templates=(
            Template("{module}.lora_A", Slot.DOWN),
            Template("{module}.lora_B", Slot.UP),
        ),
    ),
    paths=LitgptPaths(),
    scale=MultiplierScale(),
    roles=LitgptRoles(has_convolutions=False),
    settings=SETTINGS,
    home=Home(weights_name="lit_model.pth.lora", suffix=".lora"),
    priority=4,
    follows=_following,
)
