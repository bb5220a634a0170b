"""How a delta lies in the stored weight: as it is, or transposed. Decided by the layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from loratool.adapter.model import Kind, Site
from loratool.base.region import Region
from loratool.codecs.weights import Weight
from loratool.errors import BaseModelError
from loratool.names.conv1d import CONV1D_LEAVES
from loratool.names.embeddings import is_embedding
from loratool.names.pipelines import component_of
from loratool.names.tied import EMBEDDING_LEAVES

if TYPE_CHECKING:
    from loratool.base.model import Model

__all__ = [
    "folded_kernel",
    "is_conv1d_by_shape",
    "matrix_shape",
    "mismatch",
    "natural_region",
    "natural_shape",
    "region_for",
]


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the matrix that a weight of ``shape`` is seen as: rows times everything else.

    Fused experts ``(E, rows, columns)`` are seen as ``(E · rows, columns)`` by their regions.
    """
    if not shape:
        return (1, 1)
    if len(shape) == 1:
        return (shape[0], 1)
    return (shape[0], math.prod(shape[1:]))


def is_conv1d_by_shape(tensors: Mapping[str, Weight]) -> bool | None:
    """Whether the layers called ``c_attn`` or ``c_fc`` widen along their second axis.

    ``None`` where there are none of them, or only square ones.
    """
    for name, stored in tensors.items():
        if name.endswith((".c_attn.weight", ".c_fc.weight")):
            shape = stored.spec.shape
            if len(shape) == 2 and shape[0] != shape[1]:
                return shape[0] < shape[1]
    return None


def natural_region(module: str, shape: tuple[int, ...], base: Model) -> Region:
    """Return how the whole weight of ``module`` lies in a tensor of ``shape``, by its layer."""
    rows, columns = matrix_shape(shape)
    is_turned = len(shape) == 2 and (is_embedding(module) or bool(base.is_conv1d(module)))
    return Region(rows, columns, transposed=is_turned)


def natural_shape(shape: tuple[int, ...], *, transposed: bool) -> tuple[int, ...]:
    """Return ``(out, in, *kernel)`` of a tensor of ``shape``."""
    return shape[::-1] if transposed else shape


def region_for(
    site: Site, module: str, shape: tuple[int, ...], base: Model, *, is_flagged: bool = False
) -> Region:
    """Return where the delta of an ordinary site goes in a weight of ``shape``.

    Args:
        site: Complete; its factors, if it has such, of two dimensions or more.
        module: The base's module, for its layer kind.
        shape: Shape of the base's weight.
        base: The base.
        is_flagged: Whether the configuration says ``fan_in_fan_out``. The flag belongs to
            whichever layer came last, so it settles nothing; it only forbids to assume.

    Raises:
        BaseModelError: The shapes do not fit, or nothing tells how the layer stores its weight.
    """
    rows, columns = matrix_shape(shape)
    if not site.is_plain:
        return _changed(site, module, shape, base, is_flagged=is_flagged)
    out = site.out_features
    into = site.variant.width(site) if site.down is None else math.prod(site.down.spec.shape[1:])
    if site.kind is Kind.EMBEDDING:
        if (rows, columns) == (into, out):
            return Region(rows, columns, transposed=True)
        raise mismatch(site, shape, (into, out))
    if len(shape) > 2 or site.kind is Kind.CONV:
        return _convolution(site, shape, out, into)
    normal = _fits(site, rows, out) and _fits(site, columns, into)
    flipped = (rows, columns) == (into, out)
    if normal and not flipped:
        return Region(rows, columns)
    if flipped and not normal:
        return Region(rows, columns, transposed=True)
    if not normal:
        raise mismatch(site, shape, (out, into))
    turned = _is_turned(site, module, shape, base, is_flagged=is_flagged)
    return Region(rows, columns, transposed=turned)


def _changed(
    site: Site, module: str, shape: tuple[int, ...], base: Model, *, is_flagged: bool
) -> Region:
    """Return where a variant without A and B changes a weight of ``shape``."""
    rows, columns = matrix_shape(shape)
    normal = len(shape) > 1 and site.variant.places(site, shape)
    flipped = len(shape) == 2 and site.variant.places(site, shape[::-1])
    if not normal and not flipped:
        raise mismatch(site, shape, (site.out_features, site.in_features))
    turned = flipped
    if normal and flipped and site.kind is not Kind.EMBEDDING:
        turned = _is_turned(site, module, shape, base, is_flagged=is_flagged)
    return Region(rows, columns, transposed=turned)


def _is_turned(
    site: Site, module: str, shape: tuple[int, ...], base: Model, *, is_flagged: bool
) -> bool:
    """Whether the layer stores its weight as ``(in, out)``, where its shape does not tell.

    Raises:
        BaseModelError: Nothing tells.
    """
    if module.rpartition(".")[2] in EMBEDDING_LEAVES:
        return True
    if base.is_turned(module):
        return True
    if component_of(site.module)[0] is not None:
        return False  # no model of a pipeline is built of Conv1D
    conv1d = base.is_conv1d(module)
    if conv1d is None and not is_flagged and module.rpartition(".")[2] not in CONV1D_LEAVES:
        conv1d = False
    if conv1d is None:
        raise BaseModelError(
            site.label,
            f"a square weight {list(shape)}, and nothing tells whether it is stored as (in, out)",
            hint="give the folder with the base's config.json, which names the model type",
            code="LT022",
        )
    return conv1d


def _fits(site: Site, size: int, found: int) -> bool:
    """Whether a factor spans ``size``, or a divisor of it where the variant stores less.

    BD-LoRA stores only the blocks on its diagonal; QALoRA's A sees sums over groups of inputs.
    """
    is_compact = site.variant.is_narrow
    return found == size or (is_compact and found > 0 and size % found == 0)


def _convolution(site: Site, shape: tuple[int, ...], out: int, into: int) -> Region:
    rows, columns = matrix_shape(shape)
    if (out, into) == (rows, columns):
        return Region(rows, columns)
    if folded_kernel(site, shape) > 1:
        return Region(out, into)
    if out == rows and columns and into % columns == 0:
        raise BaseModelError(
            site.label,
            f"adapts a grouped convolution {list(shape)}; its delta is dense over all channels",
            code="LT022",
        )
    raise mismatch(site, shape, (out, into))


def folded_kernel(site: Site, shape: tuple[int, ...]) -> int:
    """Return the width of the kernel that loralib folds into both factors of a convolution.

    There ``(B @ A)``, of shape ``(out · k, in · k)``, is read as ``(out, in, k, k)``. A has r · k
    rows, and alpha is divided by r. It is 1 where no kernel is folded.

    Args:
        site: The site.
        shape: The base's weight.
    """
    down, up = site.down, site.up
    if down is None or up is None or len(down.spec.shape) != 2 or len(shape) != 4:
        return 1
    out, into, kernel, other = shape
    is_folded = (up.spec.shape[0], down.spec.shape[1]) == (out * kernel, into * kernel)
    return kernel if is_folded and kernel == other else 1


def mismatch(site: Site, shape: tuple[int, ...], expected: tuple[int, int]) -> BaseModelError:
    """Return the error that a delta has another shape than the base's weight.

    Args:
        site: The delta's.
        shape: The weight's.
        expected: The delta's; 0 where it does not tell.
    """
    sizes = ", ".join(str(size) if size else "any" for size in expected)
    return BaseModelError(
        site.label,
        f"the base's weight has shape {list(shape)}, the adapter's delta [{sizes}]",
        hint="is this the base that the adapter was trained on?",
        code="LT022",
    )
