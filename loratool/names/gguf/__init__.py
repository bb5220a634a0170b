"""What llama.cpp calls the modules of language models, and how it has their rows.

A tensor of a GGUF file is a module of transformers, one expert's of a stack, or a part of a
fused projection. :class:`Architecture` answers both ways; which rows of a module a tensor has,
and in which order, :class:`~loratool.names.gguf.rows.Rows` tells once the attention heads are
known.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, Final

from loratool.errors import UnsupportedError
from loratool.names.gguf.rows import FORMS, HEADLESS, Heads, Rows, Run
from loratool.names.gguf.tables import (
    ARCHITECTURES,
    CLASSES,
    MODEL_TYPES,
    REFUSED,
    TURNED_EXPERTS,
    WEIGHTS_ONLY,
    Line,
)

__all__ = [
    "EXPERT_COUNTS",
    "Architecture",
    "Attention",
    "Heads",
    "Held",
    "Rows",
    "Run",
    "architecture_named",
    "architecture_of",
    "attention_in_config",
    "attention_in_values",
    "layer_of",
    "plain_path",
]

PREFIXES: Final = re.compile(
    r"^(?:model\.language_model\.|language_model\.model\.|model\.text_model\.|text_model\.model\."
    r"|(?:transformer|diffusion_model)\.model\.(?=layers\.|embed_tokens$|norm$))"
)
"""Where the language model hangs in one of several modalities, or behind a pipeline's component."""
HEAD: Final = re.compile(r"^(?:language_model|text_model)\.(?=lm_head$)")
BARE: Final = re.compile(
    r"^(?:layers\.|embed_tokens$|norm$|h\.|wte$|ln_f$|language_model\.layers\.)"
)
"""How paths begin in a model without its head."""
SHARED: Final = "_shexp"
"""How tensors of experts that are always used end."""
EXPERT_COUNTS: Final = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
LAYER: Final = re.compile(r"(?:^blk|\.(?:layers|h|blocks))\.([0-9]{1,9})\.")


@dataclass(frozen=True, slots=True)
class Held:
    """A tensor of a GGUF file and what it has of a module of transformers.

    Attributes:
        module: The module; of a stack of experts that transformers has apart, each of them has
            its own, with ``#`` for its number.
        tensor: The tensor, without ``.weight``.
        form: What becomes of the rows, as the tables call it.
        expert: Which of the stacked experts it is, where that is known.
        is_turned: Whether transformers stores the module as ``(experts, in, out)``.
    """

    module: str
    tensor: str
    form: str = ""
    expert: int | None = None
    is_turned: bool = False

    @property
    def is_stack(self) -> bool:
        """Whether the tensor stacks experts that transformers has apart."""
        return "#" in self.module or self.expert is not None

    @property
    def needs_heads(self) -> bool:
        """Whether only the attention heads tell its rows."""
        return self.form not in HEADLESS

    @property
    def is_same(self) -> bool:
        """Whether it has the module's rows in their order."""
        return not self.form

    def rows(self, attention: Attention | None) -> Rows:
        """Return which rows of the module it has.

        Raises:
            UnsupportedError: Nothing tells the attention heads, and they decide that.
        """
        if not self.needs_heads:
            return FORMS[self.form](Heads(1, 1))
        layer = layer_of(self.tensor)
        heads = attention.at(layer) if attention is not None else None
        if heads is None and attention is not None:
            raise UnsupportedError(
                self.tensor,
                f"has the rows of {self.module} in another order, and the attention heads that "
                f"its base tells for it ({attention.words(layer)}) are none",
                hint="is the base, or its config.json, damaged?",
            )
        if heads is None:
            raise UnsupportedError(
                self.tensor,
                f"has the rows of {self.module} in another order, which the attention heads "
                "of its base decide",
                hint="the base has to tell them: with --base BASE, its config.json beside it, "
                "or key values in its .gguf file",
            )
        return FORMS[self.form](heads)

    def of_expert(self, expert: int) -> Held:
        """Return what it has of one of the stacked experts."""
        module = self.module.replace("#", str(expert))
        return Held(module, self.tensor, self.form, expert, self.is_turned)


@dataclass(frozen=True, slots=True)
class Attention:
    """The attention heads of a model.

    Attributes:
        query: Of queries: of all layers, or of each.
        key: Of keys and values.
    """

    query: tuple[int, ...]
    key: tuple[int, ...]

    def words(self, layer: int | None) -> str:
        """Return what is told of a layer."""
        counts = [each[layer or 0 :][:1] or each[:1] for each in (self.query, self.key)]
        query, key = (each[0] if each else 0 for each in counts)
        return f"{query} of queries and {key} of keys"

    def at(self, layer: int | None) -> Heads | None:
        """Return those of a layer; ``None`` where it has no attention, or is not known."""
        heads = []
        for counts in (self.query, self.key):
            place = 0 if len(counts) == 1 else layer
            if place is None or place >= len(counts) or counts[place] <= 0:
                return None
            heads.append(counts[place])
        return Heads(*heads) if heads[0] % heads[1] == 0 else None


@dataclass(frozen=True)
class Architecture:
    """The names of one architecture of llama.cpp.

    Attributes:
        name: What ``general.architecture`` calls it.
        has_experts: Whether the model is a mixture of experts, where that decides what some of
            its modules are called.
    """

    name: str
    has_experts: bool = True

    @property
    def lines(self) -> tuple[Line, ...]:
        """Its modules, tensors, and what becomes of their rows."""
        return ARCHITECTURES[self.name]

    @property
    def permutes(self) -> bool:
        """Whether the attention heads decide how it has some of its rows."""
        return any(form not in HEADLESS for _, _, form in self.lines)

    @property
    def pairs_biases(self) -> bool:
        """Whether biases lie as the rows of their weights do."""
        return self.name not in WEIGHTS_ONLY

    @cached_property
    def _by_module(self) -> Mapping[str, tuple[Line, ...]]:
        return _grouped(self.lines, 0)

    @cached_property
    def _by_tensor(self) -> Mapping[str, tuple[Line, ...]]:
        return _grouped(self.lines, 1)

    def held(self, module: str) -> tuple[Held, ...]:
        """Return the tensors that have ``module``; none where it has no such module.

        Args:
            module: Its path in transformers, of this or of a larger model that it is inside of.

        Raises:
            UnsupportedError: A file has it, but not as the rows of a pair.
        """
        module = plain_path(module)
        for pattern, why in REFUSED.get(self.name, ()):
            if re.search(pattern, module):
                raise UnsupportedError(
                    module, f"{why} ({self.name})", hint="merge the adapter into its base instead"
                )
        template, layer, expert = _templated(module)
        lines = self._by_module.get(template, ())
        if any(tensor.endswith(SHARED) for _, tensor, _ in lines):
            own = [line for line in lines if line[1].endswith(SHARED) == self.has_experts]
            lines = tuple(own) or lines
        return tuple(
            self._held(module, tensor.replace("*", layer), form, expert)
            for _, tensor, form in lines
        )

    def modules(self, tensor: str) -> tuple[Held, ...]:
        """Return the modules that a tensor may have something of; the likeliest first.

        Args:
            tensor: Its name, without ``.weight``.
        """
        template, layer, _ = _templated(tensor)
        return tuple(
            self._held(module.replace("*", layer), tensor, form, None)
            for module, _, form in self._by_tensor.get(template, ())
        )

    def _held(self, module: str, tensor: str, form: str, expert: str | None) -> Held:
        is_turned = self.name in TURNED_EXPERTS and bool(re.search(r"experts\.\w+_proj$", module))
        return Held(module, tensor, form, int(expert) if expert else None, is_turned)


def _grouped(lines: Sequence[Line], key: int) -> Mapping[str, tuple[Line, ...]]:
    found: dict[str, list[Line]] = {}
    for line in lines:
        found.setdefault(line[key], []).append(line)
    return {name: tuple(each) for name, each in found.items()}


def _templated(path: str) -> tuple[str, str, str | None]:
    """Return a path with ``*`` for its layer and ``#`` for its expert, and both."""
    layer = LAYER.search(path)
    if layer is None:
        return path, "", None
    before, after = path[: layer.start(1)], path[layer.end(1) :]
    expert = re.search(r"\.experts\.([0-9]{1,9})\.", after)
    if expert is None:
        return f"{before}*{after}", layer[1], None
    after = f"{after[: expert.start(1)]}#{after[expert.end(1) :]}"
    return f"{before}*{after}", layer[1], expert[1]


def layer_of(path: str) -> int | None:
    """Return the number of the layer that a tensor or module is in; ``None`` for none."""
    found = LAYER.search(path)
    return int(found[1]) if found else None


def plain_path(module: str) -> str:
    """Return the path of a module of a model of several modalities as in its language model."""
    plain = HEAD.sub("", PREFIXES.sub("model.", module))
    if BARE.match(plain):
        prefix = "transformer." if plain.startswith(("h.", "wte", "ln_f")) else "model."
        plain = prefix + plain.removeprefix("language_model.")
    return plain


@cache
def architecture_named(name: str, *, has_experts: bool = True) -> Architecture | None:
    """Return the architecture that ``general.architecture`` calls ``name``, if it is known."""
    return Architecture(name, has_experts) if name in ARCHITECTURES else None


def architecture_of(config: Mapping[str, Any]) -> Architecture | None:
    """Return the architecture of the language model that a configuration describes, if known."""
    names = config.get("architectures")
    for name in names if isinstance(names, list) else ():
        if name in CLASSES:
            return _told(CLASSES[name], config)
    kind = config.get("model_type")
    return _told(MODEL_TYPES[kind], config) if kind in MODEL_TYPES else None


def _told(name: str, config: Mapping[str, Any]) -> Architecture | None:
    has_experts = any(config.get(key) for key in EXPERT_COUNTS)
    return architecture_named(_attention_only(name, config), has_experts=has_experts)


def _attention_only(name: str, config: Mapping[str, Any]) -> str:
    """Return what a hybrid is written as that has no other layers than those of attention."""
    layers = config.get("layer_types") or config.get("layers_block_type")
    if name != "granitehybrid" or not layers or any(kind != "attention" for kind in layers):
        return name
    return "granitemoe" if config.get("num_experts_per_tok") else "granite"


QUERIES: Final = ("num_attention_heads", "n_heads", "n_head")
KEYS: Final = ("num_key_value_heads", "n_kv_heads", "num_kv_heads", "n_head_kv")


def attention_in_config(config: Mapping[str, Any]) -> Attention | None:
    """Return the attention heads that the configuration of a language model tells, if it does."""
    query = next((config[key] for key in QUERIES if _is_count(config.get(key))), None)
    if query is None:
        return None
    key = next((config[key] for key in KEYS if _is_count(config.get(key))), None)
    if key is None:
        key = 1 if config.get("multi_query") and config.get("model_type") == "falcon" else query
    blocks = config.get("block_configs")
    if isinstance(blocks, list):
        return Attention((query,), tuple(query // (_group(block) or query) for block in blocks))
    return Attention((query,), (key,))


def _group(block: Any) -> int:
    """Return how many heads share keys in a layer of a DeciLM, or nothing."""
    attention = block.get("attention") if isinstance(block, dict) else None
    size = attention.get("n_heads_in_group") if isinstance(attention, dict) else None
    return int(size or 0) if _is_count(size) else 0


def attention_in_values(architecture: str, values: Mapping[str, Any]) -> Attention | None:
    """Return the attention heads that the key values of a GGUF file tell, if they do.

    Args:
        architecture: What ``general.architecture`` says.
        values: The key values; those that are texts are JSON.
    """
    query = _counts(values.get(f"{architecture}.attention.head_count"))
    key = _counts(values.get(f"{architecture}.attention.head_count_kv")) or query
    return Attention(query, key) if query else None


def _counts(value: Any) -> tuple[int, ...]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return ()
    counts = tuple(value) if isinstance(value, list | tuple) else (value,)
    is_good = all(isinstance(one, int) and not isinstance(one, bool) for one in counts)
    return counts if is_good else ()


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
