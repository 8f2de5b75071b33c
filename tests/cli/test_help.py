"""Help: twenty options that matter, and all of them on request."""

from __future__ import annotations

import pytest

from lightning_prune.cli import main
from lightning_prune.cli.help import FIRST

WRITTEN = {
    "export": ["--file"],
    "quantise": ["--file", "--samples"],
    "latency_script": ["--file", "--runtime"],
}
OPTIONS = [option for title, known in FIRST.items() for option in known if title != "What is written"]


def shown(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as end:
        main(words)
    assert not end.value.code
    return capsys.readouterr().out


@pytest.mark.parametrize("word", ["-h", "--help"])
def test_twenty_options_come_first(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(["fit", word], capsys)
    assert text.startswith("usage: lightning-prune fit --config RECIPE")
    assert len(OPTIONS) == 20
    for option in OPTIONS:
        assert f"\n  {option} " in text
    assert len(text.splitlines()) < 50
    assert "--help-all" in text


@pytest.mark.parametrize("command", WRITTEN)
def test_commands_that_write_a_file(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown([command, "--help"], capsys)
    for option in OPTIONS + WRITTEN[command]:
        assert f"\n  {option} " in text
    for option in ("--runtime", "--samples"):
        assert (option in text) == (option in WRITTEN[command])


def test_all_options_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(["fit", "--help-all"], capsys)
    for option in (*OPTIONS, "--trainer.barebones", "--model.help", "--print_config"):
        assert f"  {option}" in text or f", {option} " in text, option
    assert len(text.splitlines()) > 300


def test_of_all_commands(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(["--help"], capsys)
    assert text.startswith("usage: lightning-prune ")
    for command in (
        "fit",
        "validate",
        "test",
        "predict",
        "inspect",
        "score",
        "export",
        "quantise",
        "recipes",
        "compare",
        "study",
    ):
        assert command in text
