"""What other tools call the commands and options, and which one is meant."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Final

import click

from loratool.errors import printable

__all__ = ["COMMAND_SYNONYMS", "OPTION_SYNONYMS", "SCHEME_SYNONYMS", "no_such_command"]

COMMAND_SYNONYMS: Final = {
    "add": "compose",
    "apply": "merge",
    "average": "compose",
    "bake": "merge",
    "blend": "compose",
    "cat": "compose",
    "check": "validate",
    "combine": "compose",
    "compress": "truncate",
    "describe": "inspect",
    "diff": "compare",
    "difference": "extract",
    "distance": "compare",
    "export": "convert",
    "fold": "merge",
    "formats": "schemes",
    "fuse": "merge",
    "info": "inspect",
    "lint": "validate",
    "list": "inspect",
    "ls": "inspect",
    "make": "extract",
    "merge-and-unload": "merge",
    "merge_and_unload": "merge",
    "mix": "compose",
    "prune": "truncate",
    "rank": "truncate",
    "rename": "convert",
    "resize": "truncate",
    "scale": "rescale",
    "show": "inspect",
    "shrink": "truncate",
    "similarity": "compare",
    "subtract": "extract",
    "sum": "compose",
    "svd": "truncate",
    "tags": "metadata",
    "test": "verify",
    "transform": "convert",
    "translate": "convert",
    "weight": "rescale",
}
"""Names of commands, in other tools or in everyday language, and what does that here."""
OPTION_SYNONYMS: Final = {
    "--cuda": ("--device",),
    "--dim": ("--rank",),
    "--factor": ("--weight", "--scale"),
    "--file": ("--output",),
    "--format": ("--to", "--json"),
    "--gpu": ("--device",),
    "--ignore": ("--skip", "--exclude"),
    "--jobs": ("--threads",),
    "--lora": ("--adapter",),
    "--lora-scale": ("--weight", "--scale"),
    "--max-rank": ("--rank",),
    "--model": ("--base",),
    "--models": ("--adapter",),
    "--multiplier": ("--weight", "--scale"),
    "--network-dim": ("--rank",),
    "--network-alpha": ("--alpha",),
    "--new-rank": ("--rank",),
    "--num-threads": ("--threads",),
    "--out": ("--output",),
    "--out-dir": ("--output",),
    "--output-dir": ("--output",),
    "--overwrite": ("--force",),
    "--precision": ("--dtype",),
    "--ratio": ("--weight", "--scale"),
    "--ratios": ("--weight",),
    "--save-precision": ("--dtype",),
    "--save-to": ("--output",),
    "--scale": ("--weight",),
    "--scheme": ("--to", "--from"),
    "--silent": ("--quiet",),
    "--strength": ("--weight", "--scale"),
    "--target": ("--for", "--to"),
    "--verbose": ("--debug",),
    "--workers": ("--threads",),
    "--yes": ("--force",),
}
"""Names of options likewise; of several the first that the command has."""


SCHEME_SYNONYMS: Final = {
    "a1111": "kohya",
    "automatic1111": "kohya",
    "civitai": "kohya",
    "comfyui": "comfy",
    "forge": "kohya",
    "hf": "peft",
    "huggingface": "peft",
    "invokeai": "kohya",
    "llama.cpp": "gguf",
    "llamacpp": "gguf",
    "lycoris": "kohya",
    "nemo": "megatron",
    "npz": "mlx",
    "ollama": "gguf",
    "sd-scripts": "kohya",
    "tensorrt-llm": "trtllm",
    "transformers": "peft",
    "unsloth": "peft",
    "webui": "kohya",
}
"""Tools that people name a scheme after, and the scheme."""


class HintedError(click.UsageError):
    """Wrong usage, with a next step that is better than the command's help."""

    def __init__(self, message: str, ctx: click.Context, hint: str) -> None:
        super().__init__(message, ctx)
        self.hint = hint


def no_such_command(
    words: Sequence[str], commands: Collection[str], ctx: click.Context
) -> click.UsageError:
    """Return the error for a word that is no command, with the command that is meant.

    Args:
        words: The word, and those behind it.
        commands: The commands that there are.
        ctx: Where it was given.
    """
    from difflib import get_close_matches

    given, *rest = words
    meant = COMMAND_SYNONYMS.get(given.lower())
    what = f"no such command '{printable(given)}'"
    if given == "help":
        named = next((word for word in rest if word in commands), None)
        hint = f"loratool {named} --help" if named else "loratool --help"
        return HintedError("help is an option", ctx, hint)
    if meant in commands:
        return HintedError(f"{what}; it is called '{meant}' here", ctx, f"loratool {meant} --help")
    near = get_close_matches(given.lower(), commands, n=1)
    if near:
        return HintedError(f"{what}; did you mean '{near[0]}'?", ctx, f"loratool {near[0]} --help")
    return click.UsageError(what, ctx)
