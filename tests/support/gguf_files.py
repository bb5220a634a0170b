"""Models as GGUF files, written by the ``gguf`` package from what transformers has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

__all__ = ["LLAMA", "QWEN2", "paired", "read_gguf", "write_gguf"]

BLOCK = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
ENDS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
Change = Callable[[str, np.ndarray, Mapping[str, Any]], np.ndarray]


def paired(values: np.ndarray, heads: int) -> np.ndarray:
    """Return rows of each head with its halves as neighbours, one row at a time."""
    size = len(values) // heads
    order = [
        h * size + part * (size // 2) + i
        for h in range(heads)
        for i in range(size // 2)
        for part in (0, 1)
    ]
    return values[order]


def same(name: str, values: np.ndarray, config: Mapping[str, Any]) -> np.ndarray:
    return values


def llama(name: str, values: np.ndarray, config: Mapping[str, Any]) -> np.ndarray:
    if ".q_proj." in name:
        return paired(values, config["num_attention_heads"])
    if ".k_proj." in name:
        return paired(values, config["num_key_value_heads"])
    return values


def names(layers: int) -> dict[str, str]:
    found = dict(ENDS)
    for layer in range(layers):
        found |= {
            f"model.layers.{layer}.{ours}": f"blk.{layer}.{theirs}"
            for ours, theirs in BLOCK.items()
        }
    return found


LLAMA = ("llama", llama)
QWEN2 = ("qwen2", same)


def write_gguf(
    path: Path,
    tensors: Mapping[str, np.ndarray],
    config: Mapping[str, Any],
    architecture: tuple[str, Change],
    types: Mapping[str, str] | str = "F32",
    *,
    tokens: int = 0,
) -> Path:
    """Write a model; matrices in ``types``, all in one or by the ends of their names."""
    name, change = architecture
    writer = gguf.GGUFWriter(path, name)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(0)
    tokens = tokens or config["vocab_size"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{number}" for number in range(tokens)])
    writer.add_token_types([1] * tokens)
    table = names(config["num_hidden_layers"])
    for key, values in tensors.items():
        module, _, leaf = key.rpartition(".")
        stored = f"{table[module]}.{leaf}"
        values = np.ascontiguousarray(change(key, values, config), np.float32)
        kind = "F32" if values.ndim == 1 else types
        if not isinstance(kind, str):
            kind = next((kind[end] for end in kind if module.endswith(end)), kind[""])
        qtype = gguf.GGMLQuantizationType[kind]
        if kind in ("F32", "F16"):
            writer.add_tensor(stored, values.astype(np.float32 if kind == "F32" else np.float16))
        else:
            writer.add_tensor(stored, gguf.quantize(values, qtype), raw_dtype=qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def read_gguf(path: Path) -> dict[str, tuple[str, np.ndarray, bytes]]:
    """Return type, numbers and bytes of every tensor by name, as the package reads them."""
    found = {}
    for one in gguf.GGUFReader(path).tensors:
        values = gguf.dequantize(one.data, one.tensor_type)
        shape = tuple(int(side) for side in reversed(one.shape))
        found[one.name] = (one.tensor_type.name, values.reshape(shape), one.data.tobytes())
    return found
