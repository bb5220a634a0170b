"""Coded findings: what ``validate`` and ``verify`` report. ``docs/findings.md`` explains each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Self

from loratool.display.shown import Shown

if TYPE_CHECKING:
    from loratool.display.document import Document

__all__ = ["CODES", "SEVERITIES", "Finding", "Findings", "finding"]

LONGEST_TEXT: Final = 1000
SEVERITIES: Final = ("error", "warning", "info")
"""How bad a finding is, the worst first."""

CODES: Final = {
    "LT000": ("error", "the file cannot be read"),
    "LT001": ("error", "a factor is missing"),
    "LT002": ("error", "a factor is empty or has fewer than two dimensions"),
    "LT003": ("error", "the factors do not fit each other"),
    "LT004": ("error", "a factor is not floating point"),
    "LT005": ("error", "the rank contradicts the configuration"),
    "LT006": ("error", "DoRA flag and magnitude vectors disagree"),
    "LT007": ("error", "lora_bias and the tensors disagree"),
    "LT008": ("error", "a combination that is not defined"),
    "LT009": ("warning", "alpha is not recorded"),
    "LT010": ("warning", "a pattern matches no module"),
    "LT011": ("warning", "patterns overlap with different values"),
    "LT012": ("warning", "a target matches no module"),
    "LT013": ("warning", "a module is not among the targets"),
    "LT014": ("warning", "an unknown field of the configuration"),
    "LT015": ("error", "the configuration is wrong"),
    "LT016": ("error", "a module to save is not in the file"),
    "LT017": ("error", "NaN or infinity"),
    "LT018": ("warning", "an untrained module"),
    "LT019": ("warning", "a dangerous name"),
    "LT020": ("info", "an unusual dtype"),
    "LT021": ("error", "the base has no such module"),
    "LT022": ("error", "the shapes do not fit the base"),
    "LT023": ("warning", "it cannot be merged"),
    "LT024": ("warning", "a tensor that nothing uses"),
    "LT025": ("warning", "two weights files"),
    "LT026": ("warning", "a prefix that loaders do not expect"),
    "LT027": ("warning", "the base is quantised"),
    "LT028": ("error", "trained tokens and their indices disagree"),
    "LT029": ("info", "an unusual scale"),
    "LT030": ("info", "a saved head that the configuration does not list"),
    "LT031": ("info", "worth knowing"),
    "LT032": ("error", "the file mixes schemes"),
    "LT033": ("warning", "a module whose path is not known"),
    "LT034": ("error", "the head that was trained is in no file"),
    "LT035": ("info", "trained on, or merged into, a quantised base"),
    "LT036": ("warning", "a checksum is wrong"),
    "LT037": ("info", "the base that it records is at hand"),
    "LT101": ("error", "a tensor is missing"),
    "LT102": ("error", "a tensor that should not be there"),
    "LT103": ("error", "wrong dtype or shape"),
    "LT104": ("error", "a tensor that should be untouched differs"),
    "LT105": ("error", "a merged tensor has other values"),
    "LT106": ("info", "rounded differently"),
    "LT107": ("error", "config.json does not fit the merge"),
    "LT108": ("error", "the index is wrong"),
    "LT109": ("error", "the merged model cannot be read"),
    "LT110": ("error", "a file beside the weights differs"),
    "LT111": ("warning", "something beside the weights is missing, or more than there should be"),
    "LT201": ("error", "the loader refuses it"),
    "LT202": ("error", "the loader applies another scale"),
    "LT203": ("error", "the loader misreads it, or leaves something out"),
    "LT204": ("info", "worth knowing about the loader"),
}
"""Code to its usual severity and its title."""
MOST_SHOWN: Final = 10
"""Findings of one code that people see; all of them are in the JSON."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something found.

    Attributes:
        code: One of ``CODES``.
        severity: ``error``, ``warning`` or ``info``.
        where: File, module or tensor.
        message: What was found, and what was expected.
        hint: The next step, or ``None``.
    """

    code: str
    severity: str
    where: str
    message: str
    hint: str | None = None

    @property
    def is_error(self) -> bool:
        """Whether it makes the file unusable."""
        return self.severity == "error"

    def as_json(self) -> dict[str, str | None]:
        """Return the keys that the command line's JSON promises."""
        return {
            "code": self.code,
            "severity": self.severity,
            "where": self.where,
            "message": self.message,
            "hint": self.hint,
        }


class Findings(Shown, tuple[Finding, ...]):
    """Everything that was found, in order.

    Attributes:
        clean: What to say where that is nothing.
    """

    clean: str

    def __new__(cls, items: Iterable[Finding] = (), clean: str = "nothing was found") -> Self:
        """Make it of findings."""
        self = super().__new__(cls, items)
        self.clean = clean
        return self

    @property
    def ok(self) -> bool:
        """Whether none is an error."""
        return not any(item.is_error for item in self)

    def as_json(self) -> dict[str, Any]:
        """Return the keys that the command line's JSON promises."""
        return {"schema": 1, "ok": self.ok, "findings": [item.as_json() for item in self]}

    def document(self) -> Document:
        """Return what people see of it: of each code the first few, and how many more there are."""
        from loratool.display.document import Document, Remark, Remarks

        shown: dict[tuple[str, str], list[Remark]] = {}
        counts = Counter((item.severity, item.code) for item in self)
        for item in self:
            remarks = shown.setdefault((item.severity, item.code), [])
            if len(remarks) < MOST_SHOWN:
                hint = item.hint or ""
                remarks.append(Remark(item.severity, item.code, item.where, item.message, hint))
        for (severity, code), remarks in shown.items():
            more = counts[severity, code] - len(remarks)
            if more:
                words = f"{CODES[code][1]}; --json lists all"
                remarks.append(Remark(severity, code, f"and {more:,} more", words))
        items = tuple(remark for remarks in shown.values() for remark in remarks)
        return Document((Remarks(items, self.summary),))

    @property
    def summary(self) -> str:
        """How many there are of each severity, and of each code where not all are shown."""
        counts = {name: sum(item.severity == name for item in self) for name in SEVERITIES}
        words = [
            f"{count:,} {name}{'s' * (count != 1 and name != 'info')}"
            for name, count in counts.items()
            if count
        ]
        codes = Counter(item.code for item in self).most_common()
        if codes and codes[0][1] > MOST_SHOWN:
            each = ", ".join(f"{count:,} of {code}" for code, count in codes)
            return f"{', '.join(words)}: {each}"
        return ", ".join(words) or self.clean


def finding(code: str, where: object, message: str, hint: str | None = None) -> Finding:
    """Return a finding with the usual severity of its code."""
    return Finding(code, CODES[code][0], _cut(where), _cut(message), hint and _cut(hint))


def _cut(text: object) -> str:
    """Return a text at a length that somebody may read; names in files can be megabytes."""
    words = str(text)
    return words if len(words) <= LONGEST_TEXT else f"{words[:LONGEST_TEXT]}…"
