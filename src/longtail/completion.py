"""Scripts that let a shell complete longtail's commands, recipes and flags."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from collections.abc import Callable, Mapping, Sequence

from longtail.errors import LongtailError

SHELLS = ("bash", "zsh", "fish")


def gathered(
    commands: Mapping[str, Callable[[list[str]], None]], named: Mapping[str, Sequence[str]]
) -> dict[str, list[str]]:
    """Return what can follow each command: the names given for it, and the flags that its help tells."""
    words: dict[str, list[str]] = {}
    for name, command in commands.items():
        shown = io.StringIO()
        with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
            command(["--help"])
        flags = re.findall(r"(?<![\w-])--[a-z][\w.-]*", shown.getvalue())
        words[name] = [*sorted(named.get(name, [])), *dict.fromkeys(flag.rstrip(".-") for flag in flags)]
    return words


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
