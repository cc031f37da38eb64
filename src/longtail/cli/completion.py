"""Scripts for completion of longtail's commands, recipes and flags in a shell."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from collections.abc import Mapping, Sequence

from longtail.cli.app import COMMANDS, load_command
from longtail.errors import LongtailError

SHELLS = ("bash", "zsh", "fish")


def completion(arguments: list[str]) -> None:
    """Print the script for a shell."""
    from longtail.config import recipe_names
    from longtail.data.source_spec import named_sets

    if arguments[:1] in (["-h"], ["--help"]):
        print('usage: longtail completion bash | zsh | fish\n\nIn ~/.bashrc: eval "$(longtail completion bash)"')
        return
    if len(arguments) != 1:
        raise LongtailError(f"completion: expected one of {', '.join(SHELLS)}")
    recipes, sets = recipe_names(), named_sets()
    names = {"train": recipes, "compare": recipes, "inspect": sets, "split": sets, "embed": sets, "completion": SHELLS}
    print(script(arguments[0], {name: [*sorted(names.get(name, ())), *_flags(name)] for name in COMMANDS}), end="")


def _flags(command: str) -> list[str]:
    """Return the flags in a command's help."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        load_command(command)(["--help"])
    flags = re.findall(r"(?<![\w-])--[a-z][\w.-]*", output.getvalue())
    return list(dict.fromkeys(flag.rstrip(".-") for flag in flags))


def script(shell: str, words: Mapping[str, Sequence[str]]) -> str:
    """Return a script for a shell to read at its start.

    Args:
        shell: one of :data:`SHELLS`.
        words: what can follow each command: flags, and names that are not files. Files always can.

    Raises:
        LongtailError: another shell.
    """
    if shell not in SHELLS:
        raise LongtailError(f"completion '{shell}': expected {', '.join(SHELLS)}")
    return _fish(words) if shell == "fish" else _bash(words, zsh=shell == "zsh")


def _bash(words: Mapping[str, Sequence[str]], zsh: bool) -> str:
    cases = "\n".join(f"    {name}) words={shlex.quote(' '.join(those))} ;;" for name, those in words.items())
    return f"""{"autoload -U +X bashcompinit && bashcompinit" if zsh else "# longtail completion for bash"}
_longtail() {{
  local words="" current="${{COMP_WORDS[COMP_CWORD]}}"
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W {shlex.quote(" ".join(words))} -- "$current"))
    return
  fi
  case "${{COMP_WORDS[1]}}" in
{cases}
  esac
  COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -o default -F _longtail longtail
"""


def _fish(words: Mapping[str, Sequence[str]]) -> str:
    lines = [f"complete -c longtail -n __fish_use_subcommand -f -a {shlex.quote(' '.join(words))}"]
    for name, those in words.items():
        seen = f"complete -c longtail -n '__fish_seen_subcommand_from {name}'"
        lines += [f"{seen} {f'-l {word[2:]}' if word.startswith('--') else f'-a {word}'}" for word in those]
    return "\n".join(lines) + "\n"
