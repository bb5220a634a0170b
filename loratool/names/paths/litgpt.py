"""litgpt's names of the modules of language models; queries, keys and values are in one."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from loratool.adapter.leaving import option, pattern_for
from loratool.adapter.model import Site
from loratool.adapter.scheme import Context, Names
from loratool.errors import UnsupportedError
from loratool.names.gguf import plain_path
from loratool.names.litgpt import LLAMA, Kind
from loratool.names.paths.component import EachAlone

__all__ = ["LitgptPaths"]

OF_OTHERS: Final = re.compile(r"transformer\.h\.[0-9]{1,9}\.mlp\.(fc$|experts\.|gate$)")
"""What models of other kinds than Llama's have."""


@dataclass(frozen=True)
class LitgptPaths(EachAlone):
    """``transformer.h.0.attn.qkv``.

    Attributes:
        kind: The kind of model; ``None`` where nothing tells.
        unknown: What the configuration calls the model, where litgpt has none of its kind.
    """

    is_dotted: bool = True
    keeps_unknown: bool = True
    kind: Kind | None = None
    unknown: str = ""

    def name(self, module: str, component: str | None, local: str, context: Context) -> str:
        """Return what litgpt calls a module.

        Raises:
            UnsupportedError: It has none of that kind.
        """
        own = (self.kind or LLAMA).litgpt(plain_path(module)) if not self.unknown else ""
        if not own and context.accepts(module):
            return module
        if not own:
            kind = "Llama's kind" if self.kind in (None, LLAMA) else "its kind"
            what = f" ({self.unknown})" if self.unknown else ""
            raise UnsupportedError(
                module,
                f"is no module that litgpt has in models of {kind}{what}",
                hint=f"leave it out with {option('--drop', pattern_for([module], [module]))}, or "
                "merge the adapter into its base instead",
            )
        return own

    def unspell(
        self, sites: Sequence[Site], metadata: Mapping[str, str], base: Collection[str]
    ) -> Names:
        """Return the modules of transformers; those of the base, if it is given."""
        own = {plain_path(path): path for path in base}
        is_other = self.kind is None and any(OF_OTHERS.match(site.module) for site in sites)
        found: dict[str, tuple[str, ...]] = {}
        for site in sites:
            path = "" if self.unknown or is_other else (self.kind or LLAMA).hub(site.module)
            found[site.module] = (own.get(path, path),) if path else ()
        return Names(found)

    def refusal(self, count: int) -> str | None:
        """Return what is missing, or why it is not read."""
        if self.unknown:
            return f"{count} modules are of a model that litgpt does not have: {self.unknown}"
        return (
            f"{count} modules are not known: they fuse queries, keys and values, and which of them "
            "are adapted, or how many rows each has, nothing tells (hyperparameters.yaml and "
            "model_config.yaml beside the file, or --base and --enable-lora such as 1,0,1), or "
            "the model is of another kind than Llama's, which model_config.yaml or --base tells"
        )
