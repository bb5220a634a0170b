"""``write``: an adapter of expressions as the files of a scheme, decided from headers."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from loratool.adapter.part import Part
from loratool.adapter.scheme import Context, Scheme, Spelled, Told, Written
from loratool.errors import OptionError, OutputError, UnsupportedError
from loratool.files.container import Container
from loratool.files.containers import container_of, is_weights
from loratool.names.paths.component import with_component
from loratool.names.pipelines import (
    ENCODERS,
    component_of,
    family_of_encoders,
    sole_component,
)
from loratool.plan.adapter import AdapterPlan, ModuleOutput, Output
from loratool.schemes import DEFAULT_SCHEME, scheme_named
from loratool.write.adapter import NewAdapter
from loratool.write.card import adapter_card
from loratool.write.conventions import Naming, families_of, to_hub, to_native, without_foreign
from loratool.write.extras import placed_extras
from loratool.write.notes import dtype_notes, unknown_notes
from loratool.write.options import WriteOptions
from loratool.write.refusals import check_counterparts
from loratool.write.shapes import fitted, padded, slotted
from loratool.write.sidecars import without_room
from loratool.write.tensors import alpha_output, part_specs

__all__ = ["check_place", "write"]


ALONE: Final = ".gguf"
"""How files are called that one scheme alone is written in."""


def write(new: NewAdapter, scheme: Scheme, options: WriteOptions) -> AdapterPlan:
    """Return the plan of ``new`` in ``scheme``.

    Raises:
        UnsupportedError: The scheme cannot express something; the message says what.
        OutputError: A single file has no place for the scheme's configuration.
        OptionError: An option means nothing here.
    """
    if not scheme.is_written:
        raise UnsupportedError(
            f"scheme {scheme.name}",
            "is read, and not written",
            hint=f"write another one: loratool convert ADAPTER --to {DEFAULT_SCHEME} -o OUT",
        )
    check_place(options.output, scheme.name, scheme.settings.file)
    scheme = scheme.of(_told(new, options))
    if scheme.home.dtype and options.dtype is None and new.scheme != scheme.name:
        options = replace(options, dtype=scheme.home.dtype)
    named = _named(new, scheme, options)
    try:
        parts = padded(scheme.roles.cut(named.parts), options.pad, scheme)
        parts = scheme.roles.together(parts)
        parts = scheme.scale.place(parts, fold=options.fold)
        parts = slotted(parts, scheme)
    except UnsupportedError:
        _check_names(named, scheme)  # what has no name needs no other place
        raise
    if (is_native := named.is_native) is not None:
        crosses = new.is_native != is_native
        check_counterparts(
            new.parts, named.naming, scheme, named.known, is_native=is_native, crosses=crosses
        )
    names = _spelled(parts, scheme, named)
    name = options.name or new.name or "default"
    modules = [
        ModuleOutput(
            item.part,
            part_specs(item.name, item.part, scheme, name, options.dtype),
            scheme.roles.is_transposed,
            alpha_output(item.name, item.part, scheme),
        )
        for item in names
    ]
    adapted = {item.part.module for item in names}
    carried = placed_extras(new.extras.items, scheme, adapted, dtype=options.dtype)
    _check_unique(modules, carried)
    written = _written(new, scheme, options, names, carried, named)
    config = scheme.settings.config(replace(written, name=name))
    if config is not None:
        config |= options.config
    container = _container(options.output, scheme)
    metadata: dict[str, str] = {}
    if container.has_metadata:
        paths = {item.name: item.part.module for item in names}
        own = scheme.settings.metadata(written)
        metadata = {**new.metadata, **own, **scheme.paths.record(paths)}
    sidecars, left = _files(new, options.output)
    recorded_base = (config or new.config or {}).get("base_model_name_or_path")
    card, sidecars = adapter_card(
        sidecars,
        scheme,
        base=recorded_base,
        family=named.family,
        former=scheme_named(new.scheme) if new.scheme not in ("", scheme.name) else None,
        is_wanted=new.history is None or new.history.is_carded,
    )
    notes = [
        *new.notes,
        *scheme.settings.notes(written),
        *dtype_notes([item.part for item in names]),
        *unknown_notes(named.parts, named.naming, named.known),
        *new.extras.notes,
    ]
    return AdapterPlan(
        parts=tuple(modules),
        carried=tuple(carried),
        measured=new.measured,
        metadata=metadata,
        history=new.history,
        card=card,
        config=config,
        config_name=scheme.settings.file,
        format_config=scheme.settings.dump,
        sidecars=sidecars,
        weights_name=_weights_name(options.output, scheme),
        stamps=new.stamps,
        container=container,
        file_name=_weights_name(options.output, scheme) or options.output.name,
        seal=scheme.seal if container.has_metadata else None,
        scheme=scheme.name,
        family=named.family,
        notes=tuple(dict.fromkeys(notes)),
        dropped=(*new.dropped, *new.extras.dropped),
        left_behind=(*new.left_behind, *left),
    )


def _told(new: NewAdapter, options: WriteOptions) -> Told:
    """Return what is known of the model that an adapter is for."""
    told = options.base.told if options.base is not None else options.told
    return told or replace(new.told or Told(), metadata=new.metadata)


def check_place(output: Path, scheme: str, config_name: str) -> None:
    """Refuse a single file as the output where a configuration has to lie beside it.

    Args:
        output: Where it goes.
        scheme: What is written.
        config_name: What the configuration is called; empty where there is none.

    Raises:
        OutputError: It is one.
    """
    if config_name and is_weights(output):
        raise OutputError(
            output,
            f"the scheme {scheme!r} keeps its scale in {config_name}, which a single file has "
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
        is_native: Whether a backbone goes by the names of original checkpoints; ``None`` where
            names stay what they are.
    """

    parts: list[Part]
    naming: Naming
    family: str | None
    known: frozenset[str]
    alone: str | None
    is_native: bool | None


def _named(new: NewAdapter, scheme: Scheme, options: WriteOptions) -> _Named:
    """Return the modules under the names of the component and the convention of the scheme."""
    parts = list(new.parts)
    paths = [part.module for part in parts]
    base = options.base
    told = base.family if base is not None else None
    naming = families_of(paths, options.family or new.family, told)
    family = options.family or new.family
    if family is None and len(naming.families) == 1:
        family = naming.families[0].name
    family = family or family_of_encoders(paths)
    known = new.components | ({options.component} if options.component else set())
    if scheme.paths.has_components:
        backbone = naming.families[0].backbone if naming.families else None
        parts = [
            # A flat name that nobody knows is none of a module inside anything.
            part
            if "." not in part.module and scheme.keys.accepts(part.module)
            else replace(part, module=with_component(part.module, backbone, known))
            for part in parts
        ]
        known |= {backbone} if backbone else set()
    if base is not None:
        parts = [fitted(part, base) for part in parts]
    is_native = None
    if not _keeps_paths(new.scheme, scheme, options):
        own = naming.of(scheme.paths)
        if options.keeps_naming and new.scheme == scheme.name and own is naming:
            is_native = new.is_native
        else:
            is_native = _is_written_native(new, scheme, naming, options.naming)
            parts = list(without_foreign(parts, naming))
        shapes = base.shapes if base else {}
        if not is_native or own is not naming:
            parts = to_hub(parts, naming)
        if is_native:
            parts = to_native(parts, own, shapes)
    alone = options.component
    if alone is None and is_native is not None:
        alone = sole_component([part.module for part in parts], known)
        if alone in ENCODERS and len(new.components) > 1:
            alone = None  # of a model with others, which its paths alone do not tell
    return _Named(parts, naming, family, known, alone, is_native)


def _keeps_paths(source: str, scheme: Scheme, options: WriteOptions) -> bool:
    """Whether paths stay what they are: both schemes have those of one model.

    Args:
        source: The scheme that they come in; empty for none.
        scheme: The scheme that is written.
        options: What was asked for.
    """
    is_asked = options.component is not None or options.naming is not None
    if is_asked or not source or not scheme.paths.is_dotted:
        return False
    return scheme_named(source).paths.is_dotted


def _is_written_native(new: NewAdapter, scheme: Scheme, naming: Naming, wish: str | None) -> bool:
    """Whether the names of original checkpoints are written.

    Raises:
        OptionError: They are asked for, and the scheme never has them.
    """
    families = [family.name for family in naming.families]
    found = scheme.paths.writes_native(wish, families, is_native=new.is_native)
    if found is None and wish == "native":
        raise OptionError("--naming", f"the scheme {scheme.name!r} has diffusers' names only")
    return bool(found)


def _spelled(parts: Sequence[Part], scheme: Scheme, named: _Named) -> list[Spelled]:
    """Return ``parts`` with what ``scheme`` calls their modules, in the order of their paths.

    Raises:
        UnsupportedError: The scheme cannot name one of them, or two by one name.
    """
    context = Context(scheme.name, scheme.keys.accepts, named.family, named.known, named.alone)
    names = scheme.paths.spell([part.module for part in parts], context)
    found: dict[str, list[Part]] = defaultdict(list)
    for name, part in zip(names, parts, strict=True):
        found[name].append(part)
    for name, same in found.items():
        if len({part.nesting for part in same}) < len(same):
            raise UnsupportedError(
                f"scheme {scheme.name}",
                f"{same[0].module!r} and {same[1].module!r} would both be {name!r}",
                hint=_one_component(same) or "leave out all but one of them with --drop",
            )
    made = [Spelled(name, part) for name, same in found.items() for part in same]
    return sorted(made, key=lambda item: (item.part.module, item.name, item.part.nesting))


def _check_names(named: _Named, scheme: Scheme) -> None:
    """Refuse modules that a scheme cannot name, with what another one needs for all of them.

    Raises:
        UnsupportedError: There is one.
    """
    try:
        _spelled(named.parts, scheme, named)
    except UnsupportedError as error:
        hint = f"write another scheme, such as with --to {DEFAULT_SCHEME}"
        try:
            slotted(named.parts, scheme_named(DEFAULT_SCHEME))
        except UnsupportedError as other:
            hint = f"{hint}, and {other.hint}"
        raise UnsupportedError(error.where, error.what, hint=hint) from None


def _one_component(parts: Sequence[Part]) -> str | None:
    """Return what to do where modules of several components would have one name."""
    found = dict.fromkeys(component_of(part.module)[0] for part in parts)
    named = [f"--component {name}" for name in found if name]
    return f"write them one by one, with {' and '.join(named)}" if len(named) > 1 else None


def _written(
    new: NewAdapter,
    scheme: Scheme,
    options: WriteOptions,
    names: Sequence[Spelled],
    extras: Sequence[Output],
    named: _Named,
) -> Written:
    """Return what the scheme is told for its configuration and its metadata."""
    return Written(
        modules=tuple(names),
        parts=tuple(_alone([item.part for item in names], named.alone)),
        extras=tuple(output.spec.name for output in extras),
        source=new.scheme,
        scheme=scheme.name,
        config=new.config,
        changes={**new.extras.config, **new.config_changes},
        keeps_targets=new.keeps_targets,
        sidecar=new.sidecar,
        metadata=new.metadata,
        family=named.family,
        stem=new.stem,
        title=options.output.stem,
    )


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
        return (), without_room(new.sidecars)
    return new.sidecars, []


def _container(output: Path, scheme: Scheme) -> Container:
    """Return the format of the weights file.

    Raises:
        OutputError: The output is named like one that another scheme alone is written in.
    """
    if not is_weights(output):
        return container_of(scheme.home.suffix)
    found = container_of(output)
    if found is container_of(ALONE) and scheme.home.suffix != ALONE:
        raise OutputError(
            output,
            f"the scheme {scheme.name!r} is not written as {ALONE}",
            hint=f"write the scheme of that, with --to {ALONE[1:]}, or another file",
        )
    if scheme.home.suffix == ALONE and found is not container_of(ALONE):
        raise OutputError(
            output,
            f"the scheme {scheme.name!r} is written as {ALONE} alone",
            hint=f"end the name in {ALONE}",
        )
    return found


def _weights_name(output: Path, scheme: Scheme) -> str:
    if is_weights(output):
        return ""
    return scheme.home.weights_name or f"{output.name}{scheme.home.suffix}"
