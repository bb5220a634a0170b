"""``config.json``: what a model says of itself. Nothing outside this room reads it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from loratool.files.checkpoint import MODEL_CONFIG as CONFIG_NAME
from loratool.files.json import read_json_object
from loratool.names.tied import (
    ALWAYS_TIED,
    COMPOSED,
    FLAG_KEPT,
    GENERATIVE,
    GENERATIVE_TASKS,
    HEADS,
    OTHER_TASKS,
    OTHER_TIES,
    READ_DIRECTLY,
)

__all__ = [
    "ARCHITECTURE",
    "CONFIG_NAME",
    "DTYPE_KEYS",
    "QUANTIZATION",
    "QUANTIZATION_FILES",
    "TIE",
    "ModelConfig",
    "architectures",
    "is_model_folder",
    "read_config",
]

TIE: Final = "tie_word_embeddings"
TEXT_PARTS: Final = ("text_config", "llm_config")
"""Where models of several modalities describe their language model."""
QUANTIZATION: Final = ("quantization_config", "compression_config", "quantization")
QUANTIZATION_FILES: Final = {
    "hf_quant_config.json": "modelopt",
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
    "quanto_qmap.json": "quanto",
}
"""Where a model says how its weights are quantised: keys, and files of some tools beside it."""
ARCHITECTURE: Final = "general.architecture"
"""Where the key values of a GGUF file say what kind of model is in it."""
DTYPE_KEYS: Final = ("dtype", "torch_dtype")
DTYPES: Final = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"}


@dataclass(frozen=True)
class ModelConfig:
    """The configuration of a model; empty where it has none.

    Attributes:
        raw: The parsed file.
        beside: What a file beside it says of quantisation.
        is_inside: Whether it stands in the file of the weights, and is written with them.
    """

    raw: Mapping[str, Any] = field(default_factory=dict)
    beside: Mapping[str, Any] = field(default_factory=dict)
    is_inside: bool = False

    def __bool__(self) -> bool:
        return bool(self.raw)

    def _parts(self) -> Iterator[Mapping[str, Any]]:
        """Yield the configuration, then those of its language model."""
        yield self.raw
        yield from (v for k in TEXT_PARTS if isinstance(v := self.raw.get(k), dict))

    @cached_property
    def text(self) -> Mapping[str, Any]:
        """The part that describes the language model: the whole, where there is no other."""
        *_, last = self._parts()
        return last

    @cached_property
    def language(self) -> Mapping[str, Any]:
        """What it says of the language model; what only the whole says counts for it too."""
        return {**self.raw, **{k: v for k, v in self.text.items() if v is not None}}

    @cached_property
    def model_types(self) -> frozenset[str]:
        """Model types of the model and of its parts."""
        parts = [self.raw, *(v for v in self.raw.values() if isinstance(v, dict))]
        return frozenset(str(part["model_type"]) for part in parts if "model_type" in part)

    @property
    def model_type(self) -> str | None:
        """What the model as a whole calls its kind."""
        kind = self.raw.get("model_type")
        return kind if isinstance(kind, str) else None

    @property
    def called(self) -> str | None:
        """What it calls the kind of model, in the words of transformers or of llama.cpp."""
        kind = self.raw.get(ARCHITECTURE)
        return self.model_type or (kind if isinstance(kind, str) else None)

    @cached_property
    def architectures(self) -> tuple[str, ...]:
        """The classes that it names."""
        return architectures(self.raw)

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether it is an encoder with a decoder."""
        return bool(self.raw.get("is_encoder_decoder"))

    @property
    def decoder(self) -> ModelConfig | None:
        """That of the language model inside a model of an encoder and a decoder of any class."""
        part = self.raw.get("decoder")
        if self.model_type not in COMPOSED or not isinstance(part, dict):
            return None
        return ModelConfig({**part, "architectures": [GENERATIVE[0]]})

    @property
    def is_tied(self) -> bool | None:
        """What it says about tied embeddings, of the model or its text part, if anything."""
        flags = (part.get(TIE) for part in self._parts())
        return next((flag for flag in flags if isinstance(flag, bool)), None)

    @property
    def is_untied(self) -> bool:
        """Whether it says that nothing is tied, and its loader listens."""
        return self.is_tied is False and self.model_type not in ALWAYS_TIED

    @property
    def can_untie(self) -> bool:
        """Whether saying that nothing is tied changes nothing else."""
        return self.model_type not in FLAG_KEPT

    @property
    def shares_tables(self) -> bool:
        """Whether encoder and decoder have one vocabulary, where there are both."""
        return self.raw.get("share_encoder_decoder_embeddings") is not False

    @property
    def dtype(self) -> str | None:
        """The dtype (``BF16``) of its weights, where it says so."""
        for part in self._parts():
            for key in DTYPE_KEYS:
                name = str(part.get(key)).removeprefix("torch.")
                if name in DTYPES:
                    return DTYPES[name]
        return None

    @property
    def quantization(self) -> Mapping[str, Any] | None:
        """What it says about how its weights are quantised, if anything."""
        for part in self._parts():
            for key in QUANTIZATION:
                if isinstance(part.get(key), dict):
                    return {**self.beside, **part[key]}
        return dict(self.beside) or None

    @property
    def projection_rows(self) -> tuple[int, int, int] | None:
        """The rows of queries, keys and values, or ``None`` where the heads are not said."""
        heads = self.text.get("num_attention_heads")
        groups = self.text.get("num_key_value_heads") or heads
        hidden = self.text.get("hidden_size")
        if not isinstance(heads, int) or not isinstance(groups, int) or heads <= 0:
            return None
        size = self.text.get("head_dim") or (hidden // heads if isinstance(hidden, int) else None)
        return (heads * size, groups * size, groups * size) if isinstance(size, int) else None

    def head(self, tasks: Collection[str] = ()) -> str | None:
        """Return the module name of the head that may share the embedding, or ``None``.

        Args:
            tasks: The adapters' task types; a classifier has no such head, whatever the base was.
        """
        if not self.raw or any(task in OTHER_TASKS for task in tasks):
            return None
        classes = self.architectures
        generative = (
            any(name.endswith(GENERATIVE) for name in classes)
            or any(task in GENERATIVE_TASKS for task in tasks)
            or not classes
        )
        kind = self.model_type or ""
        if not generative or self._has_new_head or kind in OTHER_TIES:
            return None
        return HEADS.get(kind, "lm_head")

    @property
    def _has_new_head(self) -> bool:
        """Whether it is a DeBERTa whose head is not the old one, with a weight of its own."""
        return self.model_type in ("deberta", "deberta-v2") and self.raw.get("legacy") is False

    def reads_directly(self, module: str) -> bool:
        """Whether the head over the vocabulary reads the weight of ``module`` without calling it.

        What an adapter adds to the output of such a module the head does not see.
        """
        kind = self.model_type or ""
        is_head = any(name.endswith(GENERATIVE) for name in self.architectures)
        is_meant = self._has_new_head or not kind.startswith("deberta")
        read = READ_DIRECTLY.get(kind, ())
        return is_head and is_meant and f".{module}".endswith(tuple(f".{name}" for name in read))


def architectures(raw: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the classes that a parsed configuration names."""
    names = raw.get("architectures")
    return tuple(n for n in names if isinstance(n, str)) if isinstance(names, list) else ()


def read_config(folder: Path) -> ModelConfig:
    """Return the configuration in ``folder``; an empty one where there is none.

    Raises:
        FileFormatError: It is no JSON object.
    """
    path = folder / CONFIG_NAME
    raw = read_json_object(path) if path.is_file() else {}
    return ModelConfig(raw, _read_beside(folder))


def _read_beside(folder: Path) -> dict[str, Any]:
    """Return what files of tools say of quantisation, as a configuration would say it."""
    found: dict[str, Any] = {}
    for name, method in QUANTIZATION_FILES.items():
        path = folder / name
        if path.is_file():
            said = read_json_object(path)
            inner = said.get("quantization")
            found |= {"quant_method": method, **said, **(inner if isinstance(inner, dict) else {})}
    return found


def is_model_folder(folder: Path) -> bool:
    """Whether a folder describes a model."""
    return (folder / CONFIG_NAME).exists()
