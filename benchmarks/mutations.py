"""Mutation test: randomly planted bugs, and whether the tests find them: ``python -m benchmarks.mutations``.

The same number of bugs is planted in each of four packages: a comparison, an operator, a number or a condition is
changed, two arguments are swapped, an argument is omitted, or a statement is deleted. Each is planted in a clone of the
committed files, where the package's tests run until one fails: those in the file of the same name first, then those
that use what it exports. ``--again`` repeats survivors with more ``--seconds`` and the tests of all packages. At the
end, every test that found a bug must pass on the unchanged files.
"""

from __future__ import annotations

import argparse
import ast
import copy
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from importlib.util import cache_from_source
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning  # noqa: F401  # like the next, not to be imported by every fork
import sklearn.datasets  # noqa: F401

from benchmarks.common import add_resume, here, publish, rows_in

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("scoring", "planning", "surgery", "callbacks")
OTHER: dict[type, type] = {
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq},
    **{ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And},
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult},
    **{ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr},
}
# What only readers and type checkers look at.
IDLE_FIELDS = ("annotation", "returns", "decorator_list")
IDLE = (ast.Assert, ast.JoinedStr, ast.Import, ast.ImportFrom)
IDLE_STARTS = ("__all__", "if TYPE_CHECKING", "cast(", "TypeVar(", "Literal[", "Callable[", "strict=", "stacklevel=")


def places(parent: ast.AST) -> Iterator[tuple[Any, Any, Any]]:
    """Every node below one that may do something: what holds it, by which index or name, and the node."""
    for field, value in ast.iter_fields(parent):
        for key, child in enumerate(value) if isinstance(value, list) else [(field, value)]:
            if field in IDLE_FIELDS or not isinstance(child, ast.AST) or isinstance(child, IDLE):
                continue
            if not ast.unparse(child).startswith(IDLE_STARTS):
                yield (value if isinstance(value, list) else parent), key, child
                yield from places(child)


def mistakes(node: Any) -> Iterator[tuple[str, ast.AST]]:
    """What might have been written instead of a node, and the kind of the mistake."""
    yield from _another(node)
    yield from _turned(node)
    yield from _missing(node)


def _but(node: ast.AST, **fields: Any) -> ast.AST:
    changed = copy.copy(node)
    vars(changed).update(fields)
    return changed


def _another(node: Any) -> Iterator[tuple[str, ast.AST]]:
    match node:
        case ast.Compare(ops=[op]):
            yield "comparison", _but(node, ops=[OTHER[type(op)]()])
        case ast.BinOp(op=op) | ast.BoolOp(op=op) if type(op) in OTHER:
            yield "operator", _but(node, op=OTHER[type(op)]())
        case ast.UnaryOp(op=ast.Not() | ast.USub()):
            yield "sign", node.operand
        case ast.Constant(value=bool() as value):
            yield "number", ast.Constant(not value)
        case ast.Constant(value=int() as value):
            yield "number", ast.Constant(value + 1)
        case ast.Constant(value=float() as value):
            yield "number", ast.Constant(2 * value or 1.0)


def _turned(node: Any) -> Iterator[tuple[str, ast.AST]]:
    match node:
        case ast.If(test=test) | ast.While(test=test) | ast.IfExp(test=test):
            yield "condition", _but(node, test=ast.UnaryOp(ast.Not(), test))
        case ast.comprehension(ifs=[test]):
            yield "condition", _but(node, ifs=[ast.UnaryOp(ast.Not(), test)])
        case ast.Call(args=[first, second, *rest]) if ast.unparse(node.func) not in ("min", "max"):
            if not isinstance(first, ast.Starred) and not isinstance(second, ast.Starred):
                yield "arguments swapped", _but(node, args=[second, first, *rest])


def _missing(node: Any) -> Iterator[tuple[str, ast.AST]]:
    match node:
        case ast.Call(keywords=keywords):
            for at, keyword in enumerate(keywords):
                if keyword.arg not in (None, "strict", "stacklevel", "device"):  # which tells on a GPU only
                    yield "argument missing", _but(node, keywords=keywords[:at] + keywords[at + 1 :])
        case ast.Expr(value=ast.Constant()):
            return  # a docstring
        case ast.Expr() | ast.Raise() | ast.AugAssign() | ast.Continue() | ast.Break():
            yield "statement missing", ast.Pass()
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            yield "statement missing", ast.Pass()


def mutants(tree: Path, room: str, seed: int) -> Iterator[dict[str, Any]]:
    """Those of a room in random order, of each kind in turn."""
    found = dict[str, list[dict[str, Any]]]()
    for file in sorted((tree / "lightning_prune" / room).rglob("*.py")):
        for place, (_, _, node) in enumerate(places(ast.parse(file.read_text("utf-8")))):
            for nth, (kind, new) in enumerate(mistakes(node)):
                where = {"line": getattr(node, "lineno", None) or node.target.lineno, "place": place, "nth": nth}
                change = {"kind": kind, "old": ast.unparse(node), "new": ast.unparse(new)}
                found.setdefault(kind, []).append({"file": str(file.relative_to(tree)), **where, **change})
    of = sum(map(len, found.values()))
    for kind in sorted(found):
        random.Random(f"{seed} {room} {kind}").shuffle(found[kind])
    return ({"room": room, "of": of, **found[kind].pop()} for kind in itertools.cycle(sorted(found)))


def planted(source: str, mutant: dict[str, Any]) -> str:
    """A file with its bug."""
    tree = ast.parse(source)
    holder, key, node = list(places(tree))[mutant["place"]]
    new = list(mistakes(node))[mutant["nth"]][1]
    holder.__setitem__(key, new) if isinstance(holder, list) else setattr(holder, key, new)
    return ast.unparse(tree)


def tests_of(tree: Path, mutant: dict[str, Any], names: list[str], *, everywhere: bool) -> list[str]:
    """Files of tests, the nearest first."""
    file, room = Path(mutant["file"]), Path("tests") / mutant["room"]
    own = {file.stem, *file.parts[2:-1]}

    def nearness(test: str) -> tuple[bool, bool, int]:
        text, stem = (tree / test).read_text("utf-8"), Path(test).stem.removeprefix("test_")
        same = stem in file.stem or any(name[:5] in test for name in own)
        return test.startswith(str(room)), same, sum(bool(re.search(rf"\b{name}\b", text)) for name in names)

    tests = (tree / ("tests" if everywhere else room)).rglob("test_*.py")
    return [str(file), *sorted(sorted(str(test.relative_to(tree)) for test in tests), key=nearness, reverse=True)]


class Watch:
    """Lets every test function have one case, and those that name what is sought, before the others; notes failures."""

    def __init__(self, notes: Path, names: Iterable[str] = ()) -> None:
        self.notes, self.names = notes, names

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        seen = set[str]()
        first, later = [], []
        for item in items:
            function = item.nodeid.partition("[")[0]
            near = function not in seen or any(name in item.nodeid for name in self.names)
            (first if near else later).append(item)
            seen.add(function)
        items[:] = first + later

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            with self.notes.open("a", encoding="utf-8") as notes:
                notes.write(f"{report.nodeid}\n")

    pytest_collectreport = pytest_runtest_logreport


def failing(tree: Path, tests: list[str], seconds: int, *options: str, names: Iterable[str] = ()) -> list[str]:
    """The tests that fail, in a fork, which need not import torch and Lightning, but has to import the package."""
    notes, log = tree.parent / "failing.txt", tree.parent / "pytest.log"
    notes.write_text("", encoding="utf-8")
    child = os.fork()
    if child:
        limit = threading.Timer(4 * seconds, os.killpg, (child, signal.SIGKILL))  # should it wait for ever
        limit.start()
        _, status = os.waitpid(child, 0)
        limit.cancel()
        found = notes.read_text("utf-8").splitlines()
        if not found and os.waitstatus_to_exitcode(status) not in (0, 5, -signal.SIGXCPU, -signal.SIGKILL):
            raise RuntimeError(f"expected pytest to run, see {log}")
        return found
    os.setsid()
    for output in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND), output)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
    os.chdir(tree)
    os.environ["PYTHONPATH"] = str(tree)
    sys.path[:] = [str(tree), *(place for place in sys.path if Path(place or ".").resolve() != ROOT)]
    for name in [name for name in sys.modules if name.partition(".")[0] in ("lightning_prune", "benchmarks")]:
        del sys.modules[name]
    always = ("-q", "--tb=short", "--assert=plain", "-p", "no:cacheprovider")
    os._exit(int(pytest.main([*always, *options, *tests], [Watch(notes, names)])))


def _write(file: Path, source: str) -> None:
    file.write_text(source, encoding="utf-8")
    Path(cache_from_source(str(file))).unlink(missing_ok=True)  # which is told from the file by seconds and bytes


def judged(tree: Path, mutant: dict[str, Any], seconds: int, *, everywhere: bool) -> dict[str, Any]:
    """Whether the tests find it, which, and after how many seconds."""
    file, marks = tree / mutant["file"], "not slow" if everywhere else "not slow and not ddp"
    source, began = file.read_text("utf-8"), time.monotonic()
    exported = re.search(r"__all__ = \[(.*?)\]", source, re.DOTALL)
    names = re.findall(r'"(\w+)"', exported[1] if exported else "")
    tests = tests_of(tree, mutant, names, everywhere=everywhere)
    # What takes a second may take longer on a busy machine; what takes two minutes does not end.
    options = ("-x", "-m", marks, "-k", "not within_a_second", "-o", "timeout=120")
    try:
        _write(file, planted(source, mutant))
        found = failing(tree, tests, seconds, *options, names=names)
    finally:
        _write(file, source)
    by = found[0] if found else None
    return {"found": bool(found), "by": by, "seconds": round(time.monotonic() - began), "at": here()}


def wrongly(tree: Path, rows: list[dict[str, Any]]) -> list[str]:
    """The tests that found something and fail without a bug, too."""
    for file in {tree / row["file"] for row in rows}:
        _write(file, ast.unparse(ast.parse(file.read_text("utf-8"))))
    found = failing(tree, sorted({row["by"] for row in rows if row["found"]}), 3600, "-m", "not slow")
    subprocess.run(["git", "-C", tree, "checkout", "-q", "lightning_prune"], check=True)
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Counts by room, and what lived."""
    lines = ["| room | possible | drawn | found | by the room's quick tests |", "|---|---:|---:|---:|---:|"]
    for room in (*ROOMS, "all"):
        own = [row for row in rows if room in ("all", row["room"])]
        possible = sum({row["room"]: row["of"] for row in own}.values())
        found, quickly = (sum(row[key] for row in own) for key in ("found", "quickly"))
        lines.append(f"| {room} | {possible:,} | {len(own)} | {found} | {quickly} |")
    lines += ["", "| lived | kind | was | became |", "|---|---|---|---|"]
    for row in (row for row in rows if not row["found"]):
        was, became = (" ".join(row[key].split())[:80].replace("|", "\\|").replace("`", "'") for key in ("old", "new"))
        lines.append(f"| {row['file']}:{row['line']} | {row['kind']} | `{was}` | `{became}` |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--each", type=int, default=25, help="bugs per package")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=int, default=60, help="processor time per bug")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "mutations")
    parser.add_argument("--again", action="store_true", help="repeat stored survivors with all tests")
    add_resume(parser)
    given = parser.parse_args()
    tree, store, drawn = given.work / "tree", given.work / "rows.jsonl", given.work / "drawn.json"
    if not (given.resume or given.again):
        shutil.rmtree(given.work, ignore_errors=True)
        subprocess.run(["git", "clone", "-q", ROOT, tree], check=True)
        rooms = (itertools.islice(mutants(tree, room, given.seed), given.each) for room in ROOMS)
        drawn.write_text(json.dumps(list(itertools.chain(*zip(*rooms, strict=True)))), encoding="utf-8")
    subprocess.run(["git", "-C", tree, "checkout", "-q", "lightning_prune"], check=True)  # a bug that was left
    done = {row["number"]: row for row in (rows_in(store) if store.is_file() else [])}
    for number, mutant in enumerate(json.loads(drawn.read_text("utf-8"))):
        before = done.get(number)
        if before and (before["found"] or not given.again):
            continue
        row = {"number": number, **mutant, **judged(tree, mutant, given.seconds, everywhere=given.again)}
        done[number] = {**row, "quickly": row["found"] and not given.again}
        with store.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(done[number]) + "\n")
        print(number, row["seconds"], f"{mutant['file']}:{mutant['line']}", row["by"] or "lived", flush=True)
    rows = [done[number] for number in sorted(done)]
    for test in wrongly(tree, rows):
        print("fails without a bug:", test)
        for row in (row for row in rows if row["by"] == test):
            row.update(found=False, quickly=False)
    publish("mutations", {"rows": rows}, table(rows))


if __name__ == "__main__":
    main()
