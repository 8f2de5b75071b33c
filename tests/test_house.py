"""The rules of the house, held over the syntax tree of every file: whoever breaks one hears of it here."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_prune
from lightning_prune.extras import require

PACKAGE = Path(lightning_prune.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))

# In the order of the data: a room may import those before it.
ROOMS = ["structure", "scoring", "planning", "surgery", "reporting", "callbacks", "api", "study", "cli"]
WITH_LIGHTNING = {"api", "callbacks", "study", "data", "models", "cli"}
# Methods of a LightningModule that look like tests.
LIGHTNING_STEPS = {"test_step", "test_dataloader"}
# Imported where they are used, because each one costs a second or may be missing.
OPTIONAL = {
    "executorch",
    "matplotlib",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "openvino",
    "ray",
    "safetensors",
    "sklearn",
    "submitit",
    "timm",
    "torchvision",
    "transformers",
    "wandb",
    "xgboost",
}


def name_of(module: Path, package: str = "lightning_prune") -> str:
    place = module.relative_to(PACKAGE.parent / package).with_suffix("")
    return ".".join((package, *place.parts)).removesuffix(".__init__")


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def imports(tree: ast.AST, package: str) -> Iterator[str]:
    """Names of every imported module, type checking blocks included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{package}: relative imports hide the room they come from"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def at_import(tree: ast.Module) -> Iterator[ast.stmt]:
    """Statements that run when the module is imported; imports for type checkers do not."""
    for node in tree.body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def is_registered(node: ast.FunctionDef | ast.ClassDef) -> bool:
    """Whether a decorator such as ``@rule("cat")`` makes a function reachable without its name."""
    return isinstance(node, ast.FunctionDef) and any(isinstance(mark, ast.Call) for mark in node.decorator_list)


modules = pytest.mark.parametrize("module", MODULES, ids=[name_of(module) for module in MODULES])


def test_every_room_is_known() -> None:
    rooms = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert rooms <= {*ROOMS, *WITH_LIGHTNING}, "a new room needs its place in the direction of imports"


@modules
def test_imports_run_one_way(module: Path) -> None:
    room = room_of(name_of(module))
    below_cli = room and room != "__main__"
    later = set(ROOMS[ROOMS.index(room) + 1 :]) if room in ROOMS else {"cli"} if below_cli else set()
    wrong = [
        name
        for name in imports(ast.parse(module.read_text()), name_of(module))
        if name.startswith("lightning_prune.") and room_of(name) in later
    ]
    assert not wrong, f"{room} comes before what it imports: {wrong}"


def test_no_circle_between_files() -> None:
    """Imports in functions count, and so do those for type checkers."""
    files = {name_of(module): module for module in MODULES}
    arrows = {
        name: {
            named if named in files else named.rpartition(".")[0]
            for named in imports(ast.parse(file.read_text()), name)
        }
        for name, file in files.items()
    }
    remaining = {name: (ends & files.keys()) - {name} for name, ends in arrows.items()}
    # Files that import nothing that is left go, until only circles and what leads to them are there.
    while done := {name for name, ends in remaining.items() if not ends & remaining.keys()}:
        remaining = {name: ends for name, ends in remaining.items() if name not in done}
    assert not remaining


@modules
def test_only_the_upper_rooms_import_lightning(module: Path) -> None:
    room = room_of(name_of(module))
    wrong = [
        name
        for name in imports(ast.parse(module.read_text()), name_of(module))
        if name.split(".")[0] in ("lightning", "pytorch_lightning", "lightning_fabric")
    ]
    assert room in WITH_LIGHTNING or not wrong or not room, f"imports {wrong}"


@modules
def test_optional_packages_are_imported_where_they_are_used(module: Path) -> None:
    tree = ast.Module(list(at_import(ast.parse(module.read_text()))), [])
    wrong = [name for name in imports(tree, name_of(module)) if name.split(".")[0] in OPTIONAL]
    assert not wrong, f"at import: {wrong}"


@modules
def test_all_is_complete(module: Path) -> None:
    """`__all__` holds every public class and function that the module defines, and all of it exists."""
    loaded = importlib.import_module(name_of(module))
    tree = ast.parse(module.read_text())
    public = {
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and not is_registered(node)
    }
    assert isinstance(getattr(loaded, "__all__", None), list), "no `__all__`"
    assert len(set(loaded.__all__)) == len(loaded.__all__), "named twice"
    assert public <= set(loaded.__all__), f"not in `__all__`: {sorted(public - set(loaded.__all__))}"
    assert not [name for name in loaded.__all__ if not hasattr(loaded, name)], "names that do not exist"


def test_tests_and_benchmarks_share_tests_support_only() -> None:
    """What both need is in `tests/support/`; neither imports the other."""
    root = PACKAGE.parent
    wrong = [
        f"{file.relative_to(root)} imports {name}"
        for folder, forbidden in (("tests", ("benchmarks",)), ("tests/support", ("tests",)), ("benchmarks", ("tests",)))
        for file in sorted((root / folder).rglob("*.py"))
        for name in imports(ast.parse(file.read_text(encoding="utf-8")), folder)
        if name.split(".")[0] in forbidden and not name.startswith("tests.support.")
    ]
    assert not wrong


def test_every_test_can_fail() -> None:
    """A test asserts, raises or warns, itself or by a helper, and no assertion holds by its form alone."""
    tests = PACKAGE.parent / "tests"
    trees = {file: ast.parse(file.read_text(encoding="utf-8")) for file in sorted(tests.rglob("*.py"))}
    functions = {
        name_of(file, "tests"): [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        for file, tree in trees.items()
    }
    idle = []
    for file, tree in trees.items():
        own, named = name_of(file, "tests"), set(imports(tree, "tests"))
        near = {own, *named, *(name.rpartition(".")[0] for name in named)}  # a file, or a name from it
        checking = checks_in([node for name, nodes in functions.items() if name in near for node in nodes])
        idle += [f"{file.name}:{node.lineno}" for node in functions[own] if is_test(node) and node.name not in checking]
    assert not idle, "these have no assertion"
    always = [
        f"{file.name}:{claim.lineno}"
        for file, tree in trees.items()
        for claim in ast.walk(tree)
        if isinstance(claim, ast.Assert) and holds_always(claim.test)
    ]
    assert not always, "these assertions hold whatever happens"


def checks_in(functions: list[ast.FunctionDef]) -> set[str]:
    """Names of the functions that assert, themselves or by another of these."""
    checking = {node.name for node in functions if checks(node)}
    while more := {node.name for node in functions if node.name not in checking and calls(node) & checking}:
        checking |= more
    return checking


def test_what_checks_nothing_is_found() -> None:
    source = """
def helper(x): assert x
def test_through_a_helper(): helper(1)
def test_raises():
    with pytest.raises(ValueError): run()
def test_idle(): run()
"""
    functions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    assert checks_in(functions) == {"helper", "test_through_a_helper", "test_raises"}


def is_test(node: ast.FunctionDef) -> bool:
    fixtures = [mark for mark in node.decorator_list if "fixture" in ast.unparse(mark)]
    return node.name.startswith("test_") and not fixtures and not LIGHTNING_STEPS & {node.name}


def calls(node: ast.AST) -> set[str]:
    """Last names of all that is called."""
    return {ast.unparse(call.func).rpartition(".")[2] for call in ast.walk(node) if isinstance(call, ast.Call)}


def checks(node: ast.AST) -> bool:
    called = calls(node)
    claims = any(isinstance(part, ast.Assert) for part in ast.walk(node))
    return claims or bool(called & {"raises", "warns", "fail"}) or any(name.startswith("assert_") for name in called)


def holds_always(test: ast.expr) -> bool:
    """Whether an expression is true by its form: a constant, a tuple, ``... or True``, ``getattr(..., True)``."""
    if isinstance(test, ast.BoolOp):
        return (any if isinstance(test.op, ast.Or) else all)(map(holds_always, test.values))
    if isinstance(test, ast.Call) and ast.unparse(test.func) == "getattr":
        return len(test.args) == 3 and holds_always(test.args[2])
    if isinstance(test, ast.Constant):
        return bool(test.value)
    return isinstance(test, (ast.Tuple, ast.List)) and bool(test.elts)


@pytest.mark.parametrize(
    ("claim", "expected"),
    [
        ("True", True),
        ("x or True", True),
        ("getattr(x, 'y', True)", True),
        ("(x, 'said')", True),
        ("x == y", False),
        ("x and True", False),
        ("getattr(x, 'y', False)", False),
        ("not []", False),
    ],
)
def test_what_holds_always_is_found(claim: str, expected: bool) -> None:
    assert holds_always(ast.parse(claim, mode="eval").body) is expected


def test_no_test_is_skipped_for_a_package() -> None:
    """The extra `dev` installs all that tests import."""
    skipping = [
        str(file.relative_to(PACKAGE.parent))
        for file in (PACKAGE.parent / "tests").rglob("*.py")
        if "importorskip" in calls(ast.parse(file.read_text(encoding="utf-8")))
    ]
    assert not skipping


def test_a_room_exports_from_itself_only() -> None:
    """A public name has one home."""
    for room in ROOMS[:-1]:
        loaded = importlib.import_module(f"lightning_prune.{room}")
        homes = {
            name: getattr(getattr(loaded, name), "__module__", f"lightning_prune.{room}") for name in loaded.__all__
        }
        strangers = {
            name: home for name, home in homes.items() if home.startswith("lightning_prune.") and room_of(home) != room
        }
        assert not strangers, f"{room} exports what lives elsewhere: {strangers}"


def test_public_names_agree() -> None:
    """The names for type checkers, for `__getattr__` and for `import *` are the same."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    blocks = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    typed = {
        alias.name: node.module
        for block in blocks
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert typed == {name: f"lightning_prune.{room}" for name, room in lightning_prune._ROOM_OF.items()}
    assert set(lightning_prune.__all__) == {"__version__", *typed}
    for name in lightning_prune.__all__:
        assert getattr(lightning_prune, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        lightning_prune.nonsense  # noqa: B018


def test_every_error_of_its_own_is_a_pruning_error_and_a_builtin_one() -> None:
    """But those that never reach a user."""
    inside = {"MismatchError", "NumberError", "NotReplayable", "_Reached"}
    for module in MODULES:
        for name, kind in vars(importlib.import_module(name_of(module))).items():
            if not (isinstance(kind, type) and issubclass(kind, BaseException) and kind.__module__ == name_of(module)):
                continue
            if name not in {*inside, "PruningError"} and not issubclass(kind, Warning):
                assert issubclass(kind, lightning_prune.PruningError), name
                assert issubclass(kind, (ValueError, RuntimeError)), name


def test_every_public_name_is_in_the_documentation() -> None:
    pages = "\n".join(page.read_text() for page in (PACKAGE.parent / "docs").glob("*.md"))
    names = set(lightning_prune.__all__) - {"__version__"}
    missing = sorted(name for name in names if not re.search(rf"\b{re.escape(name)}\b", pages))
    assert not missing


def test_import_is_light() -> None:
    """The package alone loads neither Lightning nor torch; with its callbacks it loads nothing optional."""
    heavy = sorted(OPTIONAL | {"lightning", "torch", "pandas"})
    code = f"import sys, lightning_prune; print([name for name in {heavy} if name in sys.modules])"
    assert _python(code) == "[]"
    before = "import sys, lightning.pytorch; early = set(sys.modules); import lightning_prune.callbacks; "
    code = before + f"print([name for name in {sorted(OPTIONAL)} if name in sys.modules and name not in early])"
    assert _python(code) == "[]"


def test_functions_without_a_trainer_import_no_lightning() -> None:
    lightning = ("lightning", "pytorch_lightning", "lightning_fabric", "jsonargparse")
    code = f"import sys, lightning_prune.api; print([name for name in {lightning} if name in sys.modules])"
    assert _python(code) == "[]"


def test_recipes_answer_without_lightning() -> None:
    code = "import sys; from lightning_prune.cli import main; main(['recipes', 'list']); print('torch' in sys.modules)"
    assert _python(code).endswith("False")


def test_a_missing_package_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "present.py").write_text("import absent_dependency")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert require("json", extra="none") is importlib.import_module("json")
    with pytest.raises(ModuleNotFoundError, match=r'`absent` is needed .*extra `plot`: pip install "matplotlib>=3.9"'):
        require("absent.part", extra="plot")
    # A package that is there and lacks something of its own speaks for itself.
    with pytest.raises(ModuleNotFoundError, match="No module named 'absent_dependency'"):
        require("present", extra="plot")


def test_every_extra_that_is_named_exists() -> None:
    named = {
        keyword.value.value
        for module in MODULES
        for node in ast.walk(ast.parse(module.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "require"
        for keyword in node.keywords
        if keyword.arg == "extra" and isinstance(keyword.value, ast.Constant)
    }
    section = (PACKAGE.parent / "pyproject.toml").read_text().partition("[project.optional-dependencies]\n")[2]
    extras = set(re.findall(r"^(\w+) = \[", section.partition("\n[")[0], re.MULTILINE))
    assert {"digits", "vision"} <= named <= extras


def _python(code: str) -> str:
    environment = {"PYTHONPATH": str(PACKAGE.parent), "PATH": "/usr/bin"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    return done.stdout.strip()
