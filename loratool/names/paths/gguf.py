"""The tensors of llama.cpp, one after the architecture of the model that they are of."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from loratool.adapter.leaving import option, pattern_for
from loratool.adapter.model import Site
from loratool.adapter.scheme import Context, Names
from loratool.errors import UnsupportedError
from loratool.names.gguf import Architecture, Attention, Held, plain_path
from loratool.names.paths.component import EachAlone

__all__ = ["BASE_HINT", "STACKED", "GgufPaths", "is_tensor", "tensor_of"]

TENSOR: Final = re.compile(r"blk\.\d+\.\w+|token_embd|output|output_norm|position_embd")
STACKED: Final = re.compile(
    r"(?P<tensor>blk\.\d+\.ffn_(?P<leaf>gate|up|down)_exps)\.(?P<expert>[0-9]{1,9})"
)
"""One expert of a stack, as it is called before its path is known."""
PARAMETER: Final = re.compile(r"(?P<stack>.+\.experts)\.(gate_up|down)_proj")
BASE_HINT: Final = "give --base BASE: the folder with its config.json, or its .gguf file"
SHIFTED: Final = frozenset(
    ("gemma", "gemma2", "gemma3", "nemotron", "qwen3next", "qwen35", "qwen35moe")
)
"""Where norms are stored with 1 added."""


def is_tensor(module: str) -> bool:
    """Whether a module goes by the name that llama.cpp has for it."""
    return TENSOR.fullmatch(module) is not None or STACKED.fullmatch(module) is not None


def _without(module: str) -> str:
    """Return what can be done about a module that has no place."""
    left_out = option("--drop", pattern_for([module], [module]))
    return f"leave it out with {left_out}, or merge the adapter into its base instead"


def tensor_of(module: str) -> str:
    """Return the tensor that something called so lies in."""
    match = STACKED.fullmatch(module)
    return match["tensor"] if match else module


@dataclass(frozen=True)
class GgufPaths(EachAlone):
    """Names of tensors; a module that cannot be told from them goes by its tensor's name.

    Attributes:
        architecture: The names; ``None`` where nothing tells them.
        attention: The attention heads, where something tells them.
        is_tied: Whether the base has no head of its own.
    """

    is_dotted: bool = True
    keeps_unknown: bool = True
    architecture: Architecture | None = None
    attention: Attention | None = None
    is_tied: bool = False

    def name(self, module: str, component: str | None, local: str, context: Context) -> str:
        """Return the tensor that a module is in.

        Raises:
            UnsupportedError: llama.cpp has no such tensor, or nothing tells which it is.
        """
        if is_tensor(module):
            return module
        if self.architecture is None:
            raise UnsupportedError(
                module,
                "is called otherwise by each architecture of llama.cpp, and nothing tells which "
                "this is, or it is none that is known",
                hint=BASE_HINT,
            )
        held = self.architecture.held(module)
        if not held:
            raise UnsupportedError(
                module,
                f"is no module of llama.cpp's architecture {self.architecture.name!r}",
                hint=_without(module),
            )
        if held[0].tensor == "position_embd":
            raise UnsupportedError(
                module,
                "is a table of positions, to which llama.cpp applies no adapter",
                hint=_without(module),
            )
        if held[0].tensor == "output" and self.is_tied:
            raise UnsupportedError(
                module,
                "has no tensor of its own in llama.cpp, for the base ties it to its embedding",
                hint=_without(module),
            )
        expert = held[0].expert
        return held[0].tensor if expert is None else f"{held[0].tensor}.{expert}"

    def unspell(
        self, sites: Sequence[Site], metadata: Mapping[str, str], base: Collection[str]
    ) -> Names:
        """Return the modules of transformers that tensors are; those of the base, if it is given.

        What has rows of others in it, or in an order that nothing tells, is not known.
        """
        own = {plain_path(path): path for path in base}
        return Names({site.module: tuple(self._paths(site.module, own)) for site in sites})

    def _paths(self, module: str, own: Mapping[str, str]) -> Iterator[str]:
        found = [
            path for held in self.modules(module) if (path := self._path(held, module)) is not None
        ]
        for path in found:
            if path in own:
                yield own[path]
                return
        yield from found[:1]

    def modules(self, module: str) -> tuple[Held, ...]:
        """Return the modules that the tensor of something may have a part of."""
        return self.architecture.modules(tensor_of(module)) if self.architecture else ()

    def _path(self, held: Held, module: str) -> str | None:
        """Return the path of what a file calls ``module``, if it is ``held`` and nothing else."""
        expert = STACKED.fullmatch(module)
        if expert is not None:
            if "#" in held.module:
                return held.of_expert(int(expert["expert"])).module
            stack = PARAMETER.fullmatch(held.module)
            leaf = f"{expert['leaf']}_proj"
            return f"{stack['stack']}.{expert['expert']}.{leaf}" if stack else None
        if "#" in held.module:
            return None
        if held.needs_heads and self.attention is None:
            return None
        try:
            rows = held.rows(self.attention)
        except UnsupportedError:
            return None
        is_one = len(rows.runs) == 1 and rows.runs[0].taken == rows.runs[0].view
        return held.module if is_one else None

    def refusal(self, count: int) -> str | None:
        """Return what is missing."""
        if self.architecture is None:
            return f"{count} tensors are not known: nothing tells their architecture ({BASE_HINT})"
        if self.attention is None and self.architecture.permutes:
            return (
                f"the rows of {count} tensors are in an order that the attention heads of their "
                f"base decide ({BASE_HINT})"
            )
        return (
            f"{count} tensors are parts of fused projections, or have rows of others between "
            "theirs; merge the adapter into the .gguf file of its base instead"
        )

    def parameter(self, name: str) -> str:
        """Return what transformers calls a norm that lies beside the deltas."""
        if self.architecture is None or self.architecture.name in SHIFTED:
            return name
        tensor, _, leaf = name.rpartition(".")
        held = self.architecture.modules(tensor)
        return f"{held[0].module}.{leaf}" if held and held[0].is_same else name
