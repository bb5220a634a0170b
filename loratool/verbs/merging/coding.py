"""What becomes of coded weights in the output: plain numbers, or codes like the base's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from loratool.base.model import Model
from loratool.codecs.codec import CodedTensor, Doubting
from loratool.codecs.weights import Weight, path_of
from loratool.errors import OptionError, UnsupportedError
from loratool.files.containers import container_of
from loratool.files.inputs import InputFiles
from loratool.files.spec import StoredTensor, TensorSpec
from loratool.plan.model import Recoded, Step

__all__ = ["QUANTIZED", "check_quantized", "decoded_steps", "decoding_notes", "written"]

QUANTIZED: Final = ("dequantize", "keep")
"""What may become of quantised weights."""
PLAIN: Final = "leave out --quantized keep to write plain numbers, and quantise the result"

Placed = tuple[Step, Path | None]
"""A step, and the file of the base whose place its file takes; ``None`` for what is added."""


def check_quantized(
    model: Model, quantized: str, *, dtype: str | None, is_replicated: bool
) -> None:
    """Refuse options that do not go with a quantised base.

    Raises:
        OptionError: ``--quantized`` is neither of its values, or does not go with ``--dtype``.
        UnsupportedError: Its layers are replicated.
    """
    if quantized not in QUANTIZED:
        raise OptionError.none_of("--quantized", quantized, QUANTIZED)
    if quantized != "keep" or model.quantization is None:
        return
    if dtype is not None:
        raise OptionError(
            "--dtype", "does not go with --quantized keep, which writes the base's own dtypes"
        )
    if is_replicated:
        raise UnsupportedError(
            model.path, "--quantized keep does not go with layer_replication", hint=PLAIN
        )


def written(view: Model, steps: Mapping[str, Step], quantized: str) -> Iterator[Placed]:
    """Yield the steps of all tensors of the output, those of coded weights part by part.

    Raises:
        UnsupportedError: A weight has to be written in codes, and cannot be.
    """
    seen: set[str] = set()
    for name, step in steps.items():
        weight = view.tensors.get(name)
        if not isinstance(weight, CodedTensor):
            yield step, path_of(weight) if weight is not None else None
            continue
        prefix = name.removesuffix(weight.spec.name)
        if step.is_changed and quantized == "keep":
            yield from _recoded(step, weight, prefix)
        elif quantized == "keep" or (
            not step.is_changed and container_of(path_of(weight)).keeps_codes
        ):
            yield from ((_copy(part, prefix), part.path) for part in weight.parts.values())
        else:
            yield step, path_of(weight)
            continue
        seen |= {f"{prefix}{part.spec.name}" for part in weight.parts.values()}
    if quantized == "keep":
        for name, stored in view.raw.items():
            if name not in seen and name not in view.tensors:
                yield _copy(stored, name.removesuffix(stored.spec.name)), stored.path


def _copy(part: StoredTensor, prefix: str) -> Step:
    spec = part.spec
    return Step(TensorSpec(f"{prefix}{spec.name}", spec.dtype, spec.shape), part, base=part)


def _recoded(step: Step, weight: CodedTensor, prefix: str) -> Iterator[Placed]:
    if step.replaced or step.spec.shape != weight.spec.shape:
        raise UnsupportedError(
            step.spec.name,
            f"is replaced as a whole, and --quantized keep changes weights in {weight.codec.name} "
            "only by deltas",
            hint=PLAIN,
        )
    roles = weight.codec.encoder(weight).roles
    recoded = Recoded(weight, {role: f"{prefix}{weight.parts[role].spec.name}" for role in roles})
    for role, part in weight.parts.items():
        copy = _copy(part, prefix)
        if role in roles:
            copy = Step(copy.spec, weight, step.edits, base=weight, recoded=recoded)
        yield copy, part.path


def decoded_steps(steps: Sequence[Placed]) -> list[Step]:
    """Return the steps of coded weights that are written as plain numbers."""
    coded = (step for step, _ in steps if isinstance(step.base, CodedTensor))
    return [step for step in coded if step.recoded is None]


def decoding_notes(model: Model, decoded: Sequence[Step], quantized: str) -> Iterator[str]:
    """Yield what was written as plain numbers, and what was dropped with it."""
    if decoded:
        kinds = dict.fromkeys(
            step.base.codec.name for step in decoded if isinstance(step.base, CodedTensor)
        )
        yield f"{len(decoded)} weights in {', '.join(kinds)} were written as plain numbers"
        yield from _doubts(model, [step.base for step in decoded])
    if quantized != "keep" and (dropped := model.activation_scales):
        yield f"{len(dropped)} scales of inputs were dropped, such as {dropped[0]!r}"


def _doubts(model: Model, weights: Sequence[Weight | None]) -> Iterator[str]:
    """Yield what codecs are not sure of, once for all weights of which that holds."""
    coded = [one for one in weights if isinstance(one, CodedTensor)]
    doubting = [(one, one.codec) for one in coded if isinstance(one.codec, Doubting)]
    if not doubting:
        return
    from loratool.codecs.parts import FileParts  # with numpy, which no other plan needs

    found: dict[str, list[str]] = {}
    files = InputFiles(model.stamps)
    try:
        for weight, codec in doubting:
            words = codec.doubt(weight, FileParts(weight.parts, files))
            found.setdefault(words or "", []).append(weight.spec.name)
    finally:
        files.close()
    for words, names in found.items():
        if words:
            others = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            yield f"{names[0]}{others} {words}"
