"""`scldm completion`: a script that completes verbs, presets and keys in a shell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from launch.config import compose, preset_names
from launch.keys import ANY, keys_of
from launch.verbs import PRESETS, VERBS
from scldm.arguments import one_of

PURPOSE = """Print a script that completes verbs, presets and keys in bash or zsh, with those of this version. Write it
into a file once, and let ~/.bashrc or ~/.zshrc `source` that."""
USAGE = "scldm completion bash|zsh"
EXAMPLE = """
scldm completion bash
scldm completion zsh
"""
Shell = Literal["bash", "zsh"]
# bash breaks words at =. No blank goes after `key=`
SCRIPT = """{head}_scldm() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" line="${{COMP_WORDS[*]:1:$((COMP_CWORD - 1))}}" words
    case "$line " in
{cases}
        *) words="{verbs}" ;;
    esac
    COMPREPLY=($(compgen -W "$words" -- "$word"))
    if [[ ${{#COMPREPLY[@]}} == 0 ]]; then COMPREPLY=($(compgen -f -- "$word")); fi
    if [[ ${{#COMPREPLY[@]}} == 1 && -d ${{COMPREPLY[0]}} ]]; then COMPREPLY=("${{COMPREPLY[0]}}/")
    elif [[ ${{#COMPREPLY[@]}} == 1 && ${{COMPREPLY[0]}} != *[=.] ]]; then COMPREPLY=("${{COMPREPLY[0]}} "); fi
}}
complete -o nospace -F _scldm scldm
"""


@dataclass(frozen=True)
class CompletionConfig:
    """For which shell.

    shell: bash or zsh
    """

    shell: Shell


CONFIG = CompletionConfig


def read(words: Sequence[str]) -> CompletionConfig:
    """The shell is the first word."""
    config = compose(CompletionConfig, [f"shell={word}" if "=" not in word else word for word in words])
    one_of("shell", config.shell, Shell)
    return config


def main(config: CompletionConfig) -> None:
    print(script(config.shell))


def script(shell: Shell) -> str:
    """The script. Both shells run the same function."""
    head = "autoload -U +X bashcompinit && bashcompinit\n" if shell == "zsh" else ""
    cases = [f'        "{verb} "*) words="{" ".join(words_of(verb))}" ;;' for verb in VERBS]
    begun = sorted({verb.split()[0] for verb in VERBS if " " in verb})
    for first in begun:
        seconds = " ".join(verb.split()[1] for verb in VERBS if verb.startswith(f"{first} "))
        cases.append(f'        "{first} "*) words="{seconds}" ;;')
    verbs = " ".join(dict.fromkeys(verb.split()[0] for verb in VERBS))
    return SCRIPT.format(head=head, cases="\n".join(cases), verbs=verbs).rstrip()


def words_of(verb: str) -> list[str]:
    """What may follow a verb: its presets and keys."""
    if verb == "completion":
        return ["bash", "zsh"]
    keys = [key.removesuffix(ANY) if key.endswith(ANY) else f"{key}=" for key in keys_of(verb) if key != ANY]
    return [*preset_names(PRESETS.get(verb, ())), *keys, "--help"]
