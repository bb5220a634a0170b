"""What ``--version`` says, and with ``--verbose`` all that a report of a bug needs."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Iterator

import loratool

__all__ = ["version_lines"]


def version_lines(*, is_verbose: bool) -> Iterator[str]:
    """Yield the version, and what it runs on. PyTorch is not imported for it."""
    yield f"loratool {loratool.__version__}"
    if not is_verbose:
        return
    facts = list(_facts())
    width = max(len(name) for name, _ in facts) + 2
    for name, value in facts:
        yield f"{name + ':':<{width}}{value}"


def _facts() -> Iterator[tuple[str, str]]:
    from importlib.metadata import PackageNotFoundError, requires

    yield "Python", f"{platform.python_version()} ({platform.python_implementation()})"
    yield "platform", f"{platform.platform()}, {os.cpu_count()} processors"
    yield "executable", sys.executable
    yield "package", str(loratool.__path__[0])
    yield "numpy", f"{_version('numpy')}, BLAS: {_blas()}"
    yield "torch", _version("torch")
    yield "GPU", _gpu()
    try:
        wanted = requires("loratool") or []
    except PackageNotFoundError:
        wanted = []
    for name in ("click", "rich", "safetensors", "threadpoolctl", "array-api-compat"):
        yield name, _version(name)
    extras: dict[str, list[str]] = {}
    for line in wanted:
        package, _, marker = line.partition(";")
        extra = marker.partition("extra ==")[2].strip().strip("'\"")
        name = re.split(r"[^\w.-]", package.strip(), maxsplit=1)[0]
        if extra not in ("", "dev", "test") and name != "loratool":
            extras.setdefault(extra, []).append(f"{name} {_version(name)}")
    for extra, packages in extras.items():
        yield f"[{extra}]", ", ".join(packages)
    names = sorted(name for name in os.environ if name.startswith(("LORATOOL_", "HF_", "OMP_")))
    yield "environment", " ".join(f"{name}={_shown(name)}" for name in names) or "nothing set"


def _shown(name: str) -> str:
    """Return the value of a variable, unless it is a secret."""
    return "(set)" if "TOKEN" in name else os.environ[name]


def _version(package: str) -> str:
    """Return the installed version of a package, without importing it."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _blas() -> str:
    """Return the library that numpy computes products with."""
    try:
        from numpy import __config__
    except ImportError as error:
        return f"unknown ({error})"
    found = getattr(__config__, "CONFIG", {}).get("Build Dependencies", {}).get("blas", {})
    return f"{found.get('name', 'unknown')} {found.get('version', '')}".rstrip()


def _gpu() -> str:
    """Return the GPUs that the driver tells of."""
    from loratool.plan.devices import gpu_names

    return ", ".join(gpu_names()) or "none found"
