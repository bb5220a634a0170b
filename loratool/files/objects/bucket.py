"""A bucket that is written to, by Amazon's own library (``boto3``), which signs every request.

Credentials, region, endpoint and how often something is tried again are the library's business;
nothing of it is kept or told here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Final

from loratool.errors import LoratoolError, OutputExistsError, StoreError
from loratool.files.objects.addresses import Address
from loratool.files.objects.store import EXCHANGED, ObjectFile
from loratool.files.sources import AT_ONCE

__all__ = ["Bucket", "writable"]

MOST_DELETED: Final = 1000
"""How many objects one request deletes."""
REFUSED: Final = ("refuses access", "look at the credentials, and at what they allow")


def writable(address: Address) -> Bucket:
    """Return the bucket of an address, to be written to.

    Raises:
        StoreError: ``boto3`` is not installed, or its configuration is wrong.
    """
    bucket = Bucket(address)
    try:
        with _explained(address):
            bucket._client  # noqa: B018 - the library and its configuration are looked at
    except ModuleNotFoundError:
        raise StoreError(
            address, "is in no reach", hint="to write to stores: pip install 'loratool[remote]'"
        ) from None
    return bucket


class Bucket:
    """Requests to a bucket. Safe to use from several threads.

    Args:
        address: An address in it.
    """

    def __init__(self, address: Address) -> None:
        self.address = address
        self._where = {"Bucket": address.host}

    @cached_property
    def _client(self) -> Any:
        import boto3
        from botocore.config import Config

        # The library knows one of the two variables that name a region, obstore both.
        region = os.environ.get("AWS_REGION") or None
        # A sum of each part would have to be told again at the end, which the parts that the
        # store copies, and stores of other makers, do not all have.
        config = Config(
            max_pool_connections=2 * AT_ONCE, request_checksum_calculation="when_required"
        )
        return boto3.Session().client("s3", region_name=region, config=config)

    def called(self, key: str) -> str:
        """Return the address of an object."""
        return f"{self.address.root}/{key}"

    def names(self, prefix: str) -> Iterator[str]:
        """Yield the keys that begin with ``prefix``, in their order."""
        with _explained(self.address):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                **self._where, Prefix=prefix
            )
            for page in pages:
                yield from (each["Key"] for each in page.get("Contents", ()))

    def has(self, key: str) -> bool:
        """Whether there is an object of this key, which is the first that begins with it."""
        return next(self.names(key), None) == key

    def put(self, key: str, data: bytes, *, is_new: bool) -> None:
        """Write a small object.

        Raises:
            OutputExistsError: ``is_new``, and there is one already.
        """
        with _explained(self.called(key)):
            self._client.put_object(**self._where, Key=key, Body=data, **_alone(is_new))

    def copy(self, key: str, source: ObjectFile, *, is_new: bool) -> None:
        """Let the store write an object that equals another one, of 5 GiB at most.

        Raises:
            OutputExistsError: ``is_new``, and there is one already.
            StoreError: The other one was exchanged.
        """
        try:
            with _explained(self.called(key), source):
                self._client.copy_object(
                    **self._where,
                    Key=key,
                    **_copied(source),
                    TaggingDirective="REPLACE",
                    **_alone(is_new),
                )
        except StoreError:
            if is_new and self.has(key):  # which has the same answer
                raise _appeared(self.called(key)) from None
            raise

    def begin(self, key: str) -> str:
        """Begin an object in parts, and return what names it until it is whole."""
        with _explained(self.called(key)):
            answer = self._client.create_multipart_upload(**self._where, Key=key)
            return str(answer["UploadId"])

    def send_part(self, key: str, upload: str, number: int, data: bytearray) -> str:
        """Send a part, and return its tag."""
        with _explained(self.called(key)):
            answer = self._client.upload_part(**self._part(key, upload, number), Body=data)
            return str(answer["ETag"])

    def copy_part(
        self, key: str, upload: str, number: int, source: ObjectFile, start: int, stop: int
    ) -> str:
        """Let the store copy a part from another object, and return its tag.

        Raises:
            StoreError: The other one was exchanged.
        """
        with _explained(self.called(key), source):
            answer = self._client.upload_part_copy(
                **self._part(key, upload, number),
                **_copied(source),
                CopySourceRange=f"bytes={start}-{stop - 1}",
            )
            return str(answer["CopyPartResult"]["ETag"])

    def complete(self, key: str, upload: str, tags: Sequence[str], *, is_new: bool) -> None:
        """Make an object of its parts, in order.

        Raises:
            OutputExistsError: ``is_new``, and there is one already.
        """
        parts = [{"PartNumber": number, "ETag": tag} for number, tag in enumerate(tags, 1)]
        with _explained(self.called(key)):
            self._client.complete_multipart_upload(
                **self._where,
                Key=key,
                UploadId=upload,
                MultipartUpload={"Parts": parts},
                **_alone(is_new),
            )

    def abort(self, key: str, upload: str) -> None:
        """Drop an object in parts, and all of its parts."""
        with _explained(self.called(key)):
            self._client.abort_multipart_upload(**self._where, Key=key, UploadId=upload)

    def delete(self, keys: Sequence[str]) -> None:
        """Delete objects.

        Raises:
            StoreError: One of them stays.
        """
        for start in range(0, len(keys), MOST_DELETED):
            some = [{"Key": key} for key in keys[start : start + MOST_DELETED]]
            with _explained(self.address):
                answer = self._client.delete_objects(
                    **self._where, Delete={"Objects": some, "Quiet": True}
                )
            for failure in answer.get("Errors", ()):
                raise StoreError(self.called(failure["Key"]), "cannot be deleted", hint=REFUSED[1])

    def close(self) -> None:
        """Close all connections."""
        if "_client" in self.__dict__:
            self._client.close()

    def _part(self, key: str, upload: str, number: int) -> dict[str, Any]:
        return {**self._where, "Key": key, "UploadId": upload, "PartNumber": number}


def _alone(is_new: bool) -> dict[str, str]:
    return {"IfNoneMatch": "*"} if is_new else {}


def _copied(source: ObjectFile) -> dict[str, Any]:
    found: dict[str, Any] = {
        "CopySource": {"Bucket": source.store.address.host, "Key": source.path}
    }
    return found | ({"CopySourceIfMatch": source.tag} if source.tag else {})


@contextmanager
def _explained(where: object, source: ObjectFile | None = None) -> Iterator[None]:
    """Turn what the library raises into one line, with no credentials in it.

    Args:
        where: What is written.
        source: What is copied, if something is.

    Raises:
        StoreError: Something went wrong.
        OutputExistsError: There is one already, where there may not be.
    """
    try:
        yield
    except (LoratoolError, ModuleNotFoundError):
        raise
    except Exception as error:
        from botocore import exceptions

        if isinstance(error, exceptions.ClientError):
            raise _answered(error, where, source) from None
        if isinstance(error, exceptions.NoCredentialsError | exceptions.PartialCredentialsError):
            raise StoreError(
                where, "needs credentials", hint="set those of the environment"
            ) from None
        if isinstance(error, exceptions.HTTPClientError | exceptions.ConnectionError):
            raise StoreError(
                where, "cannot be reached", hint="check the address, the network and the endpoint"
            ) from None
        if not isinstance(error, exceptions.BotoCoreError):
            raise
        what = f"cannot be written ({type(error).__name__})"
        raise StoreError(where, what, hint="check the settings of AWS") from None


def _appeared(where: object) -> OutputExistsError:
    return OutputExistsError(where, "has appeared meanwhile", hint="choose another name")


def _answered(error: Any, where: object, source: ObjectFile | None) -> LoratoolError:
    """Return what a server's answer means."""
    said = error.response
    code = re.sub(r"\W", "", str(said.get("Error", {}).get("Code", "")))[:40]
    status = said.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    if status == 412 or code in ("PreconditionFailed", "ConditionalRequestConflict"):
        if source is not None:
            return StoreError(source.name, EXCHANGED[0], hint=EXCHANGED[1])
        return _appeared(where)
    if code == "NoSuchBucket":
        return StoreError(where, "there is no such bucket", hint="look at the address")
    if status in (401, 403):
        return StoreError(where, REFUSED[0], hint=REFUSED[1])
    what = f"the server answers with an error ({' '.join(filter(None, (str(status), code)))})"
    return StoreError(where, what, hint="check the address, the network and the endpoint")
