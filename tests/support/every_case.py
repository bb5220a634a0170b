"""Run most verbs on every case of the fixtures, and print what comes out as JSON.

``.ci/pythons`` runs it with several interpreters, without PyTorch and with warnings as errors, and
compares: the same inputs give the same bytes under each.

    python tests/support/every_case.py > out.json
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import loratool

FIXTURES = Path(__file__).parent.parent.parent / "fixtures"
SCHEMES = ("kohya", "mlx", "module-path", "transposed")


def main() -> None:
    warnings.simplefilter("error")
    cases = json.loads((FIXTURES / "cases.json").read_text())
    found: dict[str, Any] = {}
    for case in cases:
        with tempfile.TemporaryDirectory() as folder:
            for verb, call in calls(case, Path(folder)):
                found[f"{case['case']} {verb}"] = outcome(call, folder)
    assert "torch" not in sys.modules
    json.dump(found, sys.stdout, indent=1, sort_keys=True)
    print(f"{len(found)} results of Python {sys.version.split()[0]}", file=sys.stderr)


def calls(case: dict[str, Any], folder: Path) -> list[tuple[str, Callable[[], Any]]]:
    base, adapters = FIXTURES / case["base"], [FIXTURES / path for path in case["adapters"]]
    adapter, merged = adapters[0], folder / "merged"

    def written(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        function(*arguments, **options)
        return [digest(path) for path in sorted(folder.rglob("*")) if path.is_file()]

    return [
        ("inspect", lambda: loratool.inspect(adapter, spectrum=False).as_json()),
        ("validate", lambda: as_json(loratool.validate(adapter, base=base, deep=True))),
        *(
            (name, lambda to=name: written(loratool.convert, adapter, to, folder / to, base=base))
            for name in SCHEMES
        ),
        ("truncate", lambda: written(loratool.truncate, adapter, folder / "small", rank=1)),
        ("merge", lambda: written(loratool.merge, base, adapters, merged)),
        ("verify", lambda: as_json(loratool.verify(merged, base=base, adapters=adapters))),
        ("extract", lambda: written(loratool.extract, base, merged, folder / "again", rank=2)),
    ]


def outcome(call: Callable[[], Any], folder: str) -> Any:
    """Return what is returned, or the error."""
    try:
        text = json.dumps(call(), default=str)
    except loratool.LoratoolError as error:
        text = json.dumps(f"{type(error).__name__}: {error}")
    return json.loads(text.replace(folder, "FOLDER").replace(str(FIXTURES), "FIXTURES"))


def as_json(findings: tuple[loratool.Finding, ...]) -> list[dict[str, Any]]:
    return [finding.as_json() for finding in findings]


def digest(path: Path) -> tuple[str, str]:
    return path.name, hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    main()
