"""Files of the hub over the network: listed, read in ranges, fetched whole into the local cache."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from loratool.errors import FileFormatError, HubError
from loratool.files.hub.cache import Snapshot, cache_folder, is_sidecar
from loratool.files.hub.download import download
from loratool.files.hub.names import HubName, endpoint, is_safe
from loratool.files.hub.troubles import explained
from loratool.files.ranges import Ranged
from loratool.files.sources import Fetching, Source, tell

__all__ = ["HubFile", "HubFiles", "list_files"]

TIMEOUT: Final = 20.0
TRIES: Final = 4
WAIT: Final = 0.5
"""Seconds before the second try; twice as many before each further one."""
RANGE: Final = re.compile(r"bytes (\d+)-(\d+)/(\d+)")
MOST_SIDECAR: Final = 64 << 20
SMALL_BYTES: Final = 16 << 20
SOME_BYTES: Final = 2 << 30
PARTIAL: Final = 206


def list_files(name: HubName) -> HubFiles:
    """Ask the hub what a model holds.

    Raises:
        HubError: It cannot be reached, or does not tell; the message says why.
        ModuleNotFoundError: ``huggingface_hub`` is not installed.
    """
    from huggingface_hub import HfApi

    import loratool

    with explained(name):
        api = HfApi(
            endpoint=endpoint(), library_name="loratool", library_version=loratool.__version__
        )
        found = _again(
            lambda: api.model_info(
                name.repo, revision=name.revision, files_metadata=True, timeout=TIMEOUT
            )
        )
        sizes = {each.rfilename: each.size for each in found.siblings or ()}
        if None in sizes.values():  # a mirror that tells less
            tree = _again(
                lambda: list(api.list_repo_tree(name.repo, revision=found.sha, recursive=True))
            )
            sizes |= {each.path: each.size for each in tree if hasattr(each, "size")}
    if not found.sha or not re.fullmatch(r"[0-9a-f]{40}", found.sha):
        raise HubError(name, "the hub does not say which commit it is")
    store = HubFiles(name.repo, found.sha, name.revision)
    for path, size in sizes.items():
        if is_safe(path) and isinstance(size, int) and size >= 0:
            store.files[path] = HubFile(store, path, size)
    return store


@dataclass
class HubFiles:
    """The files of one commit.

    Attributes:
        repo: The model.
        commit: The commit.
        revision: What was asked for.
        files: By their paths in it.
    """

    repo: str
    commit: str
    revision: str | None
    files: dict[str, HubFile] = field(default_factory=dict)

    def fetch(self, sources: Sequence[Source]) -> None:
        """See :class:`Store`; what travels along with weights is fetched too.

        Raises:
            HubError: It cannot be done; what is whole stays in the cache, and is not fetched again.
        """
        wanted = {each.path: each for each in sources if isinstance(each, HubFile)}
        for folder in {path.rpartition("/")[0] for path in wanted}:
            wanted |= {each.path: each for each in self._beside(folder)}
        snapshot = Snapshot(
            self.repo,
            self.commit,
            cache_folder() / f"models--{self.repo.replace('/', '--')}" / "snapshots" / self.commit,
        )
        here = {path for path in wanted if (snapshot.folder / path).is_file()}
        lacking = [each for path, each in wanted.items() if path not in here]
        if lacking:
            size = sum(each.size for each in lacking)
            tell(Fetching(f"{self.repo}@{self.commit[:8]}", len(lacking), size, cache_folder()))
            with explained(HubName(self.repo, self.revision, is_told=True)):
                download(self.repo, self.commit, [each.path for each in lacking])
            self._remember(snapshot)
        for path, each in wanted.items():
            place = snapshot.folder / path
            if not place.is_file() or place.stat().st_size != each.size:
                raise HubError(each.name, "was fetched, and is not as long as the hub says")
            each.local = place

    def _remember(self, snapshot: Snapshot) -> None:
        """Note in the cache which commit the revision was, as the hub's own library does."""
        revision = self.revision or "main"
        if revision == self.commit:
            return
        place = snapshot.folder.parent.parent / "refs" / revision
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(self.commit)

    def _beside(self, folder: str) -> list[HubFile]:
        start = f"{folder}/" if folder else ""
        return [
            each
            for path, each in self.files.items()
            if path.startswith(start)
            and is_sidecar(path.removeprefix(start))
            and each.size <= MOST_SIDECAR
        ]


class HubFile(Ranged):
    """One file of the hub, a :class:`Source`.

    Args:
        store: The commit that it is of.
        path: Its path in it.
        size: Its size in bytes.
    """

    def __init__(self, store: HubFiles, path: str, size: int) -> None:
        super().__init__(f"{store.repo}@{store.commit[:8]}/{path}", path, size, store.files)
        self.store = store
        self._requests = 0

    @property
    def _is_better_fetched(self) -> bool:
        """Whether the whole of it takes less time than further requests."""
        return self.size <= SMALL_BYTES or (self._requests > 16 and self.size <= SOME_BYTES)

    def get(self, start: int, stop: int) -> bytes:
        """See :class:`Ranged`; what is read in many places is fetched whole."""
        is_elsewhere = start > len(self._head)
        self._requests += is_elsewhere
        data: bytes | None = None
        if not (is_elsewhere and self._is_better_fetched):
            with explained(HubName(self.store.repo, self.store.revision, is_told=True)):
                data = _again(lambda: self._get(start, stop))
        if data is None:  # or the server knows no ranges
            self.store.fetch([self])
            assert self.local is not None
            with self.local.open("rb") as file:
                file.seek(start)
                data = file.read(stop - start)
        if len(data) != stop - start:
            raise FileFormatError(self.name, "ended early while it was read")
        return data

    def _get(self, start: int, stop: int) -> bytes | None:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import (  # type: ignore[attr-defined]  # not listed, but public
            build_hf_headers,
            hf_raise_for_status,
            http_stream_backoff,
        )

        url = hf_hub_url(
            self.store.repo, self.path, revision=self.store.commit, endpoint=endpoint()
        )
        headers = build_hf_headers(library_name="loratool")
        headers |= {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        request: dict[str, Any] = {"headers": headers, "timeout": TIMEOUT}
        with http_stream_backoff(
            "GET", url, **request, retry_on_exceptions=(), retry_on_status_codes=()
        ) as response:
            hf_raise_for_status(response)
            if response.status_code != PARTIAL:
                return _beginning(response.iter_raw(), stop) if start == 0 else None
            said = RANGE.fullmatch(response.headers.get("Content-Range", ""))
            if said is None or tuple(map(int, said.groups())) != (start, stop - 1, self.size):
                raise FileFormatError(
                    self.name, f"the server sent {said and said[0]} of {self.size} bytes"
                )
            return _beginning(response.iter_raw(), stop - start)


def _beginning(blocks: Iterator[bytes], count: int) -> bytes:
    """Return the first bytes of what a server sends, and read no further, however much it is."""
    data = bytearray()
    for block in blocks:
        data += block
        if len(data) >= count:
            break
    return bytes(data[:count])


def _again(ask: Callable[[], Any]) -> Any:
    """Ask, and again where the server was busy or the connection broke."""
    for left in reversed(range(TRIES)):
        try:
            return ask()
        except Exception as error:
            if not left or not _is_passing(error):
                raise
            time.sleep(_pause(error) or WAIT * 2 ** (TRIES - 1 - left))
    raise AssertionError


def _is_passing(error: Exception) -> bool:
    """Whether it may be otherwise in a moment."""
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in (408, 429, 500, 502, 503, 504)
    transport = HfHubHTTPError.__mro__[1]  # of whichever library it makes its requests with
    return isinstance(error, transport)


def _pause(error: Exception) -> float | None:
    """Return how many seconds a server asks to wait, where that is not long."""
    response = getattr(error, "response", None)
    said = response.headers.get("Retry-After", "") if response is not None else ""
    return min(float(said), 30.0) if said.isdigit() else None
