"""What a layout is: how one way to cut a model into files names and fuses its modules."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratool.base.config import ModelConfig

if TYPE_CHECKING:
    from loratool.base.live import LiveModel
    from loratool.base.ties import Sharing
    from loratool.codecs.weights import Weight

__all__ = ["Fused", "Headers", "Layout", "Stretch"]


@dataclass(frozen=True, slots=True, eq=False)
class Headers:
    """What a layout is recognised by: no tensor data is read.

    Attributes:
        modules: The modules of the files that have a weight, as the files spell them.
        config: What the model says of itself.
        components: The sub-folders that the files are in; empty where they are in none.
        owners: What else has parameters, none of them a weight.
    """

    modules: Collection[str]
    config: ModelConfig
    components: tuple[str, ...] = ()
    owners: Collection[str] = ()


@dataclass(frozen=True, slots=True)
class Fused:
    """A projection that is several, one after the other along the rows of its weight.

    Attributes:
        whole: The module that holds all of them.
        parts: The modules that they are where each has a weight of its own, in their order.
        rows: The rows of each; empty where they are equal.
        paired: The attention heads of each part whose rows are in pairs for rotary embeddings in
            the whole, and in halves where it is apart; 0 for the others. Empty for none.
    """

    whole: str
    parts: tuple[str, ...]
    rows: tuple[int, ...] = ()
    paired: tuple[int, ...] = ()

    def sizes(self, total: int) -> tuple[int, ...] | None:
        """Return the rows of each part of ``total``; ``None`` where they do not add up."""
        count = len(self.parts)
        rows = self.rows or (total // count,) * count
        return rows if sum(rows) == total and min(rows) > 0 else None


@dataclass(frozen=True, slots=True)
class Stretch:
    """Some outputs of a module, as rows of a tensor.

    Attributes:
        tensor: The tensor.
        row: Which of its rows is the first.
        first: Which output of the module that is.
        count: How many there are.
        exchanged: Their axes, as of a :class:`~loratool.base.region.Region`.
    """

    tensor: str
    row: int
    first: int
    count: int
    exchanged: tuple[int, int, int] | None = None


class Layout:
    """One layout. A file in ``layouts`` defines one as ``LAYOUT``; what it leaves out is plain.

    Attributes:
        name: What it is called.
        is_linear: Whether all weights are ``(out, in)``, those too that libraries have turned.
    """

    name: str = ""
    is_linear: bool = False

    def claims(self, headers: Headers) -> int:
        """Return how specifically this layout fits; 0 if it does not.

        The highest claim wins, whatever the order; two highest claims are an error.
        """
        raise NotImplementedError

    def paths(self, headers: Headers) -> Mapping[str, str]:
        """Return the path of each module that the files spell otherwise than libraries do."""
        return {}

    def parameters(self, headers: Headers) -> Mapping[str, str]:
        """Return the path of the module that libraries have for a tensor without one, by its name.

        A name that the files do not have means nothing.
        """
        return {}

    def is_turned(self, path: str) -> bool:
        """Whether one of these :meth:`parameters` is the ``(in, out)`` of a linear layer."""
        return False

    def family(self, headers: Headers) -> str | None:
        """Return the family of diffusion models that the backbone is of, where that is known."""
        return None

    def components(self, headers: Headers) -> tuple[str, ...]:
        """Return the components of a pipeline that the files hold; none for a single model."""
        return headers.components

    def fused(self, module: str, config: ModelConfig) -> Fused | None:
        """Return the fused projection that ``module`` is, or is a part of."""
        return None

    def can_add(self, name: str, config: ModelConfig) -> bool:
        """Whether a loader takes a tensor that the files do not have."""
        return True

    def exchanged(self, path: str, rows: int, config: ModelConfig) -> tuple[int, int, int] | None:
        """Return the axes of the outputs of a module, the last two of which are exchanged.

        Args:
            path: The module.
            rows: How many outputs it has.
            config: What the model says of itself.
        """
        return None

    def pairs_biases(self, config: ModelConfig) -> bool:
        """Whether biases lie as the outputs of their weights do, where these are exchanged."""
        return True

    def stretches(
        self, path: str, rows: Callable[[str], int | None], config: ModelConfig
    ) -> tuple[Stretch, ...]:
        """Return where the outputs of a module lie that is in no tensor by itself.

        Args:
            path: The module.
            rows: Returns how many rows a tensor has; ``None`` where there is none.
            config: What the model says of itself.

        Returns:
            All of its outputs in their order; nothing where it is not told.
        """
        return ()

    def unlike(self, path: str, config: ModelConfig) -> str | None:
        """Return why a module of the files is none of libraries, by itself; ``None`` if it is."""
        return None

    def live(self, config: ModelConfig, tensors: Mapping[str, Weight]) -> LiveModel | None:
        """Return what the live model calls the tensors; ``None`` where the model type tells."""
        return None

    def sharings(self, names: Mapping[str, Weight]) -> tuple[Sharing, ...] | None:
        """Return what tensors share one weight; ``None`` where names and configuration tell."""
        return None
