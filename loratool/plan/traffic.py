"""What goes through the network for a plan: requests and bytes, known before any of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratool.display.figures import human_bytes
from loratool.files.inputs import Extent
from loratool.files.sources import ranged
from loratool.files.targets import target_of
from loratool.plan.outcome import Outcome
from loratool.plan.run import FileWork, joined_ranges
from loratool.plan.sidecar import Sidecar

if TYPE_CHECKING:
    from loratool.plan.plan import Plan

__all__ = ["Traffic", "traffic_of"]


@dataclass(frozen=True, slots=True)
class Traffic:
    """What a run asks of stores, but for descriptions and what is fetched whole before it.

    Attributes:
        requests: How many requests.
        read: Bytes that are read.
        copied: Bytes that the store copies by itself.
        sent: Bytes that are sent.
    """

    requests: int
    read: int
    copied: int = 0
    sent: int = 0

    def as_json(self) -> dict[str, Any]:
        """Return the keys that the command line's JSON promises."""
        return {
            "requests": self.requests,
            "bytes_read": self.read,
            "bytes_copied": self.copied,
            "bytes_sent": self.sent,
        }

    @property
    def words(self) -> str:
        """What a user is told of it."""
        parts = {"read": self.read, "copied by the store": self.copied, "sent": self.sent}
        told = ", ".join(f"{human_bytes(size)} {what}" for what, size in parts.items() if size)
        return f"through the network: {told}; about {self.requests} requests"


def traffic_of(plan: Plan, output: Path) -> Traffic | None:
    """Return what carrying out a plan asks of stores; ``None`` where it asks nothing of any."""
    is_sent = target_of(output) is not None
    if not is_sent and not any(ranged(path) for path in plan.stamps):
        return None
    works = plan.works(Outcome())
    computed = [
        extent
        for work in works
        for task in work.tasks
        for stored in task.reads()
        for extent in stored.extents
    ]
    if is_sent:
        return _sending(works, [*plan.beside(), *plan.telling(Outcome())], computed)
    moved = [
        (piece.source, piece.source_offset, piece.size)
        for work in works
        for piece in joined_ranges(work.moves, joins=True)
    ]
    requests, read = _reading([*moved, *computed])
    return Traffic(requests, read) if requests else None


def _reading(extents: Iterable[Extent]) -> tuple[int, int]:
    """Return how many requests read some bytes of files that are elsewhere, and how many bytes."""
    from loratool.files.windows import Windows

    windows = Windows()
    for path, start, size in extents:
        source = ranged(path)
        if source is not None:
            windows.expect((source, start, size))
    return len(windows), windows.nbytes


def _sending(
    works: Sequence[FileWork], beside: Sequence[Sidecar], computed: Sequence[Extent]
) -> Traffic:
    """Return the same where the output is in a store."""
    from loratool.files.objects.upload import whole_of
    from loratool.plan.upload import copyable, is_streamed, objects_of

    if not is_streamed(works):
        sent = sum(work.size for work in works) + sum(each.nbytes for each in beside)
        return Traffic(len(works) + len(beside), 0, sent=sent)
    objects = objects_of(works)
    requests, read = _reading([*(e for each in objects for e in each.reads()), *computed])
    copied = sent = 0
    for each in objects:
        requests += 1 if whole_of(each.parts) is not None else 2 + len(each.parts)
        copied += sum(part.size for part in each.parts if part.kept is not None)
        sent += sum(part.size for part in each.parts if part.kept is None)
    for sidecar in beside:
        is_copied = sidecar.source is not None and copyable(sidecar.source) is not None
        copied, sent = copied + is_copied * sidecar.nbytes, sent + (not is_copied) * sidecar.nbytes
    return Traffic(requests + len(beside), read, copied, sent)
