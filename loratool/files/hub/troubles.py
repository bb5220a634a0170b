"""What goes wrong with the hub, each in one line with the next step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from loratool.errors import HubError, LoratoolError, MissingModelError
from loratool.files.hub.names import HubName, endpoint

__all__ = ["explained"]

LOGIN: Final = "log in with 'hf auth login', or set HF_TOKEN"
STATUS: Final = {
    401: ("the hub does not accept the token", LOGIN),
    403: ("the hub refuses access with this token", "give the token the right to read it"),
    416: ("the server has another file than it listed", "try again"),
    429: ("the hub asks to wait: too many requests", "try again in a few minutes, logged in"),
}


@contextmanager
def explained(name: HubName) -> Iterator[None]:
    """Turn what the hub's library raises into one line.

    Raises:
        HubError: Something went wrong.
    """
    try:
        yield
    except LoratoolError:
        raise
    except Exception as error:
        raise _of(error, name) from error


def _of(error: Exception, name: HubName) -> HubError:
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        page = f"{endpoint()}/{name.repo}"
        return HubError(name, "is gated", hint=f"accept its terms at {page}, then {LOGIN}")
    here = "" if name.is_told else "no such file or folder, and "
    if isinstance(error, errors.RepositoryNotFoundError):
        what = f"{here}the hub has no such model, or it is private"
        return MissingModelError(name, what, hint=f"where it is private, {LOGIN}")
    if isinstance(error, errors.RevisionNotFoundError):
        what = f"the hub has no revision {name.revision or 'main'!r} of {name.repo}"
        return HubError(name, what, hint=f"{endpoint()}/{name.repo}/refs lists them")
    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        cause = error.__cause__
        return _of(cause, name) if isinstance(cause, Exception) else HubError(name, _line(error))
    if isinstance(error, errors.HfHubHTTPError):
        code = error.response.status_code
        what, hint = STATUS.get(code, (f"the hub answers with an error ({code})", "try again"))
        return HubError(name, what, hint=hint)
    if isinstance(error, errors.HfHubHTTPError.__mro__[1]):  # of the library that it asks with
        return HubError(
            name,
            f"{here}the hub at {endpoint()} cannot be reached: {_line(error)}",
            hint="check the network and HF_ENDPOINT; what is in the cache needs neither",
        )
    if isinstance(error, ValueError | TypeError | LookupError | AttributeError):  # of its parsing
        return HubError(
            name,
            f"{endpoint()} answers otherwise than a hub does",
            hint="check HF_ENDPOINT, and whether the network wants to be logged in to first",
        )
    return HubError(name, f"cannot be fetched: {_line(error)}")


def _line(error: BaseException) -> str:
    words = str(error).strip().splitlines()
    return words[0] if words else type(error).__name__
