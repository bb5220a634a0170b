"""The key values of a GGUF file as the configuration of the model in it.

They stand in the configuration under their own keys; those that ``config.json`` has too stand
there under the names that it gives them as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from loratool.base.config import ARCHITECTURE, QUANTIZATION, TIE, ModelConfig, read_config
from loratool.errors import BaseModelError
from loratool.files.checkpoint import Checkpoint
from loratool.files.container import WeightsFile
from loratool.files.dtypes import DTYPES
from loratool.files.gguf import Array, GgufFile
from loratool.files.spec import StoredTensor

__all__ = ["HEAD", "TABLE", "config_of", "own_shapes"]

NAMES: Final = {
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_local_experts": "expert_count",
    "vocab_size": "vocab_size",
}
"""What ``config.json`` calls what stands behind the architecture's name."""
ORIGINAL: Final = "comfy.gguf.orig_shape."
PART: Final = ("split.no", "split.count")
TABLE: Final = "token_embd.weight"
HEAD: Final = "output.weight"


def own_shapes(checkpoint: Checkpoint) -> Mapping[str, StoredTensor]:
    """Return the tensors of a checkpoint, plain ones in the shapes that they are known by.

    GGUF has four dimensions; files of diffusion models say what shape a tensor had before.

    Raises:
        FileFormatError: A shape is none.
    """
    tensors = checkpoint.tensors
    said = {key: text for shard in checkpoint.shards for key, text in shard.metadata.items()}
    if not any(key.startswith(ORIGINAL) for key in said):
        return tensors
    from loratool.codecs.gguf import original_shape

    found = {}
    for name, stored in tensors.items():
        spec = stored.spec
        if f"{ORIGINAL}{name}" in said and DTYPES[spec.dtype].block is None:
            shape = original_shape(name, spec.shape, said)
            stored = replace(stored, spec=replace(spec, shape=shape))
        found[name] = stored
    return found


def config_of(checkpoint: Checkpoint) -> ModelConfig:
    """Return what a model says of itself: in its file, or in the ``config.json`` beside it.

    Raises:
        FileFormatError: That is no JSON object.
        BaseModelError: The file is one of several, and the others are not there.
    """
    first = checkpoint.shards[0] if checkpoint.shards else None
    if not isinstance(first, GgufFile):
        return read_config(checkpoint.folder)
    _check_parts(checkpoint)
    return ModelConfig(_raw(first, checkpoint.shards), is_inside=True)


def _check_parts(checkpoint: Checkpoint) -> None:
    """Make sure that files which say that they are parts of one are all of it, in their order.

    Raises:
        BaseModelError: They are not.
    """
    count = len(checkpoint.shards)
    for number, shard in enumerate(checkpoint.shards):
        said = [shard.metadata.get(key) for key in PART]
        if said == [None, None] and count == 1:
            continue
        if said != [str(number), str(count)]:
            raise BaseModelError(
                shard.path,
                f"says that it is part {said[0]} (from 0) of {said[1]}, and is read as part "
                f"{number} of {count}",
                hint="keep the names of parts: NAME-00001-of-00003.gguf, and so on",
            )


def _raw(first: GgufFile, shards: Sequence[WeightsFile]) -> Mapping[str, Any]:
    said = {
        key: each.value for key, each in first.values.items() if not isinstance(each.value, Array)
    }
    architecture = said.get(ARCHITECTURE)
    raw: dict[str, Any] = dict(said)
    for name, key in NAMES.items():
        value = said.get(f"{architecture}.{key}")
        if type(value) is int:
            raw[name] = value
    tensors = {name: stored for shard in shards for name, stored in shard.tensors.items()}
    if TABLE in tensors:
        raw[TIE] = HEAD not in tensors
    if any(DTYPES[stored.spec.dtype].block for stored in tensors.values()):
        raw[QUANTIZATION[0]] = {"quant_method": "gguf"}
    return raw
