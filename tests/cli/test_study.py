"""``lightning-prune study`` from its definition to its page, with real runs in this process."""

from __future__ import annotations

import csv
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightning_prune.cli import main, study, verbs
from lightning_prune.models import CNNClassifier
from lightning_prune.study import InitialNetwork
from lightning_prune.study.configurations import preparations, prior, run
from lightning_prune.study.definition import load
from lightning_prune.study.store import Store
from lightning_prune.study.training import Task, work
from lightning_prune.surgery import History, history_of
from tests.study.definitions import DEFINITION
from tests.study.networks import cut_network
from tests.study.surfaces import Inline


@pytest.fixture(autouse=True)
def _here(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (in_tmp / "small.yaml").write_text(DEFINITION)
    monkeypatch.setattr(study, "launcher_of", lambda *_: Inline())


def test_a_study_from_definition_to_page(capsys: pytest.CaptureFixture[str]) -> None:
    main(["study", "run", "small.yaml"])
    assert "18/18" in capsys.readouterr().out
    with Path("runs/small/table.csv").open() as stream:
        table = list(csv.DictReader(stream))
    assert [row["variant"] for row in table] == ["unpruned"] * 9 + ["50% uniform"] * 9
    sizes = {(row["variant"], int(row["macs"])) for row in table}
    assert len(sizes) == 2, "one architecture for all runs of a variant"
    (_, pruned), (_, dense) = sorted(sizes)
    assert pruned / dense == pytest.approx(0.5, abs=0.1)
    cell = Path("runs/small/cells") / table[-1]["key"]
    assert yaml.safe_load((cell / "config.yaml").read_text())["model"]["init_args"]["lr"] == float(
        table[-1]["model.lr"]
    )
    assert not list(Path("runs/small").glob("cells/*/fit/*/checkpoints"))
    main(["study", "run", "small.yaml"])
    assert "to do" not in capsys.readouterr().out
    main(["study", "report", "small.yaml"])
    assert Path("runs/small/report/report.html").read_text().count("<img ") == 3
    main(["study", "report", "small.yaml", "--table", "runs/small/table.csv", "--out", "elsewhere"])
    assert Path("elsewhere/report.md").read_text() == Path("runs/small/report/report.md").read_text()


def test_an_unknown_key_is_refused_before_anything_runs(capsys: pytest.CaptureFixture[str]) -> None:
    Path("small.yaml").write_text(DEFINITION.replace("model.lr:", "model.rate:"))
    with pytest.raises(SystemExit) as end:
        main(["study", "run", "small.yaml"])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert "the configuration of 'unpruned' is refused by `fit`" in error
    assert "rate" in error
    assert not Path("runs").exists()


@pytest.mark.parametrize("pipeline", ["scratch", "training"])
def test_a_killed_run_is_resumed_and_comes_to_the_same(pipeline: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after its first epoch of three: the second start goes on from the checkpoint."""
    Path("small.yaml").write_text(DEFINITION.replace("max_epochs: 1", "max_epochs: 3"))
    found = load(Path("small.yaml"))
    found = replace(found, variants=(found.unpruned, replace(found.variants[1], pipeline=pipeline)))
    cell = run(found, found.variants[1], (0, 1), 1)
    for need in (*(first for each in cell.needs for first in each.needs), *cell.needs):
        work(Task(Path("undisturbed"), need, verbs.run, "val_acc"))
    work(Task(Path("undisturbed"), cell, verbs.run, "val_acc"))
    shutil.copytree("undisturbed", "killed")
    shutil.rmtree(Store(Path("killed")).finished(cell))
    steps, training_step, resumed = iter(range(1000)), CNNClassifier.training_step, []

    class Killed(BaseException):
        """In place of a signal."""

    def step(self: CNNClassifier, batch: Any, batch_idx: int) -> torch.Tensor:
        if next(steps) == 3:
            raise Killed
        resumed.append((self.current_epoch, batch_idx))
        return training_step(self, batch, batch_idx)

    monkeypatch.setattr(CNNClassifier, "training_step", step)
    with pytest.raises(Killed):
        work(Task(Path("killed"), cell, verbs.run, "val_acc"))
    work(Task(Path("killed"), cell, verbs.run, "val_acc"))
    # Two batches an epoch: the second epoch begins again, the first does not. (Cutting traces the step as well.)
    assert pipeline == "training" or resumed == [(0, 0), (0, 1), (1, 0), (1, 0), (1, 1), (2, 0), (2, 1)]
    one, other = (Store(Path(folder)).result(cell) for folder in ("undisturbed", "killed"))
    assert one is not None
    assert other is not None
    assert replace(one, seconds=0.0) == replace(other, seconds=0.0)
    assert len(one.curve) == 3


@pytest.mark.slow
def test_every_pipeline_is_run() -> None:
    """Fine-tuning, rewinds to the beginning and to an epoch, and cuts within each run, each beside the prior."""
    pipelines = (
        "{remaining: 0.5, pipeline: [finetune, initialisation, training]}",
        "{remaining: 0.5, pipeline: rewind, epoch: [0, 1]}",
    )
    text = DEFINITION.replace("- {remaining: 0.5}", "\n  - ".join(["", *pipelines])).replace(
        "max_epochs: 1", "max_epochs: 2"
    )
    Path("small.yaml").write_text(text)
    found, store = load(Path("small.yaml")), Store(Path("cells"))
    weights, cuts = preparations(found)
    for cell in (*weights, *cuts, *(run(found, variant, (0, 1), 0) for variant in found.variants[1:])):
        work(Task(Path("cells"), cell, verbs.run, "val_acc"))
        assert store.failure(cell) is None
    trained = store.result(prior(found))
    assert trained is not None
    for variant in found.variants[1:]:
        result = store.result(run(found, variant, (0, 1), 0))
        assert result is not None
        assert result.macs / trained.macs == pytest.approx(0.5, abs=0.1)
        assert len(result.curve) == 2
    names = [variant.name.removeprefix("50% uniform ") for variant in found.variants[1:]]
    assert names == ["finetune", "initialisation", "training", "rewind 0", "rewind 1"]


def test_the_last_number_of_a_run_that_diverged_counts() -> None:
    """A metric that is no number in the end stands as it last was; a run in which it never was one has failed."""

    class Logs:
        def __init__(self, *accuracies: float) -> None:
            self.accuracies = accuracies

        def __call__(self, _: Any, callbacks: Any) -> None:
            (recorder,) = callbacks
            recorder.diverged = True
            recorder.curve += [{"val_acc": a} if math.isfinite(a) else {"val_loss": 1.0} for a in self.accuracies]

    found = load(Path("small.yaml"))
    cells = [run(found, found.unpruned, (0, n), 0) for n in (0, 1)]
    for cell, accuracies in zip(cells, [(0.5, math.nan), (math.nan, math.nan)], strict=True):
        work(Task(Path("cells"), cell, Logs(*accuracies), "val_acc"))
    store = Store(Path("cells"))
    first = store.result(cells[0])
    assert first is not None
    assert (first.metrics["val_acc"], first.diverged) == (0.5, True)
    assert "'val_acc' was never a number: the run diverged" in str(store.failure(cells[1]))


def test_the_initial_network(tmp_path: Path) -> None:
    """New weights by seed, kept weights, and the kept units of both, equal to slices of the dense network."""
    dense, narrow = cut_network()
    torch.save({"state_dict": dense.state_dict()}, tmp_path / "dense.ckpt")
    history = history_of(narrow)
    assert isinstance(history, History)
    torch.save(history.to_plain(), tmp_path / "architecture.pt")
    files = {"weights": str(tmp_path / "dense.ckpt"), "architecture": str(tmp_path / "architecture.pt")}

    def started(**arguments: object) -> CNNClassifier:
        torch.manual_seed(5)
        module = CNNClassifier((1, 8, 8), channels=(4, 6), hidden=(8, 8))
        InitialNetwork(**arguments).setup(None, module, "fit")  # type: ignore[arg-type]
        return module

    kept, new = started(**files), started(architecture=files["architecture"], seed=3)
    for name, tensor in narrow.state_dict().items():
        assert torch.equal(kept.state_dict()[name], tensor)
        assert new.state_dict()[name].shape == tensor.shape
    again, other = (
        started(architecture=files["architecture"], seed=3),
        started(architecture=files["architecture"], seed=4),
    )
    assert torch.equal(new.features[0].weight, again.features[0].weight)
    assert not torch.equal(new.features[0].weight, other.features[0].weight)
    rewound, begun = started(architecture=files["architecture"], seed=3, dense=True), started(seed=3)
    torch.save({"state_dict": begun.state_dict()}, tmp_path / "begun.ckpt")
    sliced = started(architecture=files["architecture"], weights=str(tmp_path / "begun.ckpt"))
    for name, tensor in sliced.state_dict().items():
        assert torch.equal(rewound.state_dict()[name], tensor), "a rewind to epoch 0"
    spread = (2 / new.classifier[1].in_features) ** 0.5
    assert float(new.classifier[1].weight.detach().std()) == pytest.approx(spread, rel=0.2)
    InitialNetwork(seed=9).setup(None, new, "fit")  # type: ignore[arg-type]
    assert torch.equal(new.features[0].weight, again.features[0].weight), "a narrow network was started before"
