"""The adapter that stands for the difference of two models, for any choice of ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from loratool.adapter.model import ExtraKind, Kind
from loratool.adapter.part import Part
from loratool.adapter.scheme import Scheme
from loratool.base.model import Model
from loratool.base.ties import Tie
from loratool.codecs.codec import CodedTensor
from loratool.codecs.weights import Weight
from loratool.errors import UnsupportedError
from loratool.files.places import origin_of
from loratool.names.paths.dotted import from_paths
from loratool.plan.adapter import AdapterPlan
from loratool.plan.card import licence_of
from loratool.plan.history import History, Source
from loratool.values.expr import Stored
from loratool.verbs.algebra.combination import twin_part
from loratool.verbs.algebra.modules import Joint
from loratool.verbs.algebra.shape import DeltaShape
from loratool.verbs.extraction.difference import Extracted, LeadingPart
from loratool.verbs.extraction.pairs import Leftover, Target
from loratool.write.adapter import NewAdapter
from loratool.write.extras import Extras, NewExtra
from loratool.write.options import WriteOptions
from loratool.write.write import write

__all__ = ["Difference"]

TASKS: Final = {"ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM"}


def _shape_of(target: Target, dtype: str | None, *, has_magnitude: bool) -> DeltaShape:
    return DeltaShape(
        module=target.module,
        kind=target.kind,
        dtype=dtype or target.dtype,
        out=target.out,
        into=target.into,
        nesting=target.nesting,
        experts=target.experts,
        parameter=target.name if target.is_parameter else None,
        has_magnitude=has_magnitude,
    )


@dataclass(frozen=True)
class Difference:
    """Everything about an extracted adapter but the ranks of its modules.

    Attributes:
        base: The base.
        tuned: The finetuned model.
        targets: Modules that changed.
        carried: Tensors that are written whole, from the finetuned model.
        scheme: What is written.
        options: How.
        asked: What was asked for, for the metadata.
        modules: The decompositions by name; empty as long as nothing is computed.
        clamp: The quantile to clamp factors at, if any.
        group: A rank group for all modules, where the scheme has one rank.
        dtype: Of the factors, as a header calls it; by default that of each weight.
        is_dora: Whether rows have lengths of their own, which are float32 always: eight bits of
            them would lose as much as all of the weight's rounding.
    """

    base: Model
    tuned: Model
    targets: Sequence[Target]
    carried: Sequence[Leftover]
    scheme: Scheme
    options: WriteOptions
    asked: Mapping[str, Any]
    modules: Mapping[str, Extracted]
    clamp: float | None = None
    group: str | None = None
    dtype: str | None = None
    is_dora: bool = False

    @property
    def joints(self) -> list[Joint]:
        """The modules, with the rank groups that they are in."""
        shapes = [_shape_of(t, self.dtype, has_magnitude=self.is_dora) for t in self.targets]
        return [
            Joint(target.name, (), shape, group=self.group)
            for target, shape in zip(self.targets, shapes, strict=True)
        ]

    @property
    def tie(self) -> Tie | None:
        """The weight that embedding and head share in both models, if they do."""
        tie = self.tuned.tie
        if self.base.tie is None or tie is None or tie.source == tie.head:
            return None
        return None if self.tuned.config.is_encoder_decoder else self._in_libraries(tie)

    def _in_libraries(self, tie: Tie) -> Tie:
        """Return a tie under the names that libraries have, as the modules are."""
        called = self.tuned.name_in_libraries
        return Tie(
            tuple(map(called, tie.names)),
            tuple(map(called, tie.stored)),
            None if tie.input is None else called(tie.input),
            None if tie.head is None else called(tie.head),
        )

    def plan(self, ranks: Mapping[str, int], *, keep: bool = True) -> AdapterPlan:
        """Return the plan for ``ranks``, by rank group; rank 0 leaves a module out.

        Raises:
            UnsupportedError: The scheme cannot express it.
        """
        try:
            return write(self._adapter(ranks), self.scheme, self.options)
        except UnsupportedError as error:
            hint = "leave it out with --exclude, or write another scheme, such as --to peft"
            raise UnsupportedError(error.where, error.what, hint=hint) from None

    def _adapter(self, ranks: Mapping[str, int]) -> NewAdapter:
        tie = self.tie
        parts: list[Part] = []
        twin: str | None = None
        joints = self.joints
        for joint in joints:
            rank = ranks[joint.rank_group]
            if not rank:
                continue
            factors = LeadingPart(self.modules, joint.name, rank, joint.shape.dtype, self.clamp)
            parts.append(joint.shape.part(factors, rank))
            if tie is not None and f"{joint.shape.module}.weight" == tie.source:
                parts.append(_twin(joint, tie, factors, rank))
                twin = joint.name
        adapted = {part.module for part in parts}
        saved = self._saved(adapted, tie)
        names = from_paths([part.module for part in parts])
        return NewAdapter(
            parts=tuple(parts),
            extras=Extras(items=list(self._extras(saved, tie))),
            config={},
            config_changes=self._config(parts, saved, adapted, twin, tie),
            family=self.tuned.family or names.family,
            components=names.components | set(self.tuned.components),
            is_native=names.is_native,
            history=self.history,
            licence=licence_of(self.tuned.path) or licence_of(self.base.path),
            stamps={s.path: s.stamp for m in (self.base, self.tuned) for s in m.shards},
            dropped=tuple(
                (joint.name, "the budget leaves no rank for it")
                for joint in joints
                if not ranks[joint.rank_group]
            ),
        )

    def _is_tied_whole(self, tie: Tie | None) -> bool:
        """Whether the shared weight of embedding and head is carried along whole."""
        return tie is not None and any(item.key == tie.source for item in self.carried)

    def _saved(self, adapted: set[str], tie: Tie | None) -> list[str]:
        """Return the modules that are saved whole: all of whose tensors the file has to hold.

        A bias alone is no reason to save a module: PEFT stores biases by themselves.
        """
        names = (item.key.rpartition(".") for item in self.carried)
        modules = dict.fromkeys(module for module, _, leaf in names if leaf != "bias")
        if tie is not None and self._is_tied_whole(tie):
            modules[tie.names[-1].removesuffix(".weight")] = None
        return [module for module in modules if module and module not in adapted]

    def _extras(self, saved: Sequence[str], tie: Tie | None) -> Iterator[NewExtra]:
        tensors: dict[str, Weight] = {
            item.key: item.tuned for item in self.carried if item.tuned is not None
        }
        if tie is not None and self._is_tied_whole(tie):
            tensors[tie.names[-1]] = tensors[tie.source]
        for module in saved:
            for name, stored in self.tuned.tensors.items():
                called = self.tuned.name_in_libraries(name)
                if called.rpartition(".")[0] == module:
                    tensors.setdefault(called, stored)
        for name, stored in tensors.items():
            if isinstance(stored, CodedTensor):
                raise UnsupportedError(
                    name,
                    f"is {stored.codec.name} in the finetuned model, and no adapter holds codes",
                    hint="give a finetuned model in 16 bits",
                )
            yield NewExtra(name, ExtraKind.FULL, Stored(stored), name)

    def _config(
        self,
        parts: Sequence[Part],
        saved: Sequence[str],
        adapted: set[str],
        twin: str | None,
        tie: Tie | None,
    ) -> dict[str, Any]:
        names = self.tuned.config.architectures
        task = next((t for end, t in TASKS.items() if names and names[0].endswith(end)), None)
        biases = {i.key.rpartition(".")[0] for i in self.carried if i.key.endswith(".bias")}
        alone = biases - adapted - set(saved)
        return {
            "base_model_name_or_path": self._called,
            "task_type": task,
            "fan_in_fan_out": any(
                target.is_transposed and target.kind is Kind.LINEAR and not target.is_parameter
                for target in self.targets
                if not self.tuned.is_turned(target.module)
            ),
            "modules_to_save": list(saved) or None,
            "bias": "all" if alone else "lora_only" if biases & adapted else "none",
            "lora_dropout": 0.0,
            "ensure_weight_tying": self._is_tied_whole(tie) or twin is not None,
            "target_modules": self._targets(parts, twin),
        }

    @property
    def history(self) -> History:
        """How it comes to be."""
        inputs = tuple(Source.of_model(m.path, m.raw.values()) for m in (self.base, self.tuned))
        return History("extract", inputs, self.asked)

    @property
    def _called(self) -> str:
        """What is recorded as the base: its name on the hub, where it is from there."""
        origin = origin_of(self.base.path)
        if origin is None or origin.inside:
            return str(self.base.path)
        return origin.repo

    def _targets(self, parts: Sequence[Part], twin: str | None) -> list[str]:
        """Return the shortest endings of paths that mean exactly the modules of ``parts``.

        Libraries rename what comes before the layers from version to version; endings last.
        """
        wanted = {part.pattern_path for part in parts if part.parameter is None and part.is_target}
        names = map(self.tuned.name_in_libraries, self.tuned.tensors)
        paths = (name.split(".")[:-1] for name in names)
        others = {
            ".".join(pieces[:count]) for pieces in paths for count in range(1, len(pieces) + 1)
        } - wanted
        taken = {ending for module in others for ending in _endings(module)}
        # PEFT finds what to tie by the whole path of the embedding.
        found = (
            module
            if module == twin
            else next((ending for ending in _endings(module) if ending not in taken), module)
            for module in sorted(wanted)
        )
        return list(dict.fromkeys(found))


def _twin(table: Joint, tie: Tie, factors: LeadingPart, rank: int) -> Part:
    """Return the head that shares the weight of an extracted embedding; PEFT ties them again."""
    shape = replace(
        table.shape,
        module=tie.names[-1].removesuffix(".weight"),
        kind=Kind.LINEAR,
        out=table.shape.into[0],
        into=(table.shape.out,),
        is_target=False,
    )
    return twin_part(Joint(shape.module, (), shape, twin_of=table.name), factors, rank)


def _endings(module: str) -> Iterator[str]:
    """Yield the endings of a dotted path, the shortest first."""
    pieces = module.split(".")
    for count in range(1, len(pieces) + 1):
        yield ".".join(pieces[-count:])
