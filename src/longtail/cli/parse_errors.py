"""What is wrong with a flag, in one line: of the boxed messages that tyro prints."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

_KINDS = {"INT": "a whole number", "FLOAT": "a number", "STR": "a text", "PATH": "a path", "{None}": "None"}
_NOT_A_VALUE = (
    (re.compile(r"invalid literal for int\(\) with base 10: '(.*)'"), "a whole number"),
    (re.compile(r"could not convert string to float: '(.*)'"), "a number"),
)
_PLURALS = {"INT": "whole numbers", "FLOAT": "numbers", "STR": "texts", "PATH": "paths"}
_NO_SEQUENCE = re.compile(r"Could not find valid parse for arguments: \[(.*)\]")
_NO_TYPE = re.compile(r"no type matching (.+?) could be instantiated from \[(.*)\]")
_PARSING = re.compile(r"Error parsing (\S+): (.*)")
_CHOICE = re.compile(r"invalid choice '(.*)' for argument '(.*)'\. Expected one of \((.*)\)")
_NO_VALUE = re.compile(r"Missing value for argument '(.*)'\. Expected (\d+) values")
_MISSING = re.compile(r"Missing from longtail \S+: (\S+) (.*?)\.? \(required\)")
_UNKNOWN = re.compile(r"Unrecognized options: (.*)")


def one_line(box: str, command: str) -> str:
    """Return the message of one of tyro's boxes, with the flags that it suggests.

    Args:
        box: what tyro printed.
        command: whose help lists all flags.
    """
    # on a terminal without box-drawing characters tyro uses hyphens
    lines = [line.strip("│╭╮╰╯─ ") for line in box.splitlines()[1:]]
    lines = ["" if not line.strip("-") else line for line in lines]
    while lines and not lines[0]:
        lines.pop(0)
    message = " ".join(lines[: next((i for i, line in enumerate(lines) if not line), len(lines))])
    message = message.split(" Got errors:")[0].rstrip(".")
    hint = ""
    if any(line.startswith("Perhaps you meant") for line in lines):
        flags = dict.fromkeys(line.split()[0].rstrip(",") for line in lines if line.startswith("--"))
        wrong = next((word.rstrip(",") for word in message.split() if word.startswith("--")), "")
        close = difflib.get_close_matches(wrong, flags, n=3, cutoff=0.5) or list(flags)[:3]
        hint = f"; perhaps you meant {' or '.join(close)}?"
    found = _PARSING.fullmatch(message)
    kinds = [line.partition(" ")[2] for line in lines if found and line.startswith(f"{found[1]} ")]
    return f"{plain(message, *kinds[:1])}{hint} (longtail {command} --help lists all)"


def plain(message: str, kind: str = "") -> str:
    """Return one of tyro's messages in the form of ours, which name the flag, its value and what was expected.

    >>> plain("Error parsing --seed: invalid literal for int() with base 10: 'a'")
    '--seed a: expected a whole number'

    Args:
        message: on one line; returned as it is where its form is not known.
        kind: of the flag's values as the help shows it, ``[FLOAT [FLOAT ...]]`` for one.
    """
    if found := _PARSING.fullmatch(message):
        flag, reason = found.groups()
        for pattern, expected in _NOT_A_VALUE:
            if value := pattern.fullmatch(reason):
                return f"{flag} {value[1]}: expected {expected}"
        if value := _NO_TYPE.fullmatch(reason):
            return f"{flag} {_words(value[2])}: expected {_either(value[1].split('|'))}"
        if (value := _NO_SEQUENCE.fullmatch(reason)) and kind:
            return f"{flag} {_words(value[1])}: expected {_either([kind])}"
        if not flag.startswith("-"):  # a check of a whole section, whose message names the field
            return reason
    if found := _CHOICE.fullmatch(message):
        choices = [part.strip("'\" ") for part in found[3].split(",")]
        return f"{found[2]} {found[1]}: expected {_either(choice for choice in choices if choice)}"
    if found := _NO_VALUE.fullmatch(message):
        return f"{found[1]}: expected {'a value' if found[2] == '1' else f'{found[2]} values'}"
    if found := _MISSING.fullmatch(message):
        return f"{found[1]} is missing: {found[2]}"
    if found := _UNKNOWN.fullmatch(message):
        words = found[1].split(", ")
        if words[0].startswith("-"):
            return f"{words[0]}: there is no such flag"
        return f"{' '.join(words)}: not expected here"
    return message


def _words(arguments: str) -> str:
    return " ".join(part.strip("'\"") for part in arguments.split(", "))


def _name_of(kind: str) -> str:
    """Return the name of a kind of values.

    >>> _name_of("{INT INT}"), _name_of("[FLOAT [FLOAT ...]]"), _name_of("{csv,wandb}")
    ('2 whole numbers', 'numbers', 'csv, wandb')
    """
    words = kind.strip("{}").split()
    parts = [word.strip("[]") for word in words if word != "...]]"]
    if len(words) > 1 and len(set(parts)) == 1 and parts[0] in _PLURALS:
        return _PLURALS[parts[0]] if len(parts) < len(words) else f"{len(words)} {_PLURALS[parts[0]]}"
    return _KINDS.get(kind, kind.strip("{}").replace(",", ", "))


def _either(kinds: Iterable[str]) -> str:
    names = [_name_of(kind) for kind in kinds]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
