"""A language model as llama.cpp has it: other names, and rows of some modules in another order.

The names of each architecture are those of :mod:`loratool.names.gguf`. Rotary embeddings take
neighbours there where transformers takes halves; fused projections are cut, or sorted by what they
are; all experts of a layer are one tensor for each projection.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Final

from loratool.base.config import ARCHITECTURE, ModelConfig
from loratool.base.key_values import HEAD, TABLE
from loratool.base.layout import Fused, Headers, Layout, Stretch
from loratool.base.live import ExpertPart, LiveModel, Stack
from loratool.base.ties import Sharing
from loratool.codecs.weights import Weight
from loratool.errors import UnsupportedError
from loratool.names.gguf import (
    Architecture,
    Attention,
    Held,
    architecture_named,
    attention_in_values,
)

__all__ = ["LAYOUT"]

WHOLE: Final = frozenset(("", "queries", "keys", "keys by group"))
"""The forms of tensors that are all of one module."""
PARTS: Final = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
"""Projections that some models have in one, and their adapters apart, or the reverse."""
SHIFTED: Final = re.compile(r"gemma[23]?|nemotron|qwen3next|qwen35(moe)?")
"""Where norms are stored with 1 added, so that they are no module's of transformers."""
MOST: Final = 4096
"""Stretches of rows that one module may be put together from."""
WEIGHT: Final = ".weight"


class _Live(LiveModel):
    """What transformers calls the tensors.

    Args:
        architecture: Their names.
        tensors: The tensors of the files.
    """

    def __init__(self, architecture: Architecture, tensors: Mapping[str, Weight]) -> None:
        super().__init__(ModelConfig(), tensors)
        self._architecture = architecture

    def name(self, stored: str) -> str:
        """Return what transformers calls a tensor that the files have, or might have."""
        module, _, leaf = stored.rpartition(".")
        held = _own(self._architecture, module)
        return f"{held.module}.{leaf}" if held is not None else stored

    def tensor(self, name: str) -> str | None:
        """Return the tensor that a parameter of transformers is, with its rows in their order."""
        module, _, leaf = name.rpartition(".")
        held = _held(self._architecture, module)
        if not all(one.is_same and not one.is_stack for one in held):
            return None
        names = (f"{one.tensor}.{leaf}" for one in held)  # which of several, the model tells
        found = next((name for name in names if name in self.tensors), None)
        return found if found and _is_plain(self._architecture, found) else None

    def stack(self, parameter: str) -> Stack | None:
        """Return what the files have of the experts' parameter ``parameter``.

        Raises:
            UnsupportedError: They have its values in another order.
        """
        if f"{parameter}{WEIGHT}" in self.tensors and "_exps" in parameter:
            return Stack(whole=f"{parameter}{WEIGHT}")  # as :meth:`expert` calls it
        held = [one for one in _held(self._architecture, parameter) if not one.is_stack]
        names = [f"{one.tensor}{WEIGHT}" for one in held]
        if not names or not all(_is_stack(self.tensors.get(name)) for name in names):
            return None
        forms = [one.form for one in held]
        _, rows, columns = self.tensors[names[0]].spec.shape
        is_unclear = held[0].is_turned and rows == columns
        if is_unclear or forms not in ([""], ["first half", "second half"]):
            raise UnsupportedError(
                parameter,
                f"is in {names[0]!r} with its rows in another order",
                hint="merge the adapter into the model of transformers instead",
            )
        return Stack((tuple(names),)) if len(names) > 1 else Stack(whole=names[0])

    def expert(self, module: str) -> ExpertPart | None:
        """Return which part of which tensor one expert's projection is."""
        held = [one for one in _held(self._architecture, module) if one.expert is not None]
        if len(held) != 1 or held[0].form or f"{held[0].tensor}{WEIGHT}" not in self.tensors:
            return None
        return ExpertPart(held[0].tensor, held[0].expert or 0, 0, 1)


class Gguf(Layout):
    """Every language model with key values that say which architecture it is of."""

    name = "gguf"
    is_linear = True

    def claims(self, headers: Headers) -> int:
        return 4 if _architecture(headers.config) is not None else 0

    def paths(self, headers: Headers) -> Mapping[str, str]:
        architecture = _known(headers.config)
        own = {module: _own(architecture, module) for module in headers.modules}
        return {module: held.module for module, held in own.items() if held is not None}

    def unlike(self, path: str, config: ModelConfig) -> str | None:
        found = _known(config).modules(path)
        if not found or _own(_known(config), path) is not None:
            return None
        if path.endswith("_exps"):
            return "a stack of experts, which is cut otherwise in llama.cpp than in libraries"
        return "its rows, or its values, are others in llama.cpp than in libraries"

    def live(self, config: ModelConfig, tensors: Mapping[str, Weight]) -> LiveModel | None:
        return _Live(_known(config), tensors)

    def sharings(self, names: Mapping[str, Weight]) -> tuple[Sharing, ...] | None:
        if TABLE not in names:
            return ()
        return () if HEAD in names else (Sharing((TABLE, HEAD), TABLE, HEAD),)

    def fused(self, module: str, config: ModelConfig) -> Fused | None:
        parent, _, leaf = module.rpartition(".")
        whole = next((one for one, parts in PARTS.items() if leaf in (one, *parts)), None)
        if whole is None:
            return None
        parts = tuple(f"{parent}.{part}" for part in PARTS[whole])
        fused = Fused(f"{parent}.{whole}", parts)
        if whole == "qkv_proj":
            fused = Fused(fused.whole, parts, config.projection_rows or (0,))
        has = {one: bool(_held(_known(config), one)) for one in (fused.whole, *parts)}
        is_cut = all(has[part] for part in parts) and not has[fused.whole]
        is_fused = has[fused.whole] and not any(has[part] for part in parts)
        return fused if is_cut or is_fused else None

    def can_add(self, name: str, config: ModelConfig) -> bool:
        return name == HEAD and bool(_known(config).modules("output"))

    def exchanged(self, path: str, rows: int, config: ModelConfig) -> tuple[int, int, int] | None:
        held = _held(_known(config), path)
        if len(held) != 1 or held[0].is_same or held[0].form not in WHOLE:
            return None
        found = held[0].rows(_attention(config)).of_tensor(rows, held[0].tensor)
        return found.exchanged

    def pairs_biases(self, config: ModelConfig) -> bool:
        return _known(config).pairs_biases

    def stretches(
        self, path: str, rows: Callable[[str], int | None], config: ModelConfig
    ) -> tuple[Stretch, ...]:
        held = _held(_known(config), path)
        if any(one.is_stack or one.form in WHOLE for one in held):
            return ()
        attention = _attention(config)
        found: list[Stretch] = []
        seen, total, wanted = set(), 0, 0
        for one in held:
            count = rows(f"{one.tensor}{WEIGHT}")
            if count is None or one.form in seen:
                continue  # a model has one of several tensors for the same rows
            seen.add(one.form)
            total += count
            wanted = one.rows(attention).of_tensor(count, one.tensor).module_rows
            found += _cut(one, attention, count)
        return tuple(sorted(found, key=lambda each: each.first)) if total == wanted else ()


def _cut(held: Held, attention: Attention | None, count: int) -> Iterator[Stretch]:
    """Yield the rows of a tensor that lie there as they do in their module.

    Raises:
        UnsupportedError: Hardly any do.
    """
    rows = held.rows(attention).of_tensor(count, held.tensor)
    order = [int(row) for row in rows.indices()]
    half = order[1] - order[0] if count > 1 else 1
    found = list(_in_pairs(order, half) if half > 1 else _in_order(order))
    if len(found) > min(MOST, max(4, count // 4)):
        raise UnsupportedError(
            held.module,
            f"is in {held.tensor!r} with its rows in another order, one by one",
            hint="merge the adapter into the model of transformers instead",
        )
    for start, stop in found:
        axes = ((stop - start) // half // 2, 2, half) if half > 1 else None
        yield Stretch(f"{held.tensor}{WEIGHT}", start, order[start], stop - start, axes)


def _in_order(order: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield where rows begin and end that are one after the other."""
    count = len(order)
    starts = [0, *(n for n in range(1, count) if order[n] != order[n - 1] + 1), count]
    yield from pairwise(starts)


def _in_pairs(order: Sequence[int], half: int) -> Iterator[tuple[int, int]]:
    """Yield the same of rows that are in pairs, those of the two halves of a head in turn.

    Rows in no such order are told one by one.
    """
    size = 2 * half
    pattern = [part * half + n for n in range(half) for part in (0, 1)]
    blocks = [order[n : n + size] for n in range(0, len(order), size)]
    if any([row - block[0] for row in block] != pattern for block in blocks):
        yield from ((n, n + 1) for n in range(len(order)))
        return
    firsts = [block[0] for block in blocks]
    begin = 0
    for n in range(1, len(firsts) + 1):
        if n == len(firsts) or firsts[n] != firsts[n - 1] + size:
            yield begin * size, n * size
            begin = n


def _architecture(config: ModelConfig) -> Architecture | None:
    name = config.raw.get(ARCHITECTURE)
    return architecture_named(name) if isinstance(name, str) else None


def _known(config: ModelConfig) -> Architecture:
    found = _architecture(config)
    assert found is not None
    return found


def _attention(config: ModelConfig) -> Attention | None:
    return attention_in_values(str(config.raw.get(ARCHITECTURE)), config.raw)


@lru_cache(maxsize=4096)
def _held(architecture: Architecture, path: str) -> tuple[Held, ...]:
    return architecture.held(path)


@lru_cache(maxsize=4096)
def _own(architecture: Architecture, module: str) -> Held | None:
    """Return the module of transformers that the tensor of a module is, and nothing else."""
    if not _is_plain(architecture, f"{module}{WEIGHT}"):
        return None
    found = architecture.modules(module)
    if not found or found[0].form not in WHOLE or any("experts." in one.module for one in found):
        return None
    all_of_it = all(one.form in WHOLE for one in architecture.held(found[0].module))
    return found[0] if all_of_it else None


def _is_plain(architecture: Architecture, name: str) -> bool:
    """Whether a tensor has the values that transformers has, but for their order."""
    is_norm = name.rpartition(".")[0].endswith("norm")
    return not is_norm or SHIFTED.fullmatch(architecture.name) is None


def _is_stack(weight: Weight | None) -> bool:
    return weight is not None and len(weight.spec.shape) == 3


LAYOUT = Gguf()
