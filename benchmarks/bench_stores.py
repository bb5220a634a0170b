"""How many requests and bytes a merge takes whose base or output lies in a store, and ``verify``.

The store is a mock in a process of its own (moto), which counts what it is asked for. The base has
TinyLlama's layers, nine of them, and random weights; the adapter is on q and v.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final
from urllib.request import urlopen

from harness import (
    TINY_LLAMA,
    Command,
    Figure,
    Timing,
    common_arguments,
    loratool_command,
    make_adapter,
    make_base,
    measure,
    print_report,
    say,
    work_folder,
)

SERVER: Final = Path(__file__).parents[1] / "tests" / "support" / "counted_store.py"
LAYERS: Final = 9
BUCKET: Final = "bench"
SETTINGS: Final = {
    "AWS_ACCESS_KEY_ID": "mock",
    "AWS_SECRET_ACCESS_KEY": "mock",
    "AWS_REGION": "us-east-1",
    "HF_HUB_OFFLINE": "1",
}
WRITES: Final = ("begin", "put", "put part", "copy", "copy part", "end")


def main() -> int:
    """Run the benchmark."""
    arguments = common_arguments(__doc__, runs=1).parse_args()
    shape = replace(TINY_LLAMA, layers=LAYERS).scaled(arguments.scale)
    with work_folder(arguments) as folder, served() as address:
        os.environ.update(SETTINGS, AWS_ENDPOINT_URL=address, XDG_CACHE_HOME=str(folder / "cache"))
        say("making base and adapter, and sending the base")
        base = make_base(folder / "base", shape)
        adapter = make_adapter(folder / "adapter", shape, ("q_proj", "v_proj"))
        client = opened(address)
        for path in base.iterdir():
            client.upload_file(str(path), BUCKET, f"base/{path.name}")
        counts(address)
        timings, figures = compared(folder, base, adapter, client, address)
        size = sum(path.stat().st_size for path in base.iterdir())
    print_report(f"stores, a base of {size / 1e9:.2f} GB", timings, figures, as_json=arguments.json)
    return 0


def compared(
    folder: Path, base: Path, adapter: Path, client: Any, address: str
) -> tuple[list[Timing], list[Figure]]:
    """Run every command once, and return what it took and what the store counted."""
    stored, local = f"s3://{BUCKET}/base", folder / "local"
    changed = changed_bytes(base, adapter)
    size = sum(path.stat().st_size for path in base.iterdir())
    cases: dict[str, list[str | Path]] = {
        "merge, disk to disk": ["merge", base, adapter, "-o", local],
        "merge, disk to store": ["merge", base, adapter, "-o", f"s3://{BUCKET}/one"],
        "merge, store to disk": ["merge", stored, adapter, "-o", folder / "two"],
        "merge, store to store": ["merge", stored, adapter, "-o", f"s3://{BUCKET}/three"],
        "verify, in the store": [
            *("verify", f"s3://{BUCKET}/three", "--base", stored, "--adapter", adapter)
        ],
    }
    timings, figures = [], []
    for name, argv in cases.items():
        timings += measure([Command(name, [*loratool_command(), *argv])], 1, warm_up=False)
        found = counts(address)
        requests = found["requests"]
        detail = ", ".join(f"{count} {kind}" for kind, count in sorted(requests.items()))
        figures.append(Figure(f"{name}: requests", sum(requests.values()), note=detail))
        if not requests:
            continue
        target = "<= 0.12" if name == "merge, store to store" else ""
        figures.append(Figure(f"{name}: read / base", found["read"] / size, target=target))
        if any(kind in requests for kind in WRITES):
            figures.append(Figure(f"{name}: sent / base", found["sent"] / size))
            figures.append(Figure(f"{name}: copied / base", found["copied"] / size))
            figures.append(Figure(f"{name}: sent / changed", found["sent"] / changed))
    wanted = digests({path.name: path.read_bytes() for path in weights(local)})
    same = [
        wanted == digests({path.name: path.read_bytes() for path in weights(folder / "two")}),
        *(wanted == digests(dict(stored_weights(client, key))) for key in ("one/", "three/")),
    ]
    figures.append(Figure("outputs with the bytes of the local one", sum(same), target="3"))
    return timings, figures


def weights(folder: Path) -> list[Path]:
    """Return the weights files of a model."""
    return sorted(folder.glob("*.safetensors"))


def stored_weights(client: Any, prefix: str) -> Iterator[tuple[str, bytes]]:
    """Yield the weights files of a model in the store."""
    for each in client.list_objects_v2(Bucket=BUCKET, Prefix=prefix)["Contents"]:
        if each["Key"].endswith(".safetensors"):
            body = client.get_object(Bucket=BUCKET, Key=each["Key"])["Body"].read()
            yield each["Key"].removeprefix(prefix), body


def digests(files: Mapping[str, bytes]) -> dict[str, str]:
    """Return the SHA-256 of each file."""
    return {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}


def changed_bytes(base: Path, adapter: Path) -> int:
    """Return the bytes of the tensors that the adapter changes."""
    from loratool import merge

    plan = merge(base, [adapter], base.parent / "none", dry_run=True).plan
    return sum(step.spec.nbytes for step in plan.steps() if step.is_changed)


def opened(address: str) -> Any:
    """Return a client of the store, with the bucket made."""
    import boto3
    from botocore.config import Config

    # The mock tells sums of objects in parts that are not theirs.
    config = Config(response_checksum_validation="when_required")
    client = boto3.client("s3", endpoint_url=address, region_name="us-east-1", config=config)
    client.create_bucket(Bucket=BUCKET)
    return client


def counts(address: str) -> dict[str, Any]:
    """Return what was counted since this was asked last."""
    with urlopen(f"{address}/counts-of-requests") as answer:
        found: dict[str, Any] = json.load(answer)
    return found


@contextmanager
def served() -> Iterator[str]:
    """Serve the store from a process of its own."""
    argv = [sys.executable, str(SERVER)]
    with subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as server:
        assert server.stdout is not None and server.stdin is not None
        try:
            yield server.stdout.readline().strip()
        finally:
            server.stdin.close()
            server.wait()


if __name__ == "__main__":
    sys.exit(main())
