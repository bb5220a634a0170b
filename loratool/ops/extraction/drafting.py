"""From decomposed modules to the plan of an adapter, with what is carried along whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loratool.adapter.model import Kind
from loratool.adapter.saving import OutputSite, lora_config, site_specs
from loratool.adapter.scheme import KeyScheme
from loratool.files.checkpoint import Checkpoint
from loratool.files.dtypes import DTYPES
from loratool.files.inputs import Stamp
from loratool.files.spec import TensorSpec
from loratool.names.experts import is_fusible_expert
from loratool.names.tied import architectures
from loratool.ops.algebra.extras import Carried
from loratool.ops.algebra.joining import Joint
from loratool.ops.algebra.plan import WEIGHTS_NAME, AdapterPlan, ModuleJob
from loratool.ops.algebra.planning import check_place
from loratool.ops.algebra.provenance import history_metadata
from loratool.ops.extraction.pairing import Leftover, Target
from loratool.ops.merging.context import BaseView
from loratool.ops.merging.tied import find_tie

__all__ = ["ExtractionDraft", "output_of"]

TASKS = {"ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM"}


def output_of(target: Target, dtype: str) -> OutputSite:
    """Return how the module of ``target`` is written, at rank 1."""
    return OutputSite(
        module=target.module,
        kind=target.kind,
        rank=1,
        alpha=1.0,
        dtype=dtype,
        out=target.out,
        into=target.into,
        pattern_path=target.name,
        nesting=target.nesting,
        experts=target.experts,
        is_parameter=target.is_parameter,
        is_expert=is_fusible_expert(target.module),
    )


@dataclass
class ExtractionDraft:
    """Everything about an extracted adapter but the ranks of its modules.

    Attributes:
        base: The base.
        tuned: The finetuned model.
        targets: Modules that changed.
        carried: Tensors that are written whole, from the finetuned model.
        scheme: How keys are named.
        output: Where it goes.
        options: What was asked for, for the metadata.
        dtype: The dtype to write (``F32``), or ``None`` for that which holds both weights.
    """

    base: Checkpoint
    tuned: Checkpoint
    targets: Sequence[Target]
    carried: Sequence[Leftover]
    scheme: KeyScheme
    output: Path
    options: Mapping[str, Any]
    dtype: str | None = None

    def __post_init__(self) -> None:
        check_place(self.output, self.scheme.name, has_config=self.has_config)
        self.metadata = history_metadata(
            "extract",
            [(path.resolve().name, None) for path in (self.base.path, self.tuned.path)],
            self.options,
        )
        self.joints = [
            Joint(target.name, (), output_of(target, self.dtype or target.dtype))
            for target in self.targets
        ]
        view = BaseView(self.tuned)
        tie = find_tie(view) if find_tie(BaseView(self.base)) is not None else None
        self.tie = None if tie is None or self.tuned.config.get("is_encoder_decoder") else tie

    @property
    def has_config(self) -> bool:
        """Whether a configuration is written: scale 1 needs none but where PEFT reads it."""
        return self.scheme.name == "peft"

    def plan(self, ranks: Mapping[str, int]) -> AdapterPlan:
        """Return the plan for ``ranks``, by rank group; rank 0 leaves a module out."""
        jobs = []
        for joint in self.joints:
            rank = ranks[joint.rank_group]
            if rank:
                output = replace(joint.output, rank=rank, alpha=float(rank))
                specs = site_specs(self.scheme, output, with_alpha=False)
                jobs.append(ModuleJob(joint, output, specs, "extract"))
                jobs += self._twin(jobs[-1])
        written = {job.joint.name for job in jobs}
        outputs = [job.output for job in jobs]
        carried = self._carried({output.module for output in outputs})
        stamps: dict[Path, Stamp] = {
            shard.path: shard.stamp for model in (self.base, self.tuned) for shard in model.shards
        }
        is_folder = self.output.suffix.lower() != ".safetensors"
        return AdapterPlan(
            jobs=tuple(jobs),
            carried=tuple(carried),
            metadata=self.metadata,
            config=self._config(jobs) if self.has_config else None,
            sidecars=(),
            weights_name=WEIGHTS_NAME if is_folder else "",
            stamps=stamps,
            dropped=tuple(
                (joint.name, "the budget leaves no rank for it")
                for joint in self.joints
                if joint.name not in written
            ),
        )

    def _twin(self, job: ModuleJob) -> list[ModuleJob]:
        """Return how the head is written that shares the weight of an extracted embedding.

        PEFT ties the two again: the head's factors are the embedding's, transposed.
        """
        table, tie = job.output, self.tie
        if tie is None or f"{table.module}.weight" != tie.embedding:
            return []
        module = tie.head.removesuffix(".weight")
        output = replace(
            table,
            module=module,
            kind=Kind.LINEAR,
            out=table.into[0],
            into=(table.out,),
            pattern_path=module,
            is_target=False,
        )
        joint = Joint(module, (), output, twin_of=job.joint.name)
        return [ModuleJob(joint, output, site_specs(self.scheme, output, with_alpha=False), "twin")]

    def _is_tied_whole(self) -> bool:
        """Whether the shared weight of embedding and head is carried along whole."""
        return self.tie is not None and any(i.name == self.tie.embedding for i in self.carried)

    def _saved(self, adapted: set[str]) -> list[str]:
        """Return the modules that are saved whole: all of whose tensors the file has to hold.

        A bias alone is no reason to save a module: PEFT stores biases by themselves.
        """
        names = (item.name.rpartition(".") for item in self.carried)
        modules = dict.fromkeys(module for module, _, leaf in names if leaf != "bias")
        if self.tie is not None and self._is_tied_whole():
            modules[self.tie.head.removesuffix(".weight")] = None
        return [module for module in modules if module and module not in adapted]

    def _carried(self, adapted: set[str]) -> list[Carried]:
        tensors = {item.name: item.tuned for item in self.carried if item.tuned is not None}
        if self.tie is not None and self._is_tied_whole():
            tensors[self.tie.head] = tensors[self.tie.embedding]
        for module in self._saved(adapted):
            for name, stored in self.tuned.tensors.items():
                if name.rpartition(".")[0] == module:
                    tensors.setdefault(name, stored)
        found = []
        for name, stored in tensors.items():
            module, _, leaf = name.rpartition(".")
            path = f"{module}.base_layer.{leaf}" if module in adapted else name
            is_float = DTYPES[stored.spec.dtype].is_float
            dtype = self.dtype if self.dtype and is_float else stored.spec.dtype
            spec = TensorSpec(f"{self.scheme.prefix}{path}", dtype, stored.spec.shape)
            found.append(Carried(spec, (stored,)))
        return found

    def _bias(self, adapted: set[str], saved: Sequence[str]) -> str:
        """Return what the configuration has to say about biases that are carried alone."""
        modules = {
            item.name.rpartition(".")[0] for item in self.carried if item.name.endswith(".bias")
        }
        if modules - adapted - set(saved):
            return "all"
        return "lora_only" if modules & adapted else "none"

    def _config(self, jobs: Sequence[ModuleJob]) -> dict[str, Any]:
        adapted = {job.output.module for job in jobs}
        saved = self._saved(adapted)
        names = architectures(self.tuned.config)
        task = next((t for end, t in TASKS.items() if names and names[0].endswith(end)), None)
        is_transposed = any(
            target.is_transposed and target.kind.value == "linear" and not target.is_parameter
            for target in self.targets
        )
        return lora_config(
            {},
            [job.output for job in jobs],
            keep_targets=False,
            changes={
                "base_model_name_or_path": str(self.base.path),
                "task_type": task,
                "fan_in_fan_out": is_transposed,
                "modules_to_save": saved or None,
                "bias": self._bias(adapted, saved),
                "lora_dropout": 0.0,
                "ensure_weight_tying": self._is_tied_whole()
                or any(job.route == "twin" for job in jobs),
                "target_modules": self._targets(jobs),
            },
        )

    def _targets(self, jobs: Sequence[ModuleJob]) -> list[str]:
        """Return the shortest endings of paths that mean exactly the modules of ``jobs``.

        Libraries rename what comes before the layers from version to version; endings last.
        """
        wanted = {
            job.output.pattern_path
            for job in jobs
            if not job.output.is_parameter and job.output.is_target
        }
        paths = (name.split(".")[:-1] for name in self.tuned.tensors)
        others = {
            ".".join(parts[:count]) for parts in paths for count in range(1, len(parts) + 1)
        } - wanted
        taken = {ending for module in others for ending in _endings(module)}
        # PEFT finds what to tie by the whole path of the embedding.
        tied = {job.joint.twin_of for job in jobs if job.route == "twin"}
        found = (
            module
            if module in tied
            else next((ending for ending in _endings(module) if ending not in taken), module)
            for module in sorted(wanted)
        )
        return list(dict.fromkeys(found))


def _endings(module: str) -> Iterator[str]:
    """Yield the endings of a dotted path, the shortest first."""
    parts = module.split(".")
    for count in range(1, len(parts) + 1):
        yield ".".join(parts[-count:])
