"""Completion by the shell: the scripts that ask, and how answers are written for each of them.

click's own scripts cut descriptions at a comma (fish), fail where ``compinit`` was not run (zsh),
and lose what follows a colon, at which bash breaks words (``cuda:0``).
"""

from __future__ import annotations

import os
from typing import Final

from click.shell_completion import (
    BashComplete,
    CompletionItem,
    FishComplete,
    ShellComplete,
    ZshComplete,
    add_completion_class,
)

__all__ = ["INSTALLING", "SHELLS", "script_for"]

BASH: Final = r"""%(complete_func)s() {
    local cur words cword line kind value breaks="${COMP_WORDBREAKS}"
    # Words as they are typed: bash breaks them at '=' and ':'.
    words=() cword=0 cur=""
    local index glued="" position=0 start
    for (( index = 0; index < ${#COMP_WORDS[@]}; index++ )); do
        start="${COMP_LINE:position}"
        local trimmed="${start#"${start%%%%[![:space:]]*}"}"
        if [[ $index -gt 0 && "$trimmed" == "$start" && ${#words[@]} -gt 0 && -n "$start" ]]; then
            words[${#words[@]}-1]+="${COMP_WORDS[index]}"
        else
            words+=("${COMP_WORDS[index]}")
        fi
        position=$(( position + ${#start} - ${#trimmed} + ${#COMP_WORDS[index]} ))
        if [[ $index -eq $COMP_CWORD ]]; then
            cword=$(( ${#words[@]} - 1 )) cur="${words[cword]}"
        fi
    done
    COMPREPLY=()
    while IFS=',' read -r kind value; do
        case $kind in
            dir) compopt -o dirnames 2>/dev/null ;;
            file) compopt -o default 2>/dev/null ;;
            plain) COMPREPLY+=("$value") ;;
        esac
    done < <(IFS=$'\n'; COMP_WORDS="${words[*]}" COMP_CWORD=$cword \
        %(complete_var)s=bash_complete "$1" 2>/dev/null)
    # What is before the last break is on the line already.
    local before="${cur%%"${COMP_WORDS[COMP_CWORD]}"}"
    [[ "${COMP_WORDS[COMP_CWORD]}" == [:=] ]] && before="$cur"
    for (( index = 0; index < ${#COMPREPLY[@]}; index++ )); do
        COMPREPLY[index]="${COMPREPLY[index]#"$before"}"
    done
}
complete -o nosort -F %(complete_func)s %(prog_name)s 2>/dev/null ||
    complete -F %(complete_func)s %(prog_name)s
"""
ZSH: Final = r"""#compdef %(prog_name)s

%(complete_func)s() {
    local -a plain described response
    local kind key help
    (( ! $+commands[%(prog_name)s] )) && return 1
    response=("${(@f)$(COMP_WORDS="${(F)words}" COMP_CWORD=$((CURRENT-1)) \
        %(complete_var)s=zsh_complete ${words[1]} 2>/dev/null)}")
    for kind key help in "${response[@]}"; do
        case $kind in
            plain)
                if [[ $help == _ ]]; then plain+=("$key"); else described+=("$key:$help"); fi ;;
            dir) _path_files -/ ;;
            file) _path_files -f ;;
        esac
    done
    (( $#described )) && _describe -V unsorted described -U
    (( $#plain )) && compadd -U -V unsorted -a plain
}

if [[ $zsh_eval_context[-1] == loadautofunc ]]; then
    %(complete_func)s "$@"
else
    # Where nobody has set up completion yet it is done here.
    (( $+functions[compdef] )) || { autoload -Uz compinit && compinit -u }
    compdef %(complete_func)s %(prog_name)s
fi
"""
FISH: Final = r"""function %(complete_func)s
    set -l answers (COMP_WORDS=(commandline -cp | string collect) COMP_CWORD=(commandline -t) \
        %(complete_var)s=fish_complete %(prog_name)s 2>/dev/null)
    for answer in $answers
        set -l parts (string split --max 1 "," -- $answer)
        switch $parts[1]
            case dir
                __fish_complete_directories (commandline -t)
            case file
                __fish_complete_path (commandline -t)
            case plain
                echo $parts[2]
        end
    end
end
complete --no-files --command %(prog_name)s --arguments "(%(complete_func)s)"
"""
INSTALLING: Final = {
    "bash": (
        "# loratool completion bash > ~/.local/share/bash-completion/completions/loratool\n"
        '# or, without the package bash-completion, in ~/.bashrc: eval "$(loratool completion '
        'bash)"\n'
    ),
    "zsh": '# in ~/.zshrc: eval "$(loratool completion zsh)"\n',
    "fish": "# loratool completion fish > ~/.config/fish/completions/loratool.fish\n",
}
"""What each script says about itself: where it goes."""


class _Words(ShellComplete):
    """Reads the words from lines of their own, so that quotes and spaces need no second parsing."""

    def get_completion_args(self) -> tuple[list[str], str]:
        words = os.environ.get("COMP_WORDS", "").split("\n")
        place = int(os.environ.get("COMP_CWORD", "0"))
        incomplete = words[place] if place < len(words) else ""
        return [_unquoted(word) for word in words[1:place]], _unquoted(incomplete)


class _Bash(_Words, BashComplete):
    source_template = BASH

    @staticmethod
    def _check_version() -> None:
        """Leave it to the script, which does what every bash from 4 on can."""


class _Zsh(_Words, ZshComplete):
    source_template = ZSH


class _Fish(FishComplete):
    source_template = FISH

    def format_completion(self, item: CompletionItem) -> str:
        text = " ".join((item.help or "").split())
        return f"{item.type},{item.value}\t{text}" if text else f"{item.type},{item.value}"


SHELLS: Final = {"bash": _Bash, "zsh": _Zsh, "fish": _Fish}
for _name, _class in SHELLS.items():
    add_completion_class(_class, _name)


def _unquoted(word: str) -> str:
    """Return a word as the shell would pass it on."""
    if not set(word) & set("'\"\\"):
        return word
    from click.shell_completion import split_arg_string

    return " ".join(split_arg_string(word))


def script_for(shell: str, program: str) -> str:
    """Return the script that makes a shell ask ``program``.

    Args:
        shell: One of ``SHELLS``.
        program: What the command is called.
    """
    from loratool.cli.main import cli

    variable = f"_{program.upper().replace('-', '_')}_COMPLETE"
    source = SHELLS[shell](cli, {}, program, variable).source()
    first = "#compdef" if source.startswith("#compdef") else ""
    if first:  # which zsh wants in the first line
        line, _, rest = source.partition("\n")
        return f"{line}\n{INSTALLING[shell]}{rest}"
    return INSTALLING[shell] + source
