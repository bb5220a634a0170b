"""``loratool inspect``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from itertools import zip_longest
from pathlib import Path
from statistics import fmean
from typing import Final

import click

from loratool.cli import options, render
from loratool.cli.folding import fold_names
from loratool.cli.grouping import group_modules, span, sparkline
from loratool.errors import printable
from loratool.files.places import called
from loratool.verbs.inspect import AdapterInfo, ModelInfo, ModuleInfo, inspect

__all__ = ["command"]

SAID: Final = "general."
"""What the keys begin with of what a file says of any model."""
LONG: Final = 80


@click.command("inspect")
@click.argument("path", type=options.PATH)
@click.option("--modules", is_flag=True, help="One row for each module, nothing folded.")
@click.option("--spectrum", is_flag=True, help="Read the factors too: singular values, norms.")
@options.plot
@options.force
@options.adapter_name
@options.threads
@options.no_progress
@options.as_json
@options.debug
def command(
    path: Path,
    modules: bool,
    spectrum: bool,
    plot: Path | None,
    force: bool,
    adapter_name: str | None,
    threads: int | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Say what an adapter (or a model) is.

    Only headers are read, so this is quick for files of any size. --spectrum reads the factors
    of an adapter as well, and --plot draws their spectra.

    \b
    Example:
        loratool inspect my-adapter/
        loratool inspect my-adapter/ --spectrum --plot spectra.png
        loratool inspect adapter_model.safetensors --json | jq '.modules[0]'
    """
    if plot is not None:
        from loratool.cli.plots import check_plot

        check_plot(plot, force=force, inputs=[path])
    with render.progress_bar("reading", quiet=quiet or not (spectrum or plot)) as progress:
        info = inspect(
            path,
            spectrum=spectrum or plot is not None,
            adapter_name=adapter_name,
            threads=threads,
            progress=progress,
        )
    if plot is not None and isinstance(info, AdapterInfo):
        from loratool.cli.plots import plot_spectra

        plot_spectra(info.spectra, called(path), plot, force=force)
    if as_json:
        render.print_json(info.as_json())
    elif isinstance(info, ModelInfo):
        _print_model(info)
    else:
        _print_adapter(info, unfolded=modules)


def _print_adapter(info: AdapterInfo, *, unfolded: bool) -> None:
    adapter = info.adapter
    facts = [
        ("adapter", adapter.path),
        ("scheme", adapter.scheme),
        ("base model", adapter.base_model or "not said"),
        ("parameters", render.human_count(adapter.parameters)),
        ("size", render.human_bytes(adapter.nbytes)),
        ("modules", len(info.modules)),
    ]
    if adapter.name:
        facts.append(("name in keys", adapter.name))
    if adapter.beside:
        base = info.base
        words = f"{base['tensors']} tensors, {render.human_count(base['parameters'])} parameters"
        facts.append(("and a base", f"{words}, {render.human_bytes(base['bytes'])}"))
    _print_facts(facts)
    groups = _groups(info.modules, unfolded=unfolded)
    render.print_table(
        "",
        ("modules", "count", "kind", "rank", "alpha", "scale", "in", "out", "dtype"),
        [_row(names, members) for names, members in groups],
    )
    if info.spectra:
        _print_spectra(info, unfolded=unfolded)
    if adapter.extras:
        render.print_table(
            "not part of a delta",
            ("tensor", "what", "dtype", "shape"),
            [
                (e.name, e.kind.value, e.tensor.spec.dtype, list(e.tensor.spec.shape))
                for e in adapter.extras
            ],
        )
    render.print_notes(info.notes)


def _print_spectra(info: AdapterInfo, *, unfolded: bool) -> None:
    names = [spectrum.module for spectrum in info.spectra]
    groups = (
        [((spectrum.module,), [spectrum]) for spectrum in info.spectra]
        if unfolded
        else group_modules(info.spectra, names)
    )
    render.print_table(
        "spectra of the deltas",
        ("modules", "‖delta‖", "σ₁", "stable", "effective", "90 %", "99 %", "99.9 %", "σ (log)"),
        [
            (
                folded,
                span(s.frobenius_norm for s in members),
                span(s.spectral_norm for s in members),
                span((s.stable_rank for s in members), ".1f"),
                span((s.effective_rank for s in members), ".1f"),
                *(
                    span((s.energy_ranks[name] for s in members), "d")
                    for name in members[0].energy_ranks
                ),
                sparkline(_mean([s.singular_values for s in members])),
            )
            for folded, members in groups
        ],
    )


def _mean(spectra: list[tuple[float, ...]]) -> list[float]:
    return [fmean(values) for values in zip_longest(*spectra, fillvalue=0.0)]


def _print_model(info: ModelInfo) -> None:
    model, coded = info.model, info.quantization
    words = "no"
    if coded is not None:
        words = f"{coded.modules} weights in {coded.format}" if coded.modules else "not read"
    tied = {True: "yes", False: "no", None: "not said"}[info.is_tied]
    parts = [f"{name} {render.human_count(count)}" for name, count in info.components.items()]
    what: list[tuple[str, object]] = [
        ("type", info.model_type or "not said"),
        ("architecture", ", ".join(info.architectures) or "not said"),
    ]
    if parts:
        what = [("family", model.family or "not known"), ("components", ", ".join(parts))]
    _print_facts(
        [
            ("model", model.path),
            *what,
            ("parameters", render.human_count(info.parameters)),
            ("size", render.human_bytes(model.bytes)),
            ("tensors", len(model.stored)),
            ("shards", len(model.shards)),
            ("dtypes", ", ".join(f"{n} × {dtype}" for dtype, n in info.dtypes.items())),
            ("quantised", words),
            *([] if parts else [("tied embeddings", tied)]),
            *_said(info),
        ]
    )
    render.print_notes(info.notes)


def _said(info: ModelInfo) -> list[tuple[str, object]]:
    """Return what a file with key values says of its model, but for what is told already."""
    if not info.model.config.is_inside:
        return []
    said = {key: text for key, text in info.metadata.items() if key.startswith(SAID)}
    return [
        (key.removeprefix(SAID), text if len(text) <= LONG else f"{text[:LONG]}…")
        for key, text in said.items()
        if text != info.model_type
    ]


def _print_facts(facts: list[tuple[str, object]]) -> None:
    from rich.text import Text

    out = render.console()
    width = max(len(name) for name, _ in facts) + 2
    for name, value in facts:
        line = Text.assemble((f"{name:<{width}}", "dim"), printable(value))
        out.print(line, soft_wrap=True)


def _groups(
    modules: tuple[ModuleInfo, ...], *, unfolded: bool
) -> list[tuple[list[str], list[ModuleInfo]]]:
    """Group modules that agree in everything but their place; the rarest groups come first."""
    if unfolded:
        return [([module.module], [module]) for module in modules]
    alike: dict[tuple[object, ...], list[ModuleInfo]] = defaultdict(list)
    for module in modules:
        alike[
            (
                module.kind,
                module.variant,
                module.rank,
                module.alpha,
                module.scale,
                module.dtype,
                module.experts,
            )
        ].append(module)
    ordered = sorted(alike.values(), key=len)
    return [(fold_names([module.module for module in group]), group) for group in ordered]


def _row(names: list[str], members: list[ModuleInfo]) -> tuple[object, ...]:
    first = members[0]
    kind = first.kind if first.variant == "lora" else f"{first.kind}, {first.variant}"
    if first.experts > 1:
        kind += f", {first.experts} experts"
    return (
        tuple(names),
        len(members),
        kind,
        first.rank,
        "none" if first.alpha is None else f"{first.alpha:g}",
        f"{first.scale:.6g}",
        _sizes(module.in_features for module in members),
        _sizes(module.out_features for module in members),
        first.dtype,
    )


def _sizes(values: Iterable[int]) -> str:
    unique = sorted(set(values))
    return ", ".join(str(value) for value in unique[:4]) + (", …" if len(unique) > 4 else "")
