"""``layer_replication``: the base as the longer stack of layers that the adapter was trained on."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from loratool.codecs.weights import Weight
from loratool.errors import AdapterError, UnsupportedError

__all__ = ["layer_ranges", "replicate"]

LAYER: Final = re.compile(
    r"(?P<before>(?:.*\.)?(?:layers|layer|h|blocks))\.(?P<index>[0-9]{1,9})\.(?P<after>.+)"
)
MAX_LAYERS: Final = 1_000


def layer_ranges(value: Any, where: object) -> list[int] | None:
    """Return which layer of the base each layer of the stack is, or ``None`` for no change.

    Raises:
        AdapterError: ``layer_replication`` is not a list of ``[start, end)`` pairs.
    """
    if not value:
        return None
    pairs = value if isinstance(value, list) else None
    if pairs is None or not all(
        isinstance(pair, list)
        and len(pair) == 2
        and all(type(n) is int and 0 <= n <= MAX_LAYERS for n in pair)
        for pair in pairs
    ):
        raise AdapterError(
            where, f"layer_replication is {value!r:.60}, expected pairs of numbers", code="LT015"
        )
    count = sum(max(0, end - start) for start, end in pairs)
    if not 0 < count <= MAX_LAYERS:
        raise AdapterError(where, f"layer_replication makes {count} layers", code="LT015")
    return [layer for start, end in pairs for layer in range(start, end)]


def replicate(
    stored_tensors: Mapping[str, Weight], layers: list[int], where: object
) -> Mapping[str, Weight]:
    """Return the tensors of the longer stack; copied layers read the base's own bytes.

    Raises:
        UnsupportedError: The base has no single stack of layers, or fewer than are asked for.
    """
    stacks: dict[str, dict[int, list[tuple[str, Weight]]]] = {}
    tensors: dict[str, Weight] = {}
    for name, stored in stored_tensors.items():
        match = LAYER.fullmatch(name)
        if match is None:
            tensors[name] = stored
        else:
            stack = stacks.setdefault(match["before"], {})
            stack.setdefault(int(match["index"]), []).append((match["after"], stored))
    if len(stacks) != 1:
        found = ", ".join(stacks) or "none"
        raise UnsupportedError(
            where,
            f"layer_replication needs one stack of layers; the base has {found}",
            code="LT015",
        )
    ((before, stack),) = stacks.items()
    for index, layer in enumerate(layers):
        if layer not in stack:
            raise UnsupportedError(
                where,
                f"layer_replication copies layer {layer}, which it does not have",
                code="LT015",
            )
        for after, stored in stack[layer]:
            name = f"{before}.{index}.{after}"
            tensors[name] = replace(stored, spec=replace(stored.spec, name=name))
    return tensors
