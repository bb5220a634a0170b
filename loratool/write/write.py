"""``write``: an adapter of expressions as the files of a scheme, decided from headers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loratool.adapter.config import CONFIG_NAME
from loratool.adapter.part import Part
from loratool.adapter.scheme import KeyScheme, ScaleRule, Spelling
from loratool.errors import OutputError, UnsupportedError
from loratool.files.container import Container
from loratool.files.containers import container_of, is_weights
from loratool.names.pipelines import family_of_encoders, sole_component
from loratool.plan.adapter import AdapterPlan, ModuleOutput, Output
from loratool.write.adapter import NewAdapter
from loratool.write.config import written_config
from loratool.write.experts import stack_experts
from loratool.write.extras import placed_extras, token_names
from loratool.write.metadata import kohya_metadata, module_names, positional_metadata
from loratool.write.naming import is_same_spelling, is_written_native
from loratool.write.notes import output_notes, unknown_notes
from loratool.write.options import WriteOptions
from loratool.write.renaming import Naming, families_of, to_hub, to_native
from loratool.write.scales import placed_scales
from loratool.write.shapes import fitted, padded, slotted
from loratool.write.spelling import Spelled, spelled, with_components
from loratool.write.tensors import alpha_output, part_specs

__all__ = ["check_place", "write"]


def write(new: NewAdapter, scheme: KeyScheme, options: WriteOptions) -> AdapterPlan:
    """Return the plan of ``new`` in ``scheme``.

    Raises:
        UnsupportedError: The scheme cannot express something; the message says what.
        OutputError: A single file has no place for the scheme's configuration.
        OptionError: An option means nothing here.
    """
    rule = scheme.scale if new.scale is None else new.scale
    has_config = scheme.has_config or rule is ScaleRule.CONFIG
    check_place(options.output, scheme.name, has_config=has_config)
    named = _named(new, scheme, options)
    parts = padded(named.parts, options.pad, scheme)
    if rule is ScaleRule.MULTIPLIER:
        parts = stack_experts(parts)
    parts, multiplier = placed_scales(parts, rule, fold=options.fold)
    parts = [slotted(part, scheme) for part in parts]
    names = spelled(parts, scheme, named.family, known=named.known, alone=named.alone)
    name = options.name or new.name or "default"
    modules = [
        ModuleOutput(
            item.part,
            part_specs(item.name, item.part, scheme, name, options.dtype),
            scheme.is_transposed,
            alpha_output(item.name, item.part, scheme, rule),
        )
        for item in names
    ]
    written = [item.part for item in names]
    carried = placed_extras(
        new.extras.items,
        scheme,
        {part.module for part in written},
        has_config=has_config,
        dtype=options.dtype,
    )
    _check_unique(modules, carried)
    config = None
    if has_config:
        config = written_config(new, scheme, _alone(written, named.alone), multiplier)
        config |= options.config
    container = _container(options.output, scheme)
    metadata: dict[str, str] = {}
    if container.has_metadata:
        metadata = {**new.metadata, **_own_metadata(new, scheme, names, carried, named, options)}
    sidecars, left = _files(new, options.output)
    notes = [
        *new.notes,
        *output_notes(written, scheme, is_configured=new.config is not None),
        *unknown_notes(named.parts, named.naming),
        *new.extras.notes,
    ]
    return AdapterPlan(
        parts=tuple(modules),
        carried=tuple(carried),
        measured=new.measured,
        metadata=metadata,
        history=new.history if container.has_metadata else None,
        config=config,
        sidecars=tuple(sidecars),
        weights_name=_weights_name(options.output, scheme),
        stamps=new.stamps,
        container=container,
        file_name=_weights_name(options.output, scheme) or options.output.name,
        is_hashed=scheme.spelling is Spelling.FLAT and container.has_metadata,
        scheme=scheme.name,
        family=named.family,
        notes=tuple(dict.fromkeys(notes)),
        dropped=(*new.dropped, *new.extras.dropped, *left),
    )


def check_place(output: Path, scheme: str, *, has_config: bool) -> None:
    """Refuse a single file as the output where a configuration has to lie beside it.

    Raises:
        OutputError: It is one.
    """
    if has_config and is_weights(output):
        raise OutputError(
            output,
            f"the scheme {scheme!r} keeps its scale in {CONFIG_NAME}, which a single file has "
            "no place for",
            hint=f"name a folder, such as {output.with_suffix('')}",
        )


@dataclass(frozen=True, slots=True)
class _Named:
    """Modules in the naming that is written.

    Attributes:
        parts: The modules.
        naming: The families that they may belong to.
        family: The one that they do, where known.
        known: What is a component for certain.
        alone: The component whose modules go by their own names, if there is one.
    """

    parts: list[Part]
    naming: Naming
    family: str | None
    known: frozenset[str]
    alone: str | None


def _named(new: NewAdapter, scheme: KeyScheme, options: WriteOptions) -> _Named:
    """Return the modules under the names of the component and the convention of the scheme."""
    parts = list(new.parts)
    paths = [part.module for part in parts]
    naming = families_of(paths, options.family or new.family)
    family = options.family or new.family
    if family is None and len(naming.families) == 1:
        family = naming.families[0].name
    family = family or family_of_encoders(paths)
    known = new.components | ({options.component} if options.component else set())
    if scheme.spelling not in (Spelling.PATH, Spelling.BARE_FLAT):
        backbone = naming.families[0].backbone if naming.families else None
        parts = with_components(parts, backbone, known)
        known |= {backbone} if backbone else set()
    base = options.base
    if base is not None:
        parts = [fitted(part, base) for part in parts]
    is_kept = is_same_spelling(new.scheme, scheme, options)
    if is_kept:
        pass
    elif is_written_native(scheme, naming, options.naming, is_native=new.is_native):
        shapes = base.shapes if base else {}
        parts = to_native(parts, naming, shapes)
    else:
        parts = to_hub(parts, naming)
    alone = options.component
    if alone is None and not is_kept:
        alone = sole_component([part.module for part in parts], known)
    return _Named(parts, naming, family, known, alone)


def _alone(parts: Sequence[Part], alone: str | None) -> list[Part]:
    """Return modules under their own names inside the one component that is written."""
    if alone is None:
        return list(parts)
    return [
        replace(
            part,
            module=part.module.removeprefix(f"{alone}."),
            parameter=part.parameter and part.parameter.removeprefix(f"{alone}."),
        )
        for part in parts
    ]


def _own_metadata(
    new: NewAdapter,
    scheme: KeyScheme,
    names: Sequence[Spelled],
    extras: Sequence[Output],
    named: _Named,
    options: WriteOptions,
) -> dict[str, str]:
    """Return the metadata that the scheme itself asks for."""
    found: dict[str, str] = {}
    if scheme.spelling is Spelling.FLAT:
        parts = [item.part for item in names]
        found |= kohya_metadata(new, parts, named.family, options.output.stem)
    if scheme.spelling is Spelling.POSITION:
        found |= positional_metadata(names)
        found |= dict.fromkeys(token_names(extras), "<embed>")
    return found | module_names(names, scheme)


def _check_unique(modules: Sequence[ModuleOutput], carried: Sequence[Output]) -> None:
    names = Counter(
        [
            *(spec.name for item in modules for spec in item.all_specs()),
            *(output.spec.name for output in carried),
        ]
    )
    for name, count in names.most_common(1):
        if count > 1:
            raise UnsupportedError(name, "would be the name of two tensors")


def _files(new: NewAdapter, output: Path) -> tuple[Sequence[Any], list[tuple[str, str]]]:
    if is_weights(output):
        return (), [(sidecar.name, "the output is a single file") for sidecar in new.sidecars]
    return new.sidecars, []


def _container(output: Path, scheme: KeyScheme) -> Container:
    return container_of(output if is_weights(output) else scheme.written_suffix)


def _weights_name(output: Path, scheme: KeyScheme) -> str:
    if is_weights(output):
        return ""
    return scheme.weights_name or f"{output.name}{scheme.written_suffix}"
