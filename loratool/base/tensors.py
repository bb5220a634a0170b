"""The tensors of a model: one for each weight, however many its codes and scales are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from loratool.base.key_values import config_of, own_shapes
from loratool.codecs.codec import Description, recognise
from loratool.codecs.weights import Weight
from loratool.files.checkpoint import Checkpoint
from loratool.files.spec import StoredTensor

__all__ = ["ACTIVATION_SCALES", "logical_tensors", "raw_tensors"]

ACTIVATION_SCALES: Final = frozenset(
    (
        *("input_scale", "output_scale", "input_global_scale", "scale_input"),
        *("q_scale", "k_scale", "v_scale", "kv_scale", "prob_output_scale", "scaled_fp8"),
        *("input_zero_point", "output_zero_point"),
    )
)
"""What coded models hold of numbers that are no weights: plain ones have no use for it."""


def logical_tensors(checkpoints: Mapping[str, Checkpoint]) -> Mapping[str, Weight]:
    """Return all tensors; those of a component with its name before theirs."""
    if "" in checkpoints:
        return _decoded(checkpoints[""])
    return {
        f"{component}.{name}": stored
        for component, checkpoint in checkpoints.items()
        for name, stored in _decoded(checkpoint).items()
    }


def raw_tensors(checkpoints: Mapping[str, Checkpoint]) -> Mapping[str, StoredTensor]:
    """Return the tensors of the files; those of a component with its name before theirs."""
    return {
        f"{component}.{name}" if component else name: stored
        for component, checkpoint in checkpoints.items()
        for name, stored in own_shapes(checkpoint).items()
    }


def _decoded(checkpoint: Checkpoint) -> Mapping[str, Weight]:
    """Return the tensors of a checkpoint, with one weight where it has codes and scales."""
    tensors = own_shapes(checkpoint)
    coded = recognise(tensors, _description(checkpoint))
    if not coded:
        return tensors
    owners = {part.spec.name: one for one in coded.values() for part in one.parts.values()}
    found: dict[str, Weight] = {}
    for name, stored in tensors.items():
        owner = owners.get(name)
        if owner is None:
            # What only computing with codes needs goes where the codes do.
            if name.rpartition(".")[2] not in ACTIVATION_SCALES:
                found[name] = stored
        elif name == next(iter(owner.parts.values())).spec.name:
            found[owner.spec.name] = owner
    return found


def _description(checkpoint: Checkpoint) -> Description:
    config = config_of(checkpoint)
    metadata = {key: text for shard in checkpoint.shards for key, text in shard.metadata.items()}
    return Description(config.quantization or {}, config.dtype, metadata)
