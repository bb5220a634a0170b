"""AdaLoRA (arXiv 2303.10512): ``B diag(E) A`` with ranks that were pruned."""

from __future__ import annotations

from loratool.adapter.config import LoraConfig
from loratool.adapter.model import Site
from loratool.adapter.plain import Plain
from loratool.adapter.scaling import Scaling
from loratool.adapter.slots import Slot

__all__ = ["VARIANT"]

CLAIM = {"signs": ["singular"], "peft_types": ["ADALORA"], "priority": 3}


class AdaLora(Plain):
    """PEFT divides alpha by the rank before pruning, and by 1e-5 more."""

    name = "adalora"
    is_compact = True
    between = (Slot.SINGULAR,)

    def scaling(self, site: Site, config: LoraConfig | None) -> Scaling | None:
        """See :class:`Variant`."""
        if config is None or Slot.ALPHA in site.slots:
            return None
        initial = config.initial_rank or site.rows
        alpha = config.alpha if config.alpha > 0 else float(initial)
        return Scaling(alpha, initial, epsilon=1e-5)


VARIANT = AdaLora()
