"""Methods that act once: at the first training batch, with all that is there then, and never a second time."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from lightning_prune import AtStart, LinearSchedule, MagnitudePruning, OneShot, Ridge, load_from_checkpoint
from lightning_prune.callbacks import Decision, NetworkPruning, live_transaction
from lightning_prune.callbacks.lightning.averages import averages
from lightning_prune.callbacks.lightning.processes import broadcast_plan
from lightning_prune.planning import CutPoint, Plan
from lightning_prune.scoring import DataPass
from lightning_prune.structure import Size, Structure
from lightning_prune.surgery import Transaction, history_of, masks_of, spec_of
from tests.callbacks import ranked
from tests.callbacks.contents import untimed
from tests.callbacks.networks import BATCH, BATCHES, Net, equal, fit, loader, make, refit, samples, trainer, weights
from tests.support import ranks

EPOCHS = 4


@dataclass(frozen=True)
class WithHead(Decision):
    """Units to keep, and what the head becomes."""

    bias: torch.Tensor = field(default_factory=lambda: torch.arange(3.0))


class Variance(NetworkPruning):
    """Keeps the half of `first` that varies most over the training data; may give the network a new head, too."""

    acts_once = True

    def __init__(self, schedule: Any = None, head: bool = False, extensions: Any = None) -> None:
        self.head = head
        self.seen: list[dict[str, Any]] = []
        super().__init__(schedule, None, None, True, None, extensions)

    def _check(
        self, trainer: Trainer, module: LightningModule, batch: Any, structure: Structure, original: Size
    ) -> tuple[CutPoint, ...]:
        assert structure.widths["first"] in (6, 12)
        return self._moments(trainer)

    def _decide(self, trainer: Trainer, module: LightningModule, point: CutPoint) -> Decision:
        found: list[torch.Tensor] = []
        layer = module.get_submodule("first")
        hook = layer.register_forward_hook(lambda _, __, out: found.append(out))
        data = DataPass(trainer.train_dataloader, batch_size=BATCH)  # each process has a loader of its own
        data.run(module)
        hook.remove()
        everything = trainer.strategy.reduce(torch.cat(found).double().square().sum(0), reduce_op="sum")
        self.seen.append(
            {
                "samples": len(data),
                "step": trainer.global_step,
                "batch": trainer.fit_loop.epoch_loop.batch_idx,
                "optimizers": len(trainer.optimizers),
                "copies": len(averages(trainer)),
            }
        )
        kept = tuple(sorted(everything.argsort(descending=True)[:6].tolist()))
        return WithHead(broadcast_plan(trainer, Plan({"first": kept}, {"first": 12})))

    def _change(self, change: Transaction, trainer: Trainer, module: LightningModule, decision: Decision) -> Structure:
        after = super()._change(change, trainer, module, decision)
        if self.head and isinstance(decision, WithHead):
            head = {"head": spec_of(module.get_submodule("head"))}
            after = change.replace(head, self._retrace(trainer), after)
            change.install({"head.bias": decision.bias})
        return after


class First(Callback):
    """What the network is when the first training step begins."""

    def __init__(self) -> None:
        self.width: int | None = None

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.width = self.width or pl_module.first.out_features


class SaveAt(Callback):
    """Saves a checkpoint once, in a hook."""

    def __init__(self, hook: str, path: Path, step: int = 0) -> None:
        self.path, self.step = path, step
        vars(self)[hook] = self.save

    def save(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.step and not self.path.exists():
            trainer.save_checkpoint(self.path)


def content(run: Any, model: Any, pruner: NetworkPruning) -> dict[str, Any]:
    history = history_of(model)
    assert history is not None
    return {
        "weights": weights(model),
        "optimizers": [optimizer.state_dict() for optimizer in run.optimizers],
        "history": history.to_plain(),
        "cuts": untimed(pruner.report.to_plain())["cuts"],
        "done": pruner.state_dict()["done"],
    }


def test_all_is_there_and_no_step_is_made(tmp_path: Path) -> None:
    pruner, first, model = Variance(), First(), make()
    run = fit(tmp_path, model, pruner, EMAWeightAveraging(), first, epochs=EPOCHS)
    assert pruner.schedule == AtStart()
    assert pruner.seen == [{"samples": BATCHES * BATCH, "step": 0, "batch": 0, "optimizers": 1, "copies": 1}]
    assert first.width == 6
    assert averages(run)[0].first.out_features == 6
    assert [(cut.index, cut.epoch, cut.step) for cut in pruner.report.cuts] == [(0, 0, 0)]
    assert pruner.report.dense is not None
    assert pruner.report.dense.widths["first"] == 12


#: When the checkpoint is saved: hook, step, and whether the method has acted by then.
SAVED = {
    "before anything": ("on_train_start", 0, False),
    "right after it has acted": ("on_train_batch_start", 0, True),
    "after one step": ("on_train_batch_end", 1, True),
    "in the middle of an epoch": ("on_train_batch_end", BATCHES + 2, True),
    "at the end of an epoch": ("on_train_epoch_end", 2 * BATCHES, True),
}


@pytest.mark.parametrize("head", [False, True], ids=["units", "units and a new head"])
@pytest.mark.parametrize("when", SAVED)
def test_a_resumed_run_does_not_act_again(when: str, head: bool, tmp_path: Path) -> None:
    hook, step, acted = SAVED[when]
    pruner, model, file = Variance(head=head), make(Net, "adamw"), tmp_path / "saved.ckpt"
    # The suite's loader takes a batch that has begun as one that is over; Lightning begins it again.
    data = DataLoader(samples(), batch_size=BATCH) if when == "right after it has acted" else None
    saver = SaveAt(hook, file, step)
    run = fit(tmp_path / "whole", model, pruner, saver, data=data, epochs=EPOCHS, validate=False)
    expected = content(run, model, pruner)
    again, model = Variance(head=head), make(Net, "adamw")
    torch.nn.init.zeros_(model.first.weight)
    run = fit(tmp_path / "again", model, again, data=data, epochs=EPOCHS, validate=False, ckpt_path=file)
    assert len(again.seen) == (0 if acted else 1)
    found = content(run, model, again)
    assert [part for part in expected if not equal(found[part], expected[part])] == []
    if acted:
        assert load_from_checkpoint(Net, file).first.out_features == 6


def test_a_new_head_follows_everywhere(tmp_path: Path) -> None:
    """Masks of another callback are laid on the network as it is then."""
    pruner, model = Variance(head=True), make()
    masks = MagnitudePruning(0.5, schedule=OneShot(at=2))
    before = model.head
    run = fit(tmp_path, model, masks, pruner, EMAWeightAveraging(), epochs=EPOCHS)
    assert model.head is not before
    assert any(p is model.head.weight for group in run.optimizers[0].param_groups for p in group["params"])
    assert not torch.equal(model.head.bias, torch.arange(3.0)), "the new head does not train"
    (copy,) = averages(run)
    assert (copy.first.out_features, model.second.in_features) == (6, 6)
    assert {name: mask.shape for name, mask in masks_of(model).items()} == {
        f"{name}.weight": model.get_submodule(name).weight.shape for name in ("first", "second", "head")
    }
    assert len(masks.report.cuts) == 1
    assert len(pruner.report.cuts) == 1


class Wider(Variance):
    """Gives the network a head for five classes before it cuts."""

    def _change(self, change: Transaction, trainer: Trainer, module: LightningModule, decision: Decision) -> Structure:
        head = {"head": spec_of(module.get_submodule("head"), out_features=5)}
        wide = change.replace(head, self._retrace(trainer), new_dense=True)
        return self._keep(change, trainer, module, decision, wide)


@pytest.mark.parametrize("fails", [False, True])
def test_the_dense_network_is_the_one_with_its_new_head(fails: bool, tmp_path: Path, monkeypatch: Any) -> None:
    pruner, model = Wider(extensions=[Ridge(batches=2)]), make()
    if fails:
        monkeypatch.setattr(live_transaction, "assert_same_parameters", lambda _: 1 / 0)
        before = weights(model)
        with pytest.raises(ZeroDivisionError):
            fit(tmp_path, model, pruner, epochs=1)
        assert equal(weights(model), before)
        assert (history_of(model), pruner.report.cuts, model.head.out_features) == (None, [], 3)
        assert pruner.report.dense is not None
        assert pruner.report.dense.params == sum(value.numel() for value in make().parameters())
        return
    fit(tmp_path, model, pruner, epochs=2)
    dense = make()
    dense.head = nn.Linear(8, 5)
    assert pruner.report.dense is not None
    assert pruner.report.dense.params == sum(value.numel() for value in dense.parameters())
    assert pruner.report.final is not None
    assert pruner.report.final.params == sum(value.numel() for value in model.parameters())
    assert (model.first.out_features, model.head.out_features) == (6, 5)
    assert pruner.report.pruning_ratio == pytest.approx(6 / 20)


def test_repairs_go_with_it(tmp_path: Path) -> None:
    found = []
    for number, extensions in enumerate(([], [Ridge(batches=2)])):
        file = tmp_path / f"{number}.ckpt"
        fit(tmp_path, make(), Variance(extensions=extensions), SaveAt("on_train_batch_start", file), epochs=1)
        found.append(torch.load(file, weights_only=True)["state_dict"])
    plain, repaired = found
    assert torch.equal(plain["first.weight"], repaired["first.weight"])
    assert not torch.equal(plain["second.weight"], repaired["second.weight"])


def test_a_rehearsal_checks_and_does_not_act(tmp_path: Path) -> None:
    pruner, model = Variance(), make()
    fit(tmp_path, model, pruner, fast_dev_run=2)
    assert pruner.structure is not None
    assert (pruner.seen, model.first.out_features, history_of(model)) == ([], 12, None)


def test_overfitting_to_some_batches(tmp_path: Path) -> None:
    pruner, model = Variance(), make()
    fit(tmp_path, model, pruner, epochs=2, overfit_batches=2)
    assert len(pruner.seen) == 1
    assert model.first.out_features == 6


class Data(LightningDataModule):
    def train_dataloader(self) -> Any:
        return loader()

    def val_dataloader(self) -> Any:
        return loader(2)


def test_a_data_module_gives_the_same(tmp_path: Path) -> None:
    ends = []
    for name in ("loaders", "module"):
        pruner, model = Variance(), make()
        run = trainer(tmp_path / name, pruner, epochs=2)
        if name == "loaders":
            refit(run, model)
        else:
            run.fit(model, datamodule=Data())
        ends.append(content(run, model, pruner))
    assert [part for part in ends[0] if not equal(ends[0][part], ends[1][part])] == []


def test_a_later_moment(tmp_path: Path) -> None:
    pruner, model = Variance(OneShot(at=2)), make()
    saver = ModelCheckpoint(tmp_path / "ends", filename="{epoch}", save_top_k=-1)
    run = fit(tmp_path / "whole", model, pruner, saver, epochs=EPOCHS, validate=False)
    expected = content(run, model, pruner)
    assert [(cut.epoch, cut.step) for cut in pruner.report.cuts] == [(2, 2 * BATCHES)]
    for epoch, acts in ((1, 1), (2, 0)):
        again, model = Variance(OneShot(at=2)), make()
        file = tmp_path / "ends" / f"epoch={epoch}.ckpt"
        run = fit(tmp_path / "again", model, again, epochs=EPOCHS, validate=False, ckpt_path=file)
        assert len(again.seen) == acts
        found = content(run, model, again)
        assert [part for part in expected if not equal(found[part], expected[part])] == []


def test_several_moments_are_refused(tmp_path: Path) -> None:
    model = make()
    with pytest.raises(ValueError, match="expected a `schedule` with one moment, got 2: it acts once"):
        fit(tmp_path, model, Variance(LinearSchedule(1, 2, cuts=2)), epochs=EPOCHS)
    assert model.first.out_features == 12


def test_another_fit_of_the_same_trainer_does_not_act_again(tmp_path: Path) -> None:
    pruner, model = Variance(), make()
    run = fit(tmp_path, model, pruner, epochs=2)
    run.fit_loop.max_epochs = 3
    refit(run, model)
    assert len(pruner.seen) == 1
    # Another Trainer begins another run.
    wide = make()
    fit(tmp_path / "other", wide, pruner, epochs=2)
    assert (len(pruner.seen), wide.first.out_features) == (2, 6)


class Plain(Net):
    """Without batch norm, in float64: nothing but rounding depends on how a batch is split."""

    def __init__(self) -> None:
        super().__init__("adamw", norm=False, example=False)
        self.double()


def once(folder: Path, *, resume: bool = False) -> dict[str, Any]:
    """As every process makes it."""
    processes = ranked.processes()
    options = {"devices": processes, "strategy": "ddp", "use_distributed_sampler": False} if processes > 1 else {}
    model, pruner = make(Plain), Variance(head=True)
    saver = ModelCheckpoint(folder / "steps", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    run = fit(
        folder, model, pruner, saver, data=ranked.share(), validate=False, epochs=EPOCHS,
        ckpt_path=folder / "steps" / f"step={BATCHES + 1}.ckpt" if resume else None, **options,
    )  # fmt: skip
    return {**content(run, model, pruner), "acted": len(pruner.seen), "modules": isinstance(model.head, nn.Linear)}


def once_and_resumed(folder: Path) -> list[dict[str, Any]]:
    return [once(folder, resume=resume) for resume in (False, True)]


@pytest.mark.ddp
def test_two_processes_are_one(tmp_path: Path) -> None:
    alone = ranks.run(once, tmp_path / "one")
    for two, acted in zip(ranks.run(once_and_resumed, tmp_path / "two", processes=2), (1, 0), strict=True):
        assert (two["acted"], len(two["history"]["edits"])) == (acted, len(alone["history"]["edits"]))
        assert equal(two["history"]["edits"][0]["kept"], alone["history"]["edits"][0]["kept"])
        for name, value in alone["weights"].items():
            torch.testing.assert_close(two["weights"][name], value, rtol=1e-10, atol=1e-12)
