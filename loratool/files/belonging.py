"""Which files are part of a model or an adapter, so that an output may take their place."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from pathlib import Path, PurePosixPath
from typing import Final

from loratool.errors import OutputExistsError
from loratool.files.containers import is_weights

__all__ = ["check_contents"]

SHOWN: Final = 3
USUAL_NAMES: Final = re.compile(
    r"""(?x)^(
    ([a-z0-9_]+_)?config\.json | .*\.index\.json | (model_index|modules|params|loratool)\.json
    | tokenizer(_\w+)?\.(json|model) | (vocab|added_tokens|special_tokens_map|chat_template)\.json
    | .*\.(jinja|tiktoken|gguf) | (spiece|sentencepiece(\.bpe)?)\.model | .*\.safetensors\.\w+
    | (modeling|configuration|tokenization|processing|image_processing|feature_extraction)_\w+\.py
    | README(\.md)? | LICEN[SC]E(\.\w+)? | NOTICE(\.\w+)? | USE_POLICY\.md | \.gitattributes
    | (vocab|merges|dict|special_tokens|requirements)\.txt
    )$"""
)
"""What lies beside weights: configurations, tokenizers, cards, licences, code of the model."""
CONFIGURATION: Final = re.compile(r"(adapter_)?config\.json")
"""Without weights, too, a folder with one of these is of a model or an adapter."""


def check_contents(folder: Path, inside: Iterable[str], names: Collection[str]) -> None:
    """Refuse to replace a folder with somebody's work in it.

    Args:
        folder: The folder.
        inside: The paths in it of its files.
        names: Those of the files that will be there.

    Raises:
        OutputExistsError: Something in it is no part of a model or an adapter.
    """
    files = [PurePosixPath(name) for name in inside]
    strange = [str(file) for file in files if str(file) not in names and not _is_usual(file)]
    if not strange and files and not any(map(_is_model, files)):
        strange = [str(file) for file in files]
    if strange:
        more = " and more" if len(strange) > SHOWN else ""
        raise OutputExistsError(
            folder,
            f"is not replaced: beside a model or an adapter it holds "
            f"{', '.join(strange[:SHOWN])}{more}",
            hint="choose another name, or move that away",
        )


def _is_usual(path: PurePosixPath) -> bool:
    return is_weights(path) or bool(USUAL_NAMES.search(path.name))


def _is_model(path: PurePosixPath) -> bool:
    return is_weights(path) or bool(CONFIGURATION.fullmatch(path.name))
