"""Files of an object store: listed, read in ranges, fetched whole into a cache of their own.

Requests name the entity tag that a file had when it was listed, so that one that was exchanged
meanwhile is an error, never a mixture. Credentials are found by the library that makes the
requests, in the environment or in the machine's role, and are kept nowhere.
"""

from __future__ import annotations

import hashlib
import os
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Lock
from typing import Any, Final

from loratool.errors import FileFormatError, LoratoolError, StoreError
from loratool.files.checkpoint import ADAPTER_CONFIG, MODEL_CONFIG, is_index
from loratool.files.hub.names import is_safe
from loratool.files.json import parse_json
from loratool.files.objects.addresses import Address
from loratool.files.ranges import Ranged
from loratool.files.sources import AT_ONCE, Fetching, Source, tell

__all__ = ["ObjectFile", "Objects", "list_objects"]

BESIDE: Final = (MODEL_CONFIG, ADAPTER_CONFIG)
"""What is asked for beside a file of a server that lists nothing."""
MOST_INDEX: Final = 64 << 20
EXCHANGED: Final = ("was exchanged while it was read", "try again")
RANGED: Final = (".safetensors", ".gguf")
"""Files whose tensors lie in them as they are; archives and pickles are fetched whole."""
PLAIN_HTTP: Final = re.compile(r"http://(localhost|127\.|\[::1\]).*", re.DOTALL)
"""Endpoints on this machine, which need no encryption."""


def list_objects(address: Address) -> Objects:
    """Ask a store what it holds at an address.

    Raises:
        StoreError: There is nothing, or it does not tell; the message says why.
        ModuleNotFoundError: ``obstore`` is not installed.
    """
    store = _opened(address)
    found = Objects(address, store)
    folder = address.key.rpartition("/")[0]
    with explained(address):
        if address.is_listed:
            inside = address.key and f"{address.key}/"
            metas = [*_listed(store, address.key), *_head(store, address.key)]
            if not any(meta["path"].startswith(inside) for meta in metas):
                metas = [*metas, *_listed(store, folder)]
        else:
            metas = _told(store, address)
    for meta in metas:
        if is_safe(meta["path"]):
            found.files[meta["path"]] = ObjectFile(found, meta["path"], meta["size"], _tag(meta))
    return found


def _tag(meta: Any) -> str | None:
    """Return what tells a file from another that takes its place, where something does."""
    tag: str | None = meta.get("e_tag")
    if tag is None and meta.get("last_modified") is not None:
        return f"{meta['last_modified'].isoformat()}"
    return tag


def _opened(address: Address) -> Any:
    from obstore.store import from_url

    options: dict[str, Any] = {}
    own = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    if address.kind == "http" or (address.kind == "s3" and PLAIN_HTTP.fullmatch(own)):
        options["client_options"] = {"allow_http": True}
    if address.kind == "s3" and not os.environ.get("AWS_ACCESS_KEY_ID"):
        options |= _profile()
    with explained(address):
        return from_url(address.root, **options)


def _profile() -> dict[str, Any]:
    """Return what a profile in ``~/.aws`` says, as far as there is one: ``obstore`` reads none."""
    named = ("AWS_PROFILE", "AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE")
    if not any(map(os.environ.get, named)) and not Path("~/.aws").expanduser().is_dir():
        return {}
    try:
        from boto3 import Session
        from botocore.exceptions import BotoCoreError
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ModuleNotFoundError:
        return {}
    try:
        session = Session()
        if session.get_credentials() is None:
            return {}
        region = {"region": session.region_name} if session.region_name else {}
        return {"credential_provider": Boto3CredentialProvider(session), **region}
    except BotoCoreError:
        return {}  # obstore then says what is lacking


def _listed(store: Any, prefix: str) -> list[Any]:
    import obstore

    blocks = obstore.list(store, prefix or None)
    return [meta for block in blocks for meta in block]


def _head(store: Any, key: str) -> list[Any]:
    """Return what there is to say of one file; nothing where there is none."""
    import obstore

    try:
        return [obstore.head(store, key)] if key else []
    except FileNotFoundError:
        return []


def _told(store: Any, address: Address) -> list[Any]:
    """Return the files of a server that lists nothing: the one named, and what belongs to it."""
    from obstore import exceptions

    folder, slash, name = address.key.rpartition("/")
    metas = _head(store, address.key)
    names = list(BESIDE)

    def beside(key: str) -> list[Any]:
        try:
            return _head(store, key)
        except (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError):
            return []  # what servers answer that do not tell what they lack

    if metas and is_index(name):
        import obstore

        if metas[0]["size"] > MOST_INDEX:
            raise FileFormatError(address, f"is an index of {metas[0]['size']} bytes, too long")
        data = bytes(obstore.get(store, address.key).bytes())
        said = parse_json(data, where=address).get("weight_map")
        names += sorted(set(said.values())) if isinstance(said, dict) else []
    with ThreadPoolExecutor(AT_ONCE) as pool:
        others = [f"{folder}{slash}{each}" for each in map(str, names)]
        found = pool.map(beside, (each for each in others if is_safe(each)))
        return [*metas, *(meta for each in found for meta in each)] if metas else []


@contextmanager
def explained(address: object) -> Iterator[None]:
    """Turn what the library of stores raises into one line, with no credentials in it.

    Raises:
        StoreError: Something went wrong.
    """
    try:
        yield
    except LoratoolError:
        raise
    except Exception as error:
        from obstore import exceptions

        kinds: Mapping[type[Exception], tuple[str, str]] = {
            FileNotFoundError: ("there is nothing", "look at the address"),
            exceptions.PreconditionError: EXCHANGED,
            exceptions.InvalidPathError: ("holds a name that is no path", "rename that object"),
            exceptions.UnauthenticatedError: ("needs credentials", "set those of the environment"),
            exceptions.PermissionDeniedError: ("refuses access", "look at the credentials"),
        }
        for kind, (what, hint) in kinds.items():
            if isinstance(error, kind):
                raise StoreError(address, what, hint=hint) from error
        raise StoreError(
            address, _words(str(error)), hint="check the address, the network and the endpoint"
        ) from error


def _words(said: str) -> str:
    """Return what the library means by an error, without the address, which may have secrets."""
    status = re.search(r"status(?: code)?:? (\d{3})\b", said)
    if status is not None:
        return f"the server answers with an error ({status[1]})"
    if "error sending request" in said or "Connect" in said:
        return "cannot be reached"
    return "cannot be read: the server answers otherwise than such a store does"


@dataclass
class Objects:
    """The files at an address.

    Attributes:
        address: The address.
        store: The library's own view of bucket or server.
        files: By their keys.
    """

    address: Address
    store: Any
    files: dict[str, ObjectFile] = field(default_factory=dict)

    def lacking(self, sources: Sequence[Source]) -> list[ObjectFile]:
        """See :class:`Store`."""
        wanted = (each for each in sources if isinstance(each, ObjectFile))
        return [each for each in wanted if not each.kept.is_file()]

    def fetch(self, sources: Sequence[Source]) -> None:
        """See :class:`Store`.

        Raises:
            StoreError: One cannot be fetched; those that are whole are kept.
        """
        wanted = [each for each in sources if isinstance(each, ObjectFile)]
        lacking = self.lacking(wanted)
        if lacking:
            size = sum(each.size for each in lacking)
            tell(Fetching(str(self.address), len(lacking), size, objects_folder()))
        is_left_off = Event()
        pool = ThreadPoolExecutor(AT_ONCE)
        try:
            for _ in pool.map(lambda each: each.bring(is_left_off), lacking):
                pass
        except BaseException:
            is_left_off.set()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
        for each in wanted:
            each.local = each.kept


def objects_folder() -> Path:
    """Return the folder that whole files of stores are kept in."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.expandvars(home)).expanduser() / "loratool" / "objects"


class ObjectFile(Ranged):
    """One file of a store, a :class:`Source`.

    Args:
        store: Where it is.
        key: Its key there.
        size: Its size in bytes.
        tag: What tells whether it is still the same, where the store says so.
    """

    def __init__(self, store: Objects, key: str, size: int, tag: str | None) -> None:
        super().__init__(f"{store.address.root}/{key}", key, size, store.files)
        self.store = store
        self.tag = tag
        self.is_ranged = key.lower().endswith(RANGED)
        self.mark = zlib.crc32((tag or "").encode())
        self._fetching = Lock()

    @property
    def kept(self) -> Path:
        """Where the whole file is, once it was fetched: by its address and its entity tag."""
        told = f"{self.name}\n{self.tag}\n{self.size}".encode()
        digest = hashlib.sha256(told).hexdigest()[:32]
        return objects_folder() / digest / self.path.rpartition("/")[2]

    def _asked(self, **more: Any) -> Any:
        """Ask for the file, or some of it, if it is still what it was."""
        import obstore

        is_strong = self.tag is not None and self.tag.startswith('"')
        options = {**more, **({"if_match": self.tag} if is_strong else {})}
        answer = obstore.get(self.store.store, self.path, options=options)  # type: ignore[arg-type]
        self._check(answer.meta)
        return answer

    def _check(self, meta: Any) -> None:
        if (_tag(meta), meta["size"]) != (self.tag, self.size):
            raise StoreError(self.name, EXCHANGED[0], hint=EXCHANGED[1])

    def check_unchanged(self) -> None:
        """See :class:`Source`.

        Raises:
            StoreError: It was exchanged, or is gone.
        """
        import obstore

        with explained(self.name):
            self._check(obstore.head(self.store.store, self.path))

    def get(self, start: int, stop: int) -> bytes | memoryview:
        """See :class:`Ranged`."""
        from obstore.exceptions import GenericError, NotSupportedError

        if self.local is not None:
            return self._kept_bytes(start, stop)
        data: bytes | memoryview
        with explained(self.name):
            try:
                data = memoryview(self._asked(range=(start, stop)).bytes())
            except (GenericError, NotSupportedError):
                if self.store.address.is_listed:
                    raise
                with self._fetching:  # the server knows no ranges
                    self.store.fetch([self])
                data = self._kept_bytes(start, stop)
        if len(data) != stop - start:
            raise FileFormatError(self.name, "ended early while it was read")
        return data

    def _kept_bytes(self, start: int, stop: int) -> bytes:
        with self.kept.open("rb") as file:
            file.seek(start)
            return file.read(stop - start)

    def bring(self, is_left_off: Event) -> None:
        """Fetch the whole of it.

        Raises:
            StoreError: It cannot be fetched.
        """
        part = self.kept.with_name(f".{self.kept.name}.{os.urandom(4).hex()}.part")
        part.parent.mkdir(parents=True, exist_ok=True)
        try:
            with part.open("wb") as file, explained(self.name):
                for block in self._asked().stream():
                    if is_left_off.is_set():
                        raise StoreError(self.name, "was left off")
                    file.write(block)
            if part.stat().st_size != self.size:
                raise FileFormatError(self.name, "ended early while it was fetched")
            part.replace(self.kept)
        finally:
            part.unlink(missing_ok=True)
