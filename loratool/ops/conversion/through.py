"""Let a verb write any scheme: it writes PEFT's, which is then converted like any adapter."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from loratool.adapter.config import CONFIG_NAME
from loratool.adapter.model import Adapter
from loratool.adapter.scheme import KeyScheme
from loratool.errors import UnsupportedError
from loratool.files.atomic import check_output, scratch
from loratool.files.container import PICKLE_SUFFIXES
from loratool.ops.algebra.plan import AdapterPlan
from loratool.ops.algebra.planning import check_place
from loratool.ops.conversion.plan import ConversionPlan
from loratool.ops.conversion.planning import plan_conversion
from loratool.ops.conversion.refusing import check_names
from loratool.ops.conversion.running import run_conversion
from loratool.ops.conversion.wishes import Wishes
from loratool.ops.opening import open_adapter
from loratool.schemes import scheme_named

__all__ = ["Way", "common_family", "is_direct", "through"]

DIRECT: Final = ("peft", "module-path", "loralib")
"""Schemes that every verb writes itself: paths and orientation are those of PEFT."""


def is_direct(scheme: KeyScheme, output: Path) -> bool:
    """Whether a verb writes ``output`` in ``scheme`` itself."""
    return scheme.name in DIRECT and output.suffix.lower() not in PICKLE_SUFFIXES


def common_family(adapters: Sequence[Adapter]) -> str | None:
    """Return the pipeline that all adapters belong to, as far as they say."""
    found = {adapter.family for adapter in adapters} - {None}
    return found.pop() if len(found) == 1 else None


class Way:
    """What a verb is to write, and where.

    Attributes:
        scheme: The scheme.
        place: The place.
        final: What is made of it, once the verb is done; ``None`` where that is the output.
    """

    def __init__(
        self, scheme: KeyScheme, place: Path, wanted: KeyScheme, output: Path, family: str | None
    ) -> None:
        self.scheme = scheme
        self.place = place
        self.final: ConversionPlan | None = None
        self._wanted = wanted
        self._output = output
        self._family = family

    def preview(self, plan: AdapterPlan) -> None:
        """Plan what will be made of ``plan``, of which nothing is written.

        Raises:
            UnsupportedError: The scheme cannot express it.
        """
        if self._wanted.name == self.scheme.name and self._output == self.place:
            return
        with TemporaryDirectory() as name:
            folder = Path(name) / "adapter"
            folder.mkdir()
            weights = folder / plan.weights_name
            weights.write_bytes(plan.header)
            os.truncate(weights, plan.nbytes)  # a hole: headers are all that a plan reads
            if plan.config is not None:
                (folder / CONFIG_NAME).write_bytes(plan.config_text)
            self.final = self.plan(folder)

    def plan(self, folder: Path) -> ConversionPlan:
        """Return the plan of the output, from what the verb has written.

        Raises:
            UnsupportedError: The scheme cannot express it.
        """
        wishes = Wishes(output=self._output, family=self._family)
        try:
            return plan_conversion(open_adapter(folder), self._wanted, wishes)
        except UnsupportedError as error:
            hint = "leave it out with --skip, or write another scheme, such as --to peft"
            raise UnsupportedError(error.where, error.what, hint=hint) from None


@contextmanager
def through(
    scheme: KeyScheme,
    output: Path,
    *,
    inputs: Sequence[Path],
    force: bool,
    dry_run: bool,
    adapters: Sequence[Adapter] = (),
) -> Iterator[Way]:
    """Give the scheme and the place that a verb is to write, and convert what is there then.

    Args:
        scheme: The scheme that was asked for.
        output: The destination.
        inputs: What the output may not touch.
        force: Replace an existing output.
        dry_run: Write nothing.
        adapters: What the output is made of.

    Raises:
        LoratoolError: Nothing was written; the message says why.
    """
    for adapter in adapters:
        check_names(adapter, scheme)
    family = common_family(adapters)
    if is_direct(scheme, output):
        yield Way(scheme, output, scheme, output, family)
        return
    check_place(output, scheme.name, has_config=scheme.has_config)
    peft = scheme_named("peft")
    if dry_run:
        place = output.with_name(f"{output.stem}-adapter")
        yield Way(peft, place, scheme, output, family)
        return
    check_output(output, force=force, inputs=inputs)
    with scratch(output) as folder:
        way = Way(peft, folder / output.stem, scheme, output, family)
        yield way
        way.final = way.plan(way.place)
        run_conversion(way.final, output, inputs=inputs, force=force)
