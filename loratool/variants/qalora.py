"""QA-LoRA (arXiv 2309.14717): A may see the mean of each group of inputs."""

from __future__ import annotations

from loratool.adapter.model import Site
from loratool.adapter.plain import Plain
from loratool.adapter.variant import Array, Read

__all__ = ["VARIANT"]

CLAIM = {"flags": ["use_qalora"], "priority": 1}


class QaLora(Plain):
    """Only the base's shape tells whether A has a column for each input."""

    name = "qalora"
    words = "a qalora"
    is_narrow = True
    needs_shape = True
    undetermined = "may be a QA-LoRA whose A sees groups of inputs; only the base's shape can tell"
    remedy = "merge it into its base, or set use_qalora to false if A is (r, in)"

    def width(self, site: Site, shape: tuple[int, ...] | None = None) -> int:
        """See :class:`Variant`."""
        return super().width(site) if shape is None else shape[-1]

    def factors(self, site: Site, read: Read, width: int | None = None) -> tuple[Array, Array]:
        """See :class:`Variant`."""
        from loratool.math.namespace import array_namespace

        down, up = super().factors(site, read)
        if width is not None and down.shape[1] != width:
            # PEFT feeds A the mean of each group of inputs, times the number of groups.
            group = width // down.shape[1]
            factor = down.shape[1] / group
            xp = array_namespace(down)
            spread = xp.broadcast_to(down[:, :, None], (*down.shape, group))
            down = spread.reshape((down.shape[0], -1)) * factor
        return down, up


VARIANT = QaLora()
