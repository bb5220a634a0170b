"""Adapters on mixtures of experts, whichever of base and adapter has the experts fused."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations
from typing import TYPE_CHECKING, Final

from loratool.adapter.model import FUSED_PARAMETERS, Adapter, Site
from loratool.base.live import ExpertPart
from loratool.base.place import Piece, Place
from loratool.base.region import Region
from loratool.errors import BaseModelError, UnsupportedError
from loratool.names.experts import (
    FUSED,
    TRANSPOSED_MODEL_TYPES,
    fused_part_of,
    registration_index,
)

if TYPE_CHECKING:
    from loratool.base.model import Model

__all__ = [
    "assign_parameters",
    "expert_place",
    "locate_in_fused",
    "locate_parameter",
    "parameter_place",
]

EXPERT: Final = re.compile(r"(?P<container>.+)\.(?P<expert>[0-9]{1,9})\.(?P<leaf>[^.]+)")
LISTED: Final = re.compile(
    r"(?P<container>.+)\.((?P<expert>[0-9]{1,9})\.(?P<leaf>gate_up_proj)"
    r"|(?P<list>gate_up_proj|down_proj)s\.(?P<place>[0-9]{1,9}))"
)
"""One expert's share of a parameter, as code calls it that keeps experts in lists (unsloth)."""
INTERLEAVED: Final = frozenset(("gpt_oss",))
"""Models whose fused gate and up projections alternate row by row."""


def locate_in_fused(site: Site, base: Model) -> tuple[str, Region] | None:
    """Return where a site on one expert's projection goes in a base with fused experts."""
    delta = (site.out_features, site.in_features)
    return _in_fused(site.module, delta if all(delta) else None, base, site.label)


def expert_place(module: str, base: Model) -> Place | None:
    """Return the place of one expert's projection in a base with fused experts.

    Raises:
        UnsupportedError: The base interleaves it with another one, row by row.
    """
    found = _in_fused(module, None, base, module)
    if found is None:
        return None
    name, region = found
    stored = base.tensors[name]
    pair = (region.rows, region.columns)
    shape = pair[::-1] if region.transposed else pair
    return Place(module, shape, stored.spec.dtype, (Piece(name, stored, region),))


def _in_fused(
    module: str, delta: tuple[int, int] | None, base: Model, label: str
) -> tuple[str, Region] | None:
    """Return tensor and region of one expert's projection.

    Args:
        module: The projection.
        delta: ``(out, in)`` of what goes there, if that is known; it settles which way round
            the base has it, where the shapes differ.
        base: The base.
        label: What to call it in errors.
    """
    part = base.live.expert(module) or _expert_part(module)
    name = fused_tensor(part.parameter, base) if part is not None else None
    if part is None or name is None:
        return None
    shape = base.shape(name)
    if len(shape) != 3 or part.expert >= shape[0]:
        raise BaseModelError(label, f"the base's {name!r} has shape {list(shape)}", code="LT022")
    _, rows, columns = shape
    is_interleaved = bool(base.config.model_types & INTERLEAVED) or _is_interleaved(part, base)
    if is_interleaved and (part.parts > 1 or _is_interleaved(part, base)):
        raise UnsupportedError(
            label, f"the base interleaves gate and up in {name!r}, which is not supported"
        )
    declared = _is_declared(part.parameter, base)
    if delta is None:
        outer, into = (columns, rows) if declared else (rows, columns)
        delta = (outer // part.parts, into)
    out, into = delta
    transposed = (into, out * part.parts) == (rows, columns)
    if (out * part.parts, into) == (rows, columns):
        transposed = transposed and declared
    elif not transposed:
        raise BaseModelError(
            label, f"a delta of {[out, into]} does not fit {name!r} of {list(shape)}", code="LT022"
        )
    first_row, first_column = part.expert * rows, 0
    if transposed:
        first_column = part.index * out
    else:
        first_row += part.index * out
    region = Region(
        *((into, out) if transposed else (out, into)),
        first_row=first_row,
        first_column=first_column,
        transposed=transposed,
        full_width=columns,
    )
    return name, region


def _expert_part(module: str) -> ExpertPart | None:
    listed = LISTED.fullmatch(module)
    if listed is not None:
        leaf, place = listed["leaf"] or listed["list"], listed["expert"] or listed["place"]
        return ExpertPart(f"{listed['container']}.{leaf}", int(place), 0, 1)
    match = EXPERT.fullmatch(module)
    part = fused_part_of(match["leaf"]) if match else None
    if match is None or part is None:
        return None
    parameter = f"{match['container']}.{part.parameter}"
    return ExpertPart(parameter, int(match["expert"]), part.index, part.parts)


def _is_interleaved(part: ExpertPart, base: Model) -> bool:
    stack = base.live.stack(part.parameter)
    return stack is not None and stack.is_interleaved


def _is_declared(parameter: str, base: Model) -> bool:
    """Whether the files have the experts' ``parameter`` as ``(experts, in, out)``."""
    stack = base.live.stack(parameter)
    is_turned = stack is not None and stack.is_turned
    return is_turned != bool(base.config.model_types & TRANSPOSED_MODEL_TYPES)


def parameter_place(parameter: str, base: Model) -> Place | None:
    """Return the place of a stack of experts, in one parameter or in a tensor for each.

    Which way round square ones lie is told by the model type alone; an adapter's release may
    know better (:func:`locate_parameter`).
    """
    if parameter.rpartition(".")[2] not in FUSED_PARAMETERS:
        return None
    shape = fused_shape(parameter, base)
    if shape is None or len(shape) != 3:
        return None
    experts, rows, columns = shape
    transposed = _is_declared(parameter, base)
    regions = _stacked_regions(parameter, shape, base, transposed=transposed)
    pieces = tuple(Piece(name, base.tensors[name], region) for name, region in regions)
    pair = (columns, rows) if transposed else (rows, columns)
    return Place(parameter, pair, pieces[0].tensor.spec.dtype, pieces, experts)


def fused_tensor(parameter: str, base: Model) -> str | None:
    """Return the name of the base's tensor that is ``parameter``, or ``None``."""
    stack = base.live.stack(parameter)
    if stack is not None:
        return stack.whole
    module, _, leaf = parameter.rpartition(".")
    return base.tensor(module, leaf) if module else None


def fused_shape(parameter: str, base: Model) -> tuple[int, ...] | None:
    """Return the shape that ``parameter`` has, or would have if the base's experts were fused."""
    name = fused_tensor(parameter, base)
    if name is not None:
        return base.shape(name)
    experts = _expert_tensors(parameter, base)
    if not experts:
        return None
    *stacked, rows, columns = base.shape(experts[0][0])
    return (*(stacked or (len(experts),)), rows * len(experts[0]), columns)


def _expert_tensors(parameter: str, base: Model) -> Sequence[Sequence[str]]:
    """Return, for each expert, the names of the tensors that make up the fused ``parameter``.

    There may be one only, of tensors that stack all experts.
    """
    stack = base.live.stack(parameter)
    if stack is not None:
        return stack.tensors
    module, _, leaf = parameter.rpartition(".")
    container = base.index.find(module)
    if container is None or leaf not in FUSED:
        return []
    found: list[list[str]] = []
    while True:
        names = []
        for alternatives in FUSED[leaf]:
            for alternative in alternatives:
                name = f"{container}.{len(found)}.{alternative}.weight"
                if name in base.tensors:
                    names.append(name)
        if len(names) != len(FUSED[leaf]):
            return found
        found.append(names)


def assign_parameters(adapter: Adapter, base: Model) -> dict[str, str]:
    """Return which parameter each site with ``parameters`` adapts: label to parameter.

    Several on one module nest, the first registered innermost. Shapes decide where they can,
    the order of registration where they cannot.
    """
    assigned: dict[str, str] = {}
    modules = dict.fromkeys(site.module for site in adapter.sites if site.parameters)
    for module in modules:
        sites = [site for site in adapter.sites if site.parameters and site.module == module]
        sites.sort(key=lambda site: -site.nesting)
        candidates = [
            parameter for parameter in sites[0].parameters if fused_shape(parameter, base)
        ]
        if not candidates and base.tensor(module, "weight") is not None:
            continue  # an ordinary module after all
        if len(candidates) < len(sites):
            raise BaseModelError(
                f"{adapter.path}: {module}",
                f"the base has {len(candidates)} of the parameters "
                f"{', '.join(sites[0].parameters)}; the adapter has {len(sites)} deltas",
                code="LT022",
            )
        if len(candidates) > 7:
            raise BaseModelError(
                module, f"{len(candidates)} target parameters on one module", code="LT022"
            )
        options = [
            option
            for option in permutations(candidates, len(sites))
            if all(
                _fits(site, parameter, adapter, base)
                for site, parameter in zip(sites, option, strict=True)
            )
        ]
        if len(options) > 1:
            options = [option for option in options if _is_registered_order(option)]
        if len(options) != 1:
            found = "no" if not options else "more than one"
            raise BaseModelError(
                f"{adapter.path}: {module}",
                f"{found} assignment of its {len(sites)} deltas to {', '.join(candidates)} fits "
                "the base's shapes",
                code="LT022",
            )
        for site, parameter in zip(sites, options[0], strict=True):
            assigned[site.label] = parameter
    return assigned


def _is_registered_order(option: tuple[str, ...]) -> bool:
    places = [registration_index(parameter.rpartition(".")[2]) for parameter in option]
    known = [place for place in places if place is not None]
    return len(known) == len(places) and known == sorted(known)


def _fits(site: Site, parameter: str, adapter: Adapter, base: Model) -> bool:
    shape = fused_shape(parameter, base)
    assert shape is not None and adapter.config is not None
    if len(shape) == 2:
        shape = (1, *shape)
    if len(shape) != 3:
        return False
    experts, rows, columns = shape
    rank = adapter.config.rank_for(parameter)
    pair = (site.out_features, site.in_features)
    return site.rows == experts * rank and pair in ((rows, columns), (columns, rows))


def locate_parameter(
    site: Site, parameter: str, adapter: Adapter, base: Model
) -> list[tuple[str, Region]]:
    """Return every place where a site on a raw parameter goes."""
    shape = fused_shape(parameter, base)
    assert shape is not None
    fused = fused_tensor(parameter, base)
    if len(shape) == 2 and fused is not None:
        return [(fused, Region(*shape, transposed=False))]
    transposed = _is_transposed(site, parameter, shape, adapter, base)
    return _stacked_regions(parameter, shape, base, transposed=transposed)


def _stacked_regions(
    parameter: str, shape: tuple[int, ...], base: Model, *, transposed: bool
) -> list[tuple[str, Region]]:
    """Return tensors and regions of all experts of a stack."""
    experts, rows, columns = shape
    fused = fused_tensor(parameter, base)
    if fused is not None:
        region = Region(rows, columns, transposed=transposed, experts=experts)
        stack = base.live.stack(parameter)
        if stack is not None and stack.is_interleaved:
            region = replace(region, exchanged=(1, 2, rows // 2))
        return [(fused, region)]
    places = []
    for expert, names in enumerate(_expert_tensors(parameter, base)):
        for index, name in enumerate(names):
            region = Region(
                rows // len(names),
                columns,
                transposed=transposed,
                experts=experts,
                expert=expert if len(base.shape(name)) == 2 else None,
                part=(index, len(names)),
            )
            places.append((name, region))
    return places


def _is_transposed(
    site: Site, parameter: str, shape: tuple[int, ...], adapter: Adapter, base: Model
) -> bool:
    """Whether the delta ``(out, in)`` lies transposed in the parameter ``(E, rows, columns)``.

    Square parameters leave it to the PEFT release: up to 0.18 A always spanned the first
    axis; 0.19.0 had it the wrong way round for some; since then A spans the first axis only
    where the model declares its experts transposed.
    """
    _, rows, columns = shape
    if rows != columns:
        return site.in_features == rows
    declared = _is_declared(parameter, base)
    version = str(adapter.field("peft_version") or "0.17.0")
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:3])
    if numbers < (0, 19, 0):
        return True
    if numbers == (0, 19, 0) or not base.config.model_types:
        raise BaseModelError(
            site.label,
            f"{parameter} is square {list(shape)}, and PEFT {version} does not settle how its "
            "delta lies",
            hint="save the adapter again with a current PEFT",
            code="LT022",
        )
    return declared
