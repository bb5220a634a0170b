"""``loratool completion``."""

from __future__ import annotations

import click

from loratool.cli import options
from loratool.cli.help import GroupedCommand

__all__ = ["command"]


@click.command("completion", cls=GroupedCommand)
@click.argument("shell", type=click.Choice(("bash", "zsh", "fish")))
@options.debug
def command(shell: str) -> None:
    """Print the script that completes commands, options and their values in a shell.

    The script says in its first lines where it goes. Completing takes a tenth of a second, and
    file names are completed by the shell itself.

    \b
    Example:
        loratool completion bash > ~/.local/share/bash-completion/completions/loratool
        loratool completion fish > ~/.config/fish/completions/loratool.fish
    """
    from loratool.cli.completion import script_for

    click.echo(script_for(shell, "loratool"), nl=False)
