"""What rounding costs where factors are only scaled or converted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from loratool.math.factored import norm
from loratool.math.lowrank import LowRank
from loratool.ops.algebra.computing import load_terms
from loratool.ops.algebra.joining import Joint
from loratool.ops.algebra.writing import arithmetic, in_parallel
from loratool.ops.tensors import torch_dtype

__all__ = ["rounding_error"]


def rounding_error(
    changes: Sequence[tuple[Joint, float, float, float]],
    dtypes: Mapping[str, str],
    threads: int | None,
) -> float:
    """Return the relative Frobenius error over all modules, ``‖written - exact‖ / ‖exact‖``.

    Args:
        changes: Modules, with what their B and their A are multiplied by, and the scale that
            the result is applied with.
        dtypes: What each tensor is written in, by its name.
        threads: Number of modules in work at a time.
    """
    kind = arithmetic("cpu")

    def one(change: tuple[Joint, float, float, float]) -> tuple[float, float]:
        joint, up_factor, down_factor, scale = change
        site = joint.terms[0].site
        assert site.up is not None and site.down is not None
        up_dtype = torch_dtype(dtypes[site.up.spec.name])
        down_dtype = torch_dtype(dtypes[site.down.spec.name])
        errors, totals = [], []
        for (delta,) in load_terms(joint, kind):
            up, down = delta.up * up_factor, delta.down * down_factor
            lost_up = up.to(up_dtype).double() - up
            lost_down = down.to(down_dtype).double() - down
            lost = LowRank(
                torch.cat([lost_up, up + lost_up], dim=1), torch.cat([down, lost_down], dim=0)
            )
            errors.append(norm(lost) ** 2)
            totals.append(norm(LowRank(up, down)) ** 2)
        return math.fsum(errors) * scale**2, math.fsum(totals) * scale**2

    found = in_parallel(one, changes, threads=threads)
    total = math.fsum(pair[1] for pair in found)
    return math.sqrt(math.fsum(pair[0] for pair in found) / total) if total else 0.0
