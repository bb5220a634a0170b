"""What rounding costs where factors are only scaled or converted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from loratool.files.spec import StoredTensor
from loratool.math.factored import norm
from loratool.math.lowrank import LowRank
from loratool.ops.algebra.joining import Joint
from loratool.ops.algebra.writing import arithmetic, in_parallel
from loratool.ops.factors import site_deltas
from loratool.ops.tensors import torch_dtype

__all__ = ["rounding_error"]

Change = tuple[Joint, Mapping[str, float], float]


def rounding_error(
    changes: Sequence[Change], dtypes: Mapping[str, str], threads: int | None
) -> float:
    """Return the relative Frobenius error over all modules, ``‖written - exact‖ / ‖exact‖``.

    Args:
        changes: Modules, what each of their tensors is multiplied by, and the scale that the
            result is applied with.
        dtypes: What each tensor is written in, by its name.
        threads: Number of modules in work at a time.
    """
    kind = arithmetic("cpu")

    def one(change: Change) -> tuple[float, float]:
        joint, factors, scale = change
        (term,) = joint.terms

        def scaled(stored: StoredTensor, values: Tensor) -> Tensor:
            return values * factors.get(stored.spec.name, 1.0)

        def rounded(stored: StoredTensor, values: Tensor) -> Tensor:
            return scaled(stored, values).to(torch_dtype(dtypes[stored.spec.name])).double()

        exact, written = (
            site_deltas(term.site, term.adapter, kind, edit) for edit in (scaled, rounded)
        )
        errors, totals = [], []
        for true, made in zip(exact, written, strict=True):
            lost = LowRank(
                torch.cat([made.up - true.up, made.up], dim=1),
                torch.cat([true.down, made.down - true.down], dim=0),
            )
            errors.append(norm(lost) ** 2)
            totals.append(norm(LowRank(true.up, true.down)) ** 2)
        return math.fsum(errors) * scale**2, math.fsum(totals) * scale**2

    found = in_parallel(one, changes, threads=threads)
    total = math.fsum(pair[1] for pair in found)
    return math.sqrt(math.fsum(pair[0] for pair in found) / total) if total else 0.0
