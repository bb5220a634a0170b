"""The layout of the hub's cache, written by hand."""

from __future__ import annotations

import shutil
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def in_cache(
    cache: Path, repo: str, folder: Path, *, commit: str = COMMIT, ref: str | None = "main"
) -> Path:
    """Put a folder into the cache as a commit of a model: blobs, links to them, and a ref."""
    store = cache / f"models--{repo.replace('/', '--')}"
    snapshot = store / "snapshots" / commit
    (store / "blobs").mkdir(parents=True, exist_ok=True)
    for number, path in enumerate(sorted(folder.rglob("*"))):
        if not path.is_file():
            continue
        blob = store / "blobs" / f"{commit[:8]}{number:032x}"
        shutil.copyfile(path, blob)
        link = snapshot / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(
            Path("../" * (len(link.relative_to(store).parts) - 1)) / "blobs" / blob.name
        )
    if ref is not None:
        place = store / "refs" / ref
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(commit)
    return snapshot
