"""Options on the command line: they override files, and those of callbacks apply to the callback that has them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

import yaml

from lightning_prune.cli.messages import COMMANDS

__all__ = ["placed"]

_LIST = "--trainer.callbacks"

# Modules in which short names of callbacks are looked up, as in the parser.
_HOMES = ("lightning_prune", "lightning.pytorch.callbacks")


def placed(words: Sequence[str]) -> list[str]:
    """The arguments of a command line, with files first and each option of a callback after the callback that has it.

    The parser lets later arguments override earlier ones, and files written by a run give every option a value. With
    the files first, no option is overridden by one.

    The parser gives ``--trainer.callbacks.NAME`` to the last callback of the current list. If the list comes from a
    file and an option belongs to another callback, the list is passed again, one callback at a time, each followed by
    its options. If all options belong to the last callback, or the command line changes the list itself, nothing is
    changed.

    Args:
        words: The arguments, with file names after ``--config``.
    """
    words = _files_first(words)
    found = _last_list(words)
    if found is None:
        return words
    end, callbacks = found
    options, others = _split(words[end:])
    takers = [_taker(name, callbacks) for name, _ in options]
    last = len(callbacks) - 1
    if any(_is_list(word) for word in others) or all(taker in (None, last) for taker in takers):
        return words
    parts: list[str] = []
    for place, callback in enumerate(callbacks):
        one = callback if place else [callback]
        parts += [f"{_LIST}{'+' if place else ''}={json.dumps(one)}"]
        for (_, option), taker in zip(options, takers, strict=True):
            if taker == place or (taker is None and place == last):  # the last one rejects an unknown option
                parts += option
    return [*words[:end], *parts, *others]


def _files_first(words: Sequence[str]) -> list[str]:
    """The arguments with each ``--config FILE`` after the command moved right behind it, in the same order."""
    begin = next((place + 1 for place, word in enumerate(words) if word in COMMANDS), 0)
    files: list[str] = []
    others: list[str] = []
    rest = iter(words[begin:])
    for word in rest:
        flag, equals, _ = word.partition("=")
        if flag in ("--config", "-c"):
            files += [word] if equals else [word, *_next(rest)]
        else:
            others.append(word)
    return [*words[:begin], *files, *others]


def _last_list(words: Sequence[str]) -> tuple[int, list[Any]] | None:
    """The callbacks of the last file that has some, and the position of the argument after it."""
    found = None
    for position, word in enumerate(words):
        flag, equals, value = word.partition("=")
        if flag not in ("--config", "-c") or not (equals or position + 1 < len(words)):
            continue
        callbacks = _callbacks(Path(value if equals else words[position + 1]))
        if callbacks:
            found = position + (1 if equals else 2), callbacks
    return found


def _callbacks(file: Path) -> list[Any]:
    """The callbacks in a file; an empty list if it has another form, which the parser then reports."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return []
    trainer = content.get("trainer") if isinstance(content, Mapping) else None
    callbacks = trainer.get("callbacks") if isinstance(trainer, Mapping) else None
    return callbacks if isinstance(callbacks, list) else []


def _split(words: Sequence[str]) -> tuple[list[tuple[str, list[str]]], list[str]]:
    """Options of callbacks, each with its name and its arguments, and all other arguments."""
    options: list[tuple[str, list[str]]] = []
    others: list[str] = []
    rest = iter(words)
    for word in rest:
        if word.startswith(f"{_LIST}."):
            name = word.removeprefix(f"{_LIST}.").partition("=")[0].partition(".")[0].rstrip("+")
            options.append((name, [word] if "=" in word else [word, *_next(rest)]))
        else:
            others.append(word)
    return options, others


def _next(words: Iterator[str]) -> list[str]:
    word = next(words, None)
    return [] if word is None else [word]


def _is_list(word: str) -> bool:
    return word.partition("=")[0].rstrip("+") == _LIST


def _taker(name: str, callbacks: Sequence[Any]) -> int | None:
    """Index of the callback that an option is for: the last one with an argument of this name."""
    return next((place for place in reversed(range(len(callbacks))) if name in _arguments(callbacks[place])), None)


def _arguments(callback: Any) -> frozenset[str]:
    """Names of a callback's arguments; empty if its class is not found."""
    path = callback.get("class_path") if isinstance(callback, Mapping) else callback
    if not isinstance(path, str):
        return frozenset()
    home, _, name = path.rpartition(".")
    found = (_class(module, name) for module in ((home,) if home else _HOMES))
    kind = next((one for one in found if one is not None), None)
    return frozenset() if kind is None else frozenset(signature(kind).parameters)


def _class(module: str, name: str) -> type | None:
    try:
        found = getattr(import_module(module), name, None)
    except ImportError:
        return None
    return found if isinstance(found, type) else None
