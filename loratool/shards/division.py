"""How a command is divided, as its options say."""

from __future__ import annotations

from dataclasses import dataclass

from loratool.engines.engine import What as Executors
from loratool.engines.names import parse_name
from loratool.errors import OptionError
from loratool.shards.dealing import Share, parse_share

__all__ = ["Division", "Executors"]


@dataclass(frozen=True, slots=True)
class Division:
    """How a command is divided among workers.

    Attributes:
        share: What this one does; ``None`` for nothing, or for everything by ``executor``.
        finishes: Whether it makes the output in the end.
        waits: Whether it waits until all parts are there.
        executor: What does the parts; ``None`` for this process.
    """

    share: Share | None = None
    finishes: bool = False
    waits: bool = False
    executor: Executors | None = None

    @staticmethod
    def of(
        shards: str | None,
        *,
        finish: bool,
        wait: bool,
        resume: bool = False,
        executor: Executors | None = None,
    ) -> Division | None:
        """Return what options mean; ``None`` where the command is not divided.

        Raises:
            OptionError: They contradict each other.
        """
        if executor is not None:
            if shards is not None or finish or wait:
                what = "--shards" if shards is not None else "--finish" if finish else "--wait"
                raise OptionError("--executor", f"does all parts, and {what} is for some of them")
            if isinstance(executor, str):
                parse_name(executor)  # before anything is done
            return Division(finishes=True, executor=executor)
        if wait and not finish and shards != "auto":
            raise OptionError("--wait", "is for --finish, or for --shards auto")
        share = parse_share(shards) if shards is not None else None
        if resume:
            if share is not None or finish:
                raise OptionError("--resume", "does all that is left, and parts are kept anyway")
            return Division(Share(1, 1), finishes=True)
        if share is None and not finish:
            return None
        return Division(share, finish, wait)
