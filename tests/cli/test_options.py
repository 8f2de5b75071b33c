"""Options of callbacks reach the callback that takes them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightning_prune.cli import main, recipes
from lightning_prune.cli.options import placed

XGB = str(recipes.path("xgb"))
E_U = ["--trainer.callbacks.e_u", "0.05"]


def lists(words: list[str]) -> list[str]:
    """Classes of the callbacks that are given, and the options between them."""
    found = []
    for word in words:
        flag, _, value = word.partition("=")
        if flag.rstrip("+") == "--trainer.callbacks":
            content = json.loads(value)
            found.append((content[0] if isinstance(content, list) else content)["class_path"])
        elif flag.startswith("--trainer.callbacks."):
            found.append(word)
    return found


def test_each_option_is_behind_its_callback() -> None:
    words = ["fit", "--config", XGB, *E_U, "--trainer.callbacks.gain=0.5", "--trainer.max_epochs=3"]
    found = placed(words)
    callbacks = ["XGBPruning", "--trainer.callbacks.gain=0.5"]
    assert lists(found) == [*callbacks, "GradualUnfreezing", E_U[0]]
    assert found[:3] == words[:3]
    assert found[found.index(E_U[0]) + 1] == E_U[1]
    assert found[-1] == "--trainer.max_epochs=3"


def test_options_within_an_argument() -> None:
    words = [f"--config={XGB}", "--trainer.callbacks.surrogate=NeuralProbe", "--trainer.callbacks.surrogate.epochs=5"]
    words += ["--trainer.callbacks.extensions+=Ridge"]
    assert lists(placed(words))[1:4] == words[1:]


@pytest.mark.parametrize(
    "words",
    [
        ["--config", XGB, *E_U],
        ["--config", XGB, "--trainer.callbacks.nonsense=1"],
        ["--config", XGB, "--trainer.callbacks+=LearningRateMonitor", "--trainer.callbacks.gain=0.5"],
        ["--config", "nowhere.yaml", "--trainer.callbacks.gain=0.5"],
        ["--config"],
        [],
    ],
)
def test_what_the_parser_does_by_itself_is_left_to_it(words: list[str]) -> None:
    assert placed(words) == words


def test_files_come_first() -> None:
    """A file that a run has written gives every option a value, and overrode options before it."""
    words = ["test", "--ckpt_path=last", "--config", XGB, *E_U, "-c=other.yaml", "--name", "fit"]
    assert placed(words) == ["test", "--config", XGB, "-c=other.yaml", "--ckpt_path=last", *E_U, "--name", "fit"]
    assert placed(["--config=top.yaml", "fit", "--name=a", "--config"]) == [
        *("--config=top.yaml", "fit", "--config", "--name=a")
    ]


def test_the_last_file_with_callbacks_counts(tmp_path: Path) -> None:
    (tmp_path / "data.yaml").write_text("data: {class_path: Digits}\n")
    words = ["--config", str(recipes.path("unfreeze")), "--config", XGB, "--config", str(tmp_path / "data.yaml")]
    found = placed([*words, "--trainer.callbacks.depth=0.1"])
    assert found[:4] == words[:4]
    assert "XGBPruning" in lists(found)


def test_a_run_gets_both(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["fit", "--config", "flowers_resnet20", "--config", "xgb", "--data.root=flowers", "--print_config", *E_U]
    with pytest.raises(SystemExit):
        main([*words, "--trainer.callbacks.gain=null", "--trainer.callbacks.threshold=0.25"])
    printed = capsys.readouterr().out
    for line in ("gain: null", "threshold: 0.25", "e_u: 0.05", "samples: 3000"):
        assert f"      {line}\n" in printed
