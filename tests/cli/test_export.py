"""A run folder becomes a file for another runtime, or a script that times the network, by one command."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_prune.cli import main, verbs
from tests.cli.modules import MODULE
from tests.support.quick_reports import quick_reports

# Its arguments are in no checkpoint, only in the configuration of the run.
PLAIN = MODULE.replace("self.save_hyperparameters()", "self.hidden = hidden")
FIT = ["--model=mine.Mine", "--model.hidden=12", "--data=Digits", "--data.train_limit=40", "--data.batch_size=20"]
CUT = ["--trainer.callbacks=StructuredPruning", "--trainer.callbacks.pruning_ratio=0.5"]
CUT += ["--trainer.callbacks.schedule=OneShot", "--trainer.callbacks.schedule.at=1", "--trainer.max_epochs=2"]
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has cut half of the hidden units."""
    home = tmp_path_factory.mktemp("runs")
    (home / "mine.py").write_text(PLAIN)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.syspath_prepend(str(home))
        patch.delitem(sys.modules, "mine", raising=False)
        quick_reports(patch)
        patch.setattr(verbs, "find_spec", lambda name: None)  # W&B takes seconds to start
        main(["fit", *FIT, *CUT, *QUIET])
        patch.delitem(sys.modules, "mine")
    return home / "runs/Mine/001"


@pytest.fixture(autouse=True)
def _here(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.parents[2])
    monkeypatch.syspath_prepend(str(run.parents[2]))


def weights(run: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    return found


@pytest.mark.parametrize("checkpoint", ["last", "runs/Mine/001/checkpoints/last.ckpt"])
def test_the_file_computes_what_the_checkpoint_holds(
    checkpoint: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "small.pt2"
    main(["export", f"--config={run}/config.yaml", f"--ckpt_path={checkpoint}", f"--file={file}"])
    stored = weights(run)
    assert stored["first.weight"].shape == (6, 64)
    images = torch.randn(3, 1, 8, 8)
    hidden = nn.functional.linear(images.flatten(1), stored["first.weight"], stored["first.bias"]).relu()
    expected = nn.functional.linear(hidden, stored["second.weight"], stored["second.bias"])
    torch.testing.assert_close(torch.export.load(file).module()(images), expected)
    shown = capsys.readouterr().out
    assert "dense" in shown
    assert "on 20 samples" in " ".join(shown.split())
    assert [path.name for path in run.parent.iterdir()] == ["001"]
    assert not (run / "export").exists()


def test_a_script_for_the_device(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "timing.py"
    main(["latency_script", f"--config={run}/config.yaml", "--ckpt_path=last", f"--file={file}"])
    assert f"Latency script: {file}" in capsys.readouterr().out
    spec = json.loads(file.read_text().partition('SPEC = json.loads(r"""')[2].partition('"""')[0])
    assert spec["runtime"] == "torch"
    assert {entry["widths"]["first"] for entry in spec["networks"]} <= set(range(1, 7))


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["--ckpt_path=last"], "export: expected --file, got none."),
        (["--file=a.pt2"], "export: expected a checkpoint, got none. Give --ckpt_path FILE, or last"),
        (["--file=a.pt2", "--ckpt_path=no.ckpt"], "expected a checkpoint, or last, got no.ckpt, which does not exist"),
        (["--file=a.pt2", "--ckpt_path=best"], "expected a checkpoint, or last, got best"),
        (["--file=a.pt2", "--ckpt_path=last", "--name=other"], "a last.ckpt, found none in runs/other. Give --name"),
        (["--file=a.pt2", "--ckpt_path=weights.pt"], "expected a checkpoint of the Trainer, got 'weights.pt'"),
        (["--file=a.pt2", "--ckpt_path=last", "--model.hidden=11"], "first.weight"),
        (["--file=a.pt3", "--ckpt_path=last"], "expected a file whose suffix is one of `.onnx`"),
        (["--file=no/a.pt2", "--ckpt_path=last"], "expected a folder for a.pt2, got 'no'"),
        (["--file=a.pte", "--ckpt_path=last"], "It belongs to the extra `executorch`: pip install"),
    ],
)
def test_refusals(
    words: list[str], answer: str, run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(weights(run), "weights.pt")
    monkeypatch.setitem(sys.modules, "executorch", None)  # as where it is not installed
    before = {path: path.stat().st_mtime_ns for path in run.parents[2].rglob("*") if "__pycache__" not in str(path)}
    with pytest.raises(SystemExit):
        main(["export", f"--config={run}/config.yaml", *words])
    assert answer in capsys.readouterr().err
    after = {path: path.stat().st_mtime_ns for path in run.parents[2].rglob("*") if "__pycache__" not in str(path)}
    assert after == before
