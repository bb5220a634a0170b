"""GLoRA (arXiv 2306.07967) as PEFT stores it: ``W ∘ (1 + A) + B``, and a bias of five terms."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from loratool.adapter.model import Site
from loratool.adapter.slots import Slot
from loratool.adapter.variant import WEIGHT, Array, Change, Geometry, Settings, Shapes, Variant

__all__ = ["VARIANT"]

CLAIM = {
    "signs": [
        "glora_A",
        "glora_B",
        "glora_C",
        "glora_D",
        "glora_E",
        "glora_A down",
        "glora_B down",
        "glora_C down",
    ],
    "peft": {
        ".glora_A.X": "glora_A",
        ".glora_B.X": "glora_B",
        ".glora_C.X": "glora_C",
        ".glora_D.X": "glora_D",
        ".glora_E.X": "glora_E",
        ".glora_A.Xd": "glora_A up",
        ".glora_A.Xu": "glora_A down",
        ".glora_B.Xd": "glora_B up",
        ".glora_B.Xu": "glora_B down",
        ".glora_C.Xd": "glora_C up",
        ".glora_C.Xu": "glora_C down",
        ".glora_A.zeros": "glora_A zeros",
        ".glora_B.zeros": "glora_B zeros",
        ".glora_C.zeros": "glora_C zeros",
        ".glora_D.zeros": "glora_D zeros",
        ".glora_E.zeros": "glora_E zeros",
    },
    "peft_types": ["GLORA"],
    "evidence": 2,
    "priority": 10,
}

NAMES: Final = tuple(f"glora_{letter}" for letter in "ABCDE")
A, B, C, D, E = NAMES


class Term:
    """A term of either form: a vector or number, or two factors, of which rows are asked for."""

    def __init__(self, values: Mapping[Slot, Array], name: str) -> None:
        self.plain = values.get(Slot(name))
        self.up, self.down = values.get(Slot(f"{name} up")), values.get(Slot(f"{name} down"))

    def rows(self, first: int, count: int, columns: slice) -> Array:
        """Return some rows and columns; what is the same for all has one of them."""
        if self.up is not None and self.down is not None:
            return self.up[first : first + count] @ self.down[:, columns]
        if self.plain is None:
            return 0.0
        if self.plain.shape[0] == 1:
            return self.plain.reshape(-1)[0]
        return self.plain.reshape((-1, 1))[first : first + count]


class Moved(Change):
    """``W + W ∘ A + B``; of several such all look at the original weight."""

    of_original = True

    def __init__(self, times: Term, plus: Term) -> None:
        self.times = times
        self.plus = plus

    def difference(self, part: Array, row: int, column: int) -> Array:
        """See :class:`Change`."""
        count, columns = part.shape[0], slice(column, column + part.shape[1])
        factors = self.times.rows(row, count, columns)
        return part * factors + (part * 0 + self.plus.rows(row, count, columns))


class MovedBias(Change):
    """``b + b ∘ D + E + W C``."""

    of_original = True

    def __init__(self, times: Term, plus: Term, product: Array) -> None:
        self.times = times
        self.plus = plus
        self.product = product

    def difference(self, part: Array, row: int, column: int) -> Array:
        """See :class:`Change`."""
        count, one = part.shape[0], slice(0, 1)
        added = self.plus.rows(row, count, one)
        own = self.product if isinstance(self.product, float) else self.product[row : row + count]
        return part * self.times.rows(row, count, one) + (part * 0 + added) + own


class PeftGlora(Variant):
    """Terms are of low rank, one number for each output, one for all, or not there."""

    name = "glora"
    words = "GLoRA, a delta that depends on the base's weight"
    is_scaled = False
    needs_base = True
    has_change = True
    bias_needs_weight = True
    fields = frozenset(("config_A_B", "config_C", "config_D_E"))

    def geometry(self, shapes: Shapes, settings: Settings) -> Geometry:
        """See :class:`Variant`."""
        sides = dict.fromkeys(NAMES, (0, 0))
        ranks = [1]
        for name in NAMES:
            plain, up, down = (
                shapes.get(Slot(key)) for key in (name, f"{name} up", f"{name} down")
            )
            if up is not None and down is not None:
                sides[name] = up[0], down[1]
                ranks.append(up[1])
            elif plain is not None:
                sides[name] = (plain[0] if plain[0] > 1 else 0), 0
        out = max(sides[name][0] for name in (A, B, D, E))
        into = max(sides[A][1], sides[B][1], sides[C][0])
        return Geometry(max(ranks), out, into)

    def problems(self, site: Site) -> Iterator[tuple[str, str]]:
        """See :class:`Variant`."""
        for name in NAMES:
            up, down = (site.slots.get(Slot(f"{name} {side}")) for side in ("up", "down"))
            if not {name, f"{name} up", f"{name} down", f"{name} zeros"} & site.slots.keys():
                yield "LT001", f"is {self.words}, but has no {name}"
            if (up is None) != (down is None):
                yield "LT001", f"has one of the two factors of {name}"
            elif up is not None and down is not None:
                shapes = up.spec.shape, down.spec.shape
                if any(len(shape) != 2 for shape in shapes) or shapes[0][1] != shapes[1][0]:
                    yield "LT003", f"has factors of {name} of the shapes {list(map(list, shapes))}"
        for slot, tensor in site.slots.items():
            if not tensor.spec.elements:
                yield "LT002", f"has an empty {slot}: {list(tensor.spec.shape)}"
        found = site.geometry
        for name, (rows, columns) in {
            A: (found.out, found.into),
            B: (found.out, found.into),
            C: (found.into, 1),
            D: (found.out, 1),
            E: (found.out, 1),
        }.items():
            up, down = (site.slots.get(Slot(f"{name} {side}")) for side in ("up", "down"))
            plain = site.slots.get(Slot(name))
            if up is not None and down is not None:
                sides = up.spec.shape[0], down.spec.shape[-1]
                if sides != (rows, columns):
                    yield "LT003", f"has a {name} of {list(sides)}, expected {[rows, columns]}"
            forms = (1,), ((rows,) if name in (D, E) else (rows, 1))
            if plain is not None and plain.spec.shape not in forms:
                yield "LT003", f"has a {name} of shape {list(plain.spec.shape)}, expected {rows}"

    def change(
        self, site: Site, values: Mapping[Slot, Array], shape: tuple[int, ...], scale: float
    ) -> Change:
        """See :class:`Variant`."""
        return Moved(Term(values, A), Term(values, B))

    def changes_bias(self, site: Site) -> bool:
        """See :class:`Variant`."""
        return any(slot.startswith((C, D, E)) and not slot.endswith("zeros") for slot in site.slots)

    def bias_change(self, site: Site, values: Mapping[Slot, Array]) -> Change:
        """See :class:`Variant`."""
        factors = Term(values, C).rows(0, site.in_features, slice(0, 1))
        product = 0.0 if isinstance(factors, float) else values[WEIGHT] @ factors
        return MovedBias(Term(values, D), Term(values, E), product)


VARIANT = PeftGlora()
