"""A run folder becomes a file for another runtime, or a script that times the network, by one command."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from lightning_prune.cli import main, verbs
from lightning_prune.data import Digits
from tests.cli.modules import MODULE
from tests.support.quick_reports import quick_reports

# Its arguments are in no checkpoint, only in the configuration of the run.
PLAIN = MODULE.replace("self.save_hyperparameters()", "self.hidden = hidden")
FIT = ["--model=mine.Mine", "--model.hidden=12", "--data=Digits", "--data.train_limit=40", "--data.batch_size=20"]
CUT = ["--trainer.callbacks=StructuredPruning", "--trainer.callbacks.pruning_ratio=0.5"]
CUT += ["--trainer.callbacks.schedule=OneShot", "--trainer.callbacks.schedule.at=1", "--trainer.max_epochs=2"]
# Has its own data.
OWN = """
from lightning_prune.data import Digits


class Own(Mine):
    data = Digits(train_limit=40, batch_size=20)

    def setup(self, stage):
        self.data.setup(stage)

    def train_dataloader(self):
        return self.data.train_dataloader()

    def val_dataloader(self):
        return self.data.val_dataloader()
"""
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has cut half of the hidden units."""
    home = tmp_path_factory.mktemp("runs")
    (home / "mine.py").write_text(PLAIN + OWN)
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


def test_eight_bits(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, own = tmp_path / "small.onnx", ["--model=mine.Own", "--model.hidden=12", "--data=null"]
    limits = ["--samples=30", "--trainer.limit_val_batches=0.3"]
    main(["quantise", f"--config={run}/config.yaml", "--ckpt_path=last", f"--file={file}", *own, *limits])
    assert [*tmp_path.iterdir()] == [file]
    stored, data = weights(run), Digits(batch_size=40)
    data.setup("validate")
    images, labels = next(iter(data.val_dataloader()))
    hidden = nn.functional.linear(images.flatten(1), stored["first.weight"], stored["first.bias"]).relu()
    expected = nn.functional.linear(hidden, stored["second.weight"], stored["second.bias"])
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    found = torch.as_tensor(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0])
    torch.testing.assert_close(found, expected, atol=0.05 * float(expected.abs().max()), rtol=0)
    assert not torch.equal(found, expected)
    shown = " ".join(capsys.readouterr().out.split())
    assert "40 test samples" in shown
    assert "Ranges of the integers from 30 samples." in shown
    for name, outputs in (("pruned", expected), ("pruned, quantised", found)):
        assert f" {name} {100 * float((outputs.argmax(1) == labels).float().mean()):.2f} " in shown
    assert not (run / "quantise").exists()


def test_eight_bits_of_training_with_them(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    ranges = {"first": [-1.0, 1.0], "second": [0.0, 9.0]}
    rounding = {"format": 1, "weight_bits": 4, "ranges": ranges}
    checkpoint["callbacks"]["QuantisationAware"] = {"format": 1, "rounding": rounding}
    torch.save(checkpoint, "rounded.ckpt")
    file = tmp_path / "small.onnx"
    main(["quantise", f"--config={run}/config.yaml", "--ckpt_path=rounded.ckpt", f"--file={file}"])
    assert onnx.TensorProto.INT4 in {tensor.data_type for tensor in onnx.load(file).graph.initializer}
    shown = " ".join(capsys.readouterr().out.split())
    assert "Ranges of the integers from quantisation-aware training" in shown
    assert "359 test samples" in shown


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
        ("export --ckpt_path=last", "export: expected --file, got none."),
        ("export --file=a.pt2", "export: expected a checkpoint, got none. Give --ckpt_path FILE, or last"),
        (
            "export --file=a.pt2 --ckpt_path=no.ckpt",
            "expected a checkpoint, or last, got no.ckpt, which does not exist",
        ),
        ("export --file=a.pt2 --ckpt_path=best", "expected a checkpoint, or last, got best"),
        ("export --file=a.pt2 --ckpt_path=last --name=other", "a last.ckpt, found none in runs/other. Give --name"),
        ("export --file=a.pt2 --ckpt_path=weights.pt", "expected a checkpoint of the Trainer, got 'weights.pt'"),
        ("export --file=a.pt2 --ckpt_path=last --model.hidden=11", "first.weight"),
        ("export --file=a.pt3 --ckpt_path=last", "expected a file whose suffix is one of `.onnx`"),
        ("export --file=no/a.pt2 --ckpt_path=last", "expected a folder for a.pt2, got 'no'"),
        ("export --file=a.pte --ckpt_path=last", "It belongs to the extra `executorch`: pip install"),
        ("quantise --ckpt_path=last", "quantise: expected --file, got none."),
        ("quantise --file=a.onnx", "quantise: expected a checkpoint, got none. Give --ckpt_path FILE, or last"),
        ("quantise --file=a.onnx --ckpt_path=last --samples=0", "expected `samples` of at least 1, got 0."),
        ("quantise --file=a.onnx --ckpt_path=last --data=null", "expected data for training, and for the test or"),
        ("quantise --file=a.pt2 --ckpt_path=last", "expected a file with the suffix `.onnx`, got 'a.pt2'"),
        ("quantise --file=a.onnx --ckpt_path=last", "It belongs to the extra `export`: pip install"),
    ],
)
def test_refusals(
    words: str, answer: str, run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command, *options = words.split()
    torch.save(weights(run), "weights.pt")
    for package in ("executorch", "onnxscript"):
        monkeypatch.setitem(sys.modules, package, None)  # as where it is not installed
    before = {path: path.stat().st_mtime_ns for path in run.parents[2].rglob("*") if "__pycache__" not in str(path)}
    with pytest.raises(SystemExit):
        main([command, f"--config={run}/config.yaml", *options])
    assert answer in capsys.readouterr().err
    after = {path: path.stat().st_mtime_ns for path in run.parents[2].rglob("*") if "__pycache__" not in str(path)}
    assert after == before
