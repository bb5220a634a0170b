"""Let a verb write any scheme: it writes PEFT's, which is then converted like any adapter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from loratool.adapter.model import Adapter
from loratool.adapter.scheme import KeyScheme
from loratool.files.atomic import check_output, scratch
from loratool.files.container import PICKLE_SUFFIXES
from loratool.ops.algebra.planning import check_place
from loratool.ops.conversion.planning import plan_conversion
from loratool.ops.conversion.running import run_conversion
from loratool.ops.conversion.wishes import Wishes
from loratool.ops.opening import open_adapter
from loratool.schemes import scheme_named

__all__ = ["common_family", "is_direct", "through"]

DIRECT: Final = ("peft", "module-path", "loralib")
"""Schemes that every verb writes itself: paths and orientation are those of PEFT."""


def is_direct(scheme: KeyScheme, output: Path) -> bool:
    """Whether a verb writes ``output`` in ``scheme`` itself."""
    return scheme.name in DIRECT and output.suffix.lower() not in PICKLE_SUFFIXES


def common_family(adapters: Sequence[Adapter]) -> str | None:
    """Return the pipeline that all adapters belong to, as far as they say."""
    found = {adapter.family for adapter in adapters} - {None}
    return found.pop() if len(found) == 1 else None


@contextmanager
def through(
    scheme: KeyScheme,
    output: Path,
    *,
    inputs: Sequence[Path],
    force: bool,
    dry_run: bool,
    family: str | None = None,
) -> Iterator[tuple[KeyScheme, Path]]:
    """Give the scheme and the place that a verb is to write, and convert what is there then.

    Args:
        scheme: The scheme that was asked for.
        output: The destination.
        inputs: What the output may not touch.
        force: Replace an existing output.
        dry_run: Write nothing.
        family: The pipeline that the modules belong to, where known.

    Raises:
        LoratoolError: Nothing was written; the message says why.
    """
    if is_direct(scheme, output):
        yield scheme, output
        return
    check_place(output, scheme.name, has_config=scheme.has_config)
    peft = scheme_named("peft")
    if dry_run:
        yield peft, output.with_name(f"{output.stem}-adapter")
        return
    check_output(output, force=force, inputs=inputs)
    with scratch(output) as folder:
        place = folder / output.stem
        yield peft, place
        plan = plan_conversion(open_adapter(place), scheme, Wishes(output=output, family=family))
        run_conversion(plan, output, inputs=inputs, force=force)
