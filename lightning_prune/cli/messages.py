"""One-line messages for mistakes on the command line: what was expected, what was given, what to do."""

from __future__ import annotations

import inspect
import linecache
import re
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from traceback import walk_tb
from typing import Any, NoReturn

from typing_extensions import override

__all__ = ["COMMANDS", "OneLineParser", "in_one_line", "near", "of_parser", "of_unknown"]

#: The commands of `lightning-prune`.
COMMANDS = (
    *("fit", "validate", "test", "predict", "inspect", "score", "export", "quantise", "latency_script"),
    *("compare", "controls", "study", "recipes"),
)

# Packages whose errors are meant for the user.
_SPEAKING = ("lightning_prune", "lightning")

# Lightning's messages, and the ones shown instead.
_SAID_BY_LIGHTNING = {
    r"No supported gpu backend found": (
        "--trainer.accelerator: expected one that this machine has, got gpu, but PyTorch finds no GPU. "
        "Omit the option, or use cpu."
    ),
    r"`Trainer\(devices=('.*?')\)` value is not": (
        "--trainer.devices: expected a number of processes of at least 1, or auto, got {0}."
    ),
    r"You selected an invalid strategy name: `strategy=('.*?')`": (
        "--trainer.strategy: expected auto, ddp, ddp_spawn or another of Lightning's names, got {0}."
    ),
    r"You selected an invalid accelerator name: `accelerator=('.*?')`": (
        "--trainer.accelerator: expected auto, cpu, gpu or another of Lightning's names, got {0}."
    ),
    r"`train_dataloader` must be implemented": (
        "fit: expected data, got none. Give --data: one of this package (Digits) or your own (my_package.MyData), or "
        "define `train_dataloader` in the module."
    ),
    r'`.fit\(ckpt_path="best"\)` is set': (
        "--ckpt_path: expected a file or last, got best, which is not known before a run. Give the file."
    ),
}

# Lines of the parser's message that only structure it.
_FORM = re.compile(r"$|Does not validate against|Errors:|Expected a path but")
_KEY = re.compile(r'Parser key "(.+)":')
_OWNER = re.compile(r"Problem with given class_path '(.+)':")
_TYPES = re.compile(r"Subtypes: \[(.+)\]")
_GIVEN = re.compile(r"Given value: (?:NestedArg\(key='.*', val='?)?(.*?)(?:'?\))?$")

# The parser's names of types, and the ones shown instead.
_TYPE_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "NoneType": "null",
    "dict": "a mapping",
    "list": "a list",
    "Sequence": "a list",
    "Iterable": "a list",
    "tuple": "a list",
}


class OneLineParser(ArgumentParser):
    """An `ArgumentParser` whose errors are one line, without the usage."""

    @override
    def error(self, message: str) -> NoReturn:
        command = self.prog.partition(" ")[2]
        if match := re.match(r"argument .*?: invalid choice: '(.*?)' \(choose from (.*)\)", message):
            known = re.findall(r"[\w-]+", match[2])
            raise ValueError(f"{command}: expected {', '.join(known)}, got {match[1]!r}.{near(match[1], known)}")
        if match := re.match("unrecognized arguments: (.*)", message):
            known = [option for action in self._actions for option in action.option_strings]
            word = match[1].split()[0]
            raise ValueError(f"{command}: expected an option that --help lists, got {word!r}.{near(word, known)}")
        if match := re.match("the following arguments are required: (.*)", message):
            raise ValueError(f"{command}: expected {match[1]}, got none. See `{self.prog} --help`.")
        raise ValueError(f"{command}: {message}. See `{self.prog} --help`.")


def in_one_line(error: BaseException) -> str | None:
    """The message of an error that reports a mistake: one raised on purpose by this package or by Lightning.

    Args:
        error: The error.

    Returns:
        Its message and, if the user's code led to it, the place. ``None`` for bugs, which need their traceback.
    """
    chain = _chain(error)
    found = next((link for home in _homes() for link in chain if _is_said(link, home)), None)
    if found is None:
        return _of_unfit(error)
    text = " ".join(str(found).split())
    for pattern, ours in _SAID_BY_LIGHTNING.items():
        if match := re.match(pattern, text):
            return ours.format(*match.groups())
    place = _place(error)
    return f"{text} ({place})" if place else text


def _of_unfit(error: BaseException) -> str | None:
    """The message if a network of this package does not accept the given data."""
    files = [Path(frame.f_code.co_filename) for frame, _ in walk_tb(error.__traceback__)]
    if not isinstance(error, RuntimeError) or not any(_homes()[0] / "models" in file.parents for file in files):
        return None
    if any("model_summary" in str(file) for file in files) and "dtype" in str(error):
        return (
            f"Lightning's summary of the model does not convert its example to the precision of the run ({error}). "
            "Give --trainer.enable_model_summary=false."
        )
    return f"expected a network that accepts this data, got one for another shape ({error}). Check --model and --data."


def near(word: str, known: Iterable[str], least: float = 0.7) -> str:
    """``" Did you mean a or b?"``, or an empty string if no known name is similar.

    Names are compared after the last dot: ``--lr`` is similar to ``--model.lr``. Names that start with the word match.

    Args:
        word: The given word.
        known: Possible names.
        least: Minimum similarity in [0, 1].
    """
    alike = {name: _likeness(word, name) for name in known if not name.endswith("+")}
    best = max(alike.values(), default=(0.0, 0.0))
    close = [name for name, value in alike.items() if value[0] >= max(least, best[0] - 0.05)]
    found = sorted(close, key=lambda name: alike[name])[:-3:-1] or [
        name for name in alike if len(word) > 3 and name.lower().startswith(word.lower())
    ]
    return f" Did you mean {' or '.join(found[:3])}?" if found else ""


def _likeness(one: str, other: str) -> tuple[float, float]:
    """Similarity of two names after their last dot, and as a whole."""
    first, second = one.lower().strip("-"), other.lower().strip("-")
    ends = SequenceMatcher(None, first.rpartition(".")[2], second.rpartition(".")[2])
    return ends.ratio(), SequenceMatcher(None, first, second).ratio()


def of_unknown(words: Sequence[str], command: str, known: Iterable[str]) -> str:
    """The message for options that a command does not have.

    Args:
        words: The arguments that the parser did not recognise.
        command: The command.
        known: Its options.
    """
    options = [word.partition("=")[0] for word in words if word.startswith("-")]
    if not options:
        return f"{command}: expected an option, got {words[0]!r}. A recipe or a file comes after --config."
    names = list(known)
    said = [f"expected an option of `{command}`, got {option}.{near(option, names)}" for option in options]
    return f"{' '.join(said)} `lightning-prune {command} --help` lists them."


def of_parser(text: str, command: str, known: Iterable[str]) -> str:
    """The parser's error message in one line.

    Args:
        text: The parser's message.
        command: The command.
        known: Options of the command.
    """
    if match := re.match(r"unrecognized arguments: (.+)", text, re.DOTALL):
        return of_unknown(match[1].split(), command, known)
    if match := re.match(r"argument (?:-\w/)?(--\S+): expected one argument", text):
        return f"{match[1]}: expected a value, got none."
    if match := re.match(r"Subcommand '\w+' does not accept option '(.+)'", text):
        names = [name.lstrip("-") for name in known]
        return f"expected an entry that `{command}` has, got `{match[1]}`.{near('-' + match[1], names)}"
    if "arguments are required: " in text and text.startswith("the following"):
        return _of_required(text.partition(": ")[2], command)
    if 'Parser key "' not in text:
        return " ".join(text.split())
    return _of_value(_read(text))


def _of_required(names: str, command: str) -> str:
    if names != f"{command}.model":
        return f"{command}: expected --{names.removeprefix(f'{command}.')}, got none."
    return (
        f"{command}: expected a network, got none. Give a recipe that has one with --config (see "
        "`lightning-prune recipes`), or --model: one of this package (MLPClassifier) or your own (my_package.MyModule)."
    )


@dataclass(frozen=True)
class _Refused:
    """A value that the parser rejected.

    Attributes:
        option: The option: ``trainer.callbacks.pruning_ratio``.
        owner: Import path of the class that has the last part as an argument.
        types: Types of the last part, in the parser's form.
        reason: The first reason for rejecting it.
        given: The value.
    """

    option: str
    owner: str
    types: str
    reason: str
    given: str


def _read(text: str) -> _Refused:
    """The first reason in the parser's tree of reasons, followed down to its leaf."""
    keys, owner, types, reason = [], "", "", ""
    lines = iter(text.splitlines())
    for line in lines:
        stripped = line.strip().removeprefix("- ")
        if match := _KEY.match(stripped):
            keys.append(match[1])
            types = ""
        elif match := _OWNER.match(stripped):
            owner = match[1]
        elif match := _TYPES.match(stripped):
            types = match[1]
        elif not _FORM.match(stripped):
            reason = stripped
            break
    rest = list(lines)
    unknown = next((line for line in rest if "Expected a dot import path string" in line), None)
    if unknown is not None and reason.startswith("Expected a <"):  # a list or a class, and a class was meant
        reason = unknown.strip().removeprefix("- ")
    got = re.search(r"\. Got value: (.*)", reason)
    given = got[1] if got else next((match[1] for line in rest if (match := _GIVEN.match(line.strip()))), "")
    return _Refused(".".join(keys), owner, types, reason.partition(". Got value: ")[0], given)


def _of_value(refused: _Refused) -> str:
    for pattern, say in _REASONS.items():
        if match := re.match(pattern, refused.reason):
            return say(refused, *match.groups())
    return f"--{refused.option}: {refused.reason}"


def _of_missing(refused: _Refused, names: str) -> str:
    options = " and ".join(f"--{refused.option}.{name}" for name in names.split(", "))
    return f"{_name(refused.owner)}: expected {options}, got none."


def _of_class(refused: _Refused, name: str) -> str:
    bases = _bases(refused.types)
    kinds = " or ".join(base.__name__ for base in bases) or "class"
    guess = near(name, (each for base in bases for each in _subclasses(base)), 0.6)
    other = "" if guess else " Give your own classes with their module: my_package.MyClass."
    return f"--{refused.option}: expected {_a(kinds)}, got {name!r}, which is unknown.{guess}{other}"


def _of_attribute(refused: _Refused, module: str, name: str) -> str:
    here = vars(sys.modules[module]).items()
    known = [each for each, value in here if inspect.isclass(value) and value.__module__ == module]
    has = f" It has {', '.join(known)}." if known else ""
    return f"--{refused.option}: expected a class of {module}, got {name!r}, which it does not have.{has}"


def _of_kind(refused: _Refused, kind: str) -> str:
    return f"--{refused.option}: expected {_a(kind)}, got {refused.given}, which is not one."


def _of_fault(refused: _Refused, fault: str) -> str:
    return f"--{refused.option}: expected a class that can be imported, got {refused.given}: {fault}."


def _of_file(refused: _Refused, file: str) -> str:
    module = file.removesuffix(".py").replace("/", ".")
    return f"--{refused.option}: expected a class, got the file {file}. Give a class in its module: {module}.MyClass."


def _of_type(refused: _Refused, type_: str) -> str:
    return f"--{refused.option}: expected {_types(refused.types or type_)}, got {refused.given!r}."


def _of_argument(refused: _Refused, name: str) -> str:
    option, first = f"--{refused.option}", name.partition(".")[0]
    if near(f"-{first}", ("class_path", "init_args")):
        return f"{refused.option}: expected `class_path` and `init_args` in an entry, got `{first}`."
    if refused.owner == "lightning.Callback":
        return (
            f"{option}: expected a callback that has the option `{name}`, got none. Add one: "
            f"--trainer.callbacks+=ContributionPruning {option}.{name}=..."
        )
    known = [f"{option}.{each}" for each in _arguments(refused.owner)]
    guess = near(f"{option}.{name}", known) or f" Its arguments are {', '.join(_arguments(refused.owner))}."
    return f"expected an argument of {_name(refused.owner)}, got {option}.{name}.{guess}"


def _of_module(refused: _Refused, missing: str) -> str:
    option, path = f"--{refused.option}", refused.owner or refused.given
    if path == missing or path.startswith(f"{missing}."):
        return (
            f"{option}: expected the import path of a class, got {path}, but there is no module {missing!r}, installed "
            "or in the current folder."
        )
    return f"{option}: {path} cannot be imported, because there is no module {missing!r}. Install it."


# The message for each kind of reason that the parser gives.
_REASONS: dict[str, Callable[..., str]] = {
    r"Option '(.+)' is not accepted": _of_argument,
    r"the following arguments are required: (.+)": _of_missing,
    r"Expected a dot import path string: (.+)": _of_class,
    r"module '(.+)' has no attribute '(.+)'": _of_attribute,
    r"No module named '(.+)'": _of_module,
    r"Import path (?:\S+ )?does not correspond to a subclass of (.+)": _of_kind,
    r"Invalid content in sub-config file (.+?): ": _of_file,
    r"(.+ \(\S+\.py, line \d+\))": _of_fault,
    r"Expected a (<.*|typing.*|collections.*)": _of_type,
}


def _a(noun: str) -> str:
    return f"an {noun}" if noun[:1] in "AEIOU" else f"a {noun}"


def _name(path: str) -> str:
    return path.rpartition(".")[2]


def _arguments(path: str) -> list[str]:
    """Names of the arguments of a class."""
    module, _, name = path.rpartition(".")
    return list(inspect.signature(getattr(import_module(module), name)).parameters)


def _bases(types: str) -> list[type]:
    """The classes among the parser's types whose subclasses are accepted."""
    paths = re.findall(r"[\w.]+\.\w+", types)
    found: list[Any] = [getattr(import_module(path.rpartition(".")[0]), _name(path), None) for path in paths]
    return list(dict.fromkeys(each for each in found if inspect.isclass(each) and "collections" not in each.__module__))


def _subclasses(base: type) -> Iterator[str]:
    below: list[type] = type.__subclasses__(base)
    for each in below:
        if not each.__name__.startswith("_"):
            yield each.__name__
        yield from _subclasses(each)


def _types(text: str) -> str:
    """Names of types in words: ``<class 'int'>, <class 'NoneType'>`` → a whole number or null."""
    words = re.findall(r"'([^'\[\]]+)'|\b(\d+)\b", text) if "Literal" in text else []
    found = [word or number for word, number in words if "." not in word and word not in _TYPE_WORDS]
    plain = re.sub(r"typing\.Literal\[.*?\]", "", text)
    for path in re.findall(r"<class '([\w.]+)'>|([\w.]+)\[", plain):
        name = _name(path[0] or path[1])
        found.append(_TYPE_WORDS.get(name, _a(name)))
    found = list(dict.fromkeys(found))
    return f"{', '.join(found[:-1])} or {found[-1]}" if len(found) > 1 else "".join(found) or text


def _chain(error: BaseException) -> list[BaseException]:
    """An error and what caused it."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:  # a cause may be the error itself
        chain.append(link)
        link = link.__cause__
    return chain


def _is_said(error: BaseException, home: Path) -> bool:
    """Whether a package raised the error on purpose, with ``raise``. A cause may not have been raised."""
    frames = list(walk_tb(error.__traceback__))
    if not frames or isinstance(error, AssertionError):
        return False
    frame, line = frames[-1]
    file = Path(frame.f_code.co_filename)
    return home in file.parents and linecache.getline(str(file), line).lstrip().startswith("raise ")


def _homes() -> list[Path]:
    found = (find_spec(name) for name in _SPEAKING)
    return [Path(spec.origin).parent for spec in found if spec is not None and spec.origin is not None]


def _place(error: BaseException) -> str | None:
    """The last line of the user's own code that led to an error: code in the current folder that is not installed."""
    here = Path.cwd()
    found = None
    for frame, line in walk_tb(error.__traceback__):
        file = Path(frame.f_code.co_filename)
        inside = here in file.parents and "site-packages" not in file.parts
        if inside and not any(home in file.parents for home in _homes()):
            found = f"{file.relative_to(here)}, line {line}"
    return found
