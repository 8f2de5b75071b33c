"""Mistakes end in one line that says what was expected, what came and what to do."""

from __future__ import annotations

import logging
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_prune.cli import main, verbs
from lightning_prune.cli.messages import in_one_line, near
from tests.cli.mistakes import FILES, MISTAKES, PAGE, Mistake, page

DIGITS = "--config digits_mlp_contribution --data.train_limit 60"


@pytest.fixture(autouse=True)
def _ready(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))  # the command adds the current folder
    monkeypatch.setattr(verbs, "find_spec", lambda name: None)  # W&B takes seconds to start; test_verbs has it
    for name, text in FILES.items():
        (in_tmp / name).write_text(text)
    for module in ("mine", "broken", "needing"):
        monkeypatch.delitem(sys.modules, module, raising=False)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
@pytest.mark.filterwarnings("ignore:.*is called with Trainer configured with multiple `ModelCheckpoint`")
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("mistake", MISTAKES, ids=[one.words or "nothing" for one in MISTAKES])
def test_what_is_said(mistake: Mistake, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, "lightning")  # what the run says before
    with pytest.raises(SystemExit) as end:
        main(shlex.split(mistake.words.replace("DIGITS", DIGITS)))
    assert end.value.code == 2
    said = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("INFO: ")]
    assert said == [f"lightning-prune: {mistake.answer}"]
    assert not list(Path.cwd().glob("runs/*/*")), "the folder of a run that did not begin"


def test_there_are_forty() -> None:
    assert len({one.words for one in MISTAKES}) == len(MISTAKES) >= 40


def test_the_page_has_them_all() -> None:
    assert PAGE.read_text() == page(), "run `python -m tests.cli.mistakes`"


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(ValueError, match="expected an option"):
        main(["--debug", "fit", *shlex.split(DIGITS), "--nonsense"])


def test_the_line_of_ones_own_code_is_named(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Lightning raises it, a line of the user's made it."""
    (in_tmp / "failing.py").write_text(FILES["mine.py"].replace('"val_acc", (', '"val_acc", "high" or ('))
    with pytest.raises(SystemExit):
        main(["fit", *shlex.split(DIGITS), "--model=failing.Mine", "--trainer.enable_progress_bar=false"])
    line = next(n for n, text in enumerate((in_tmp / "failing.py").read_text().splitlines(), 1) if "high" in text)
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"(failing.py, line {line})")


@pytest.mark.parametrize(
    ("word", "known", "expected"),
    [
        ("--lr", ["--model.lr", "--optimizer.lr", "--lr_scheduler"], " Did you mean --model.lr or --optimizer.lr?"),
        ("digits", ["digits_mlp", "mnist"], " Did you mean digits_mlp?"),
        ("xyz", ["abc"], ""),
        ("xyz", [], ""),
    ],
)
def test_what_might_have_been_meant(word: str, known: list[str], expected: str) -> None:
    assert near(word, known) == expected


def test_faults_of_code_are_not_said_in_one_line() -> None:
    """Not even those of this package: `AssertionError` is one."""
    with pytest.raises(ZeroDivisionError) as fault:
        1 / 0  # noqa: B018
    assert in_one_line(fault.value) is None


def test_the_module_is_a_command(in_tmp: Path) -> None:
    """``python -m lightning_prune``, without waiting for Lightning."""
    command = [sys.executable, "-X", "importtime", "-m", "lightning_prune", "fitt"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=in_tmp, check=False)
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].startswith("lightning-prune: expected a command, got 'fitt'.")
    assert "lightning.pytorch" not in ended.stderr
