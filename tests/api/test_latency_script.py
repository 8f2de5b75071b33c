"""Latency tables of another device: the script, what it needs, and its table as the measure of budgets."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_prune import Scope, latency_script, prune
from lightning_prune.structure import StructureError, latency
from lightning_prune.structure.time_layers import FORMAT
from lightning_prune.surgery import history_of
from tests.support.planted_times import plant_times, write_table


def network(width: int = 4, kernel: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, width, kernel), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten(1), nn.LazyLinear(2))


def built(width: int = 4, kernel: int = 3) -> nn.Sequential:
    net = network(width, kernel).eval()
    net(EXAMPLE)
    return net


EXAMPLE = torch.zeros(2, 3, 6, 6)

REFUSING = """
import runpy, sys
for name in sys.argv[2].split(","):
    sys.modules[name] = None
script = sys.argv[1]
sys.argv = [script, "--threads", "1", "--out", sys.argv[3]]
runpy.run_path(script, run_name="__main__")
"""


@pytest.mark.parametrize("runtime", ["torch", "onnxruntime"])
def test_the_script_needs_nothing_but_its_runtime(runtime: Any, tmp_path: Path) -> None:
    net = built()
    script, table = tmp_path / "time_layers.py", tmp_path / "table.json"
    latency_script(net, EXAMPLE, str(script), runtime=runtime)
    assert history_of(net) is None
    refused = ["lightning_prune", "lightning", "onnx", *(["torch"] if runtime == "onnxruntime" else ["onnxruntime"])]
    (tmp_path / "run.py").write_text(REFUSING)
    subprocess.run(
        [sys.executable, "run.py", str(script), ",".join(refused), str(table)], cwd=tmp_path, check=True, timeout=300
    )
    stored = json.loads(table.read_text())
    assert runtime in stored["about"]["runtime"]
    assert stored["about"]["versions"].keys() == {runtime}
    assert stored["about"]["threads"] == 1
    report = prune(built(), EXAMPLE, budget={"macs": 0.5}, latency_table=str(table))
    assert report.dense is not None
    assert report.dense.table_latency == pytest.approx(stored["measured"]["networks"][0], rel=0.5)


def test_what_cannot_be_exported_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("no such operator")

    monkeypatch.setattr(torch.export, "export", refuse)
    message = r"Sequential cannot be exported for torch \(RuntimeError: no such operator\). .* `torch.export.export`"
    with pytest.raises(StructureError, match=message):
        latency_script(built(), EXAMPLE, str(tmp_path / "script.py"))
    assert not (tmp_path / "script.py").exists()
    with pytest.raises(ValueError, match='"torch" or "onnxruntime", got \'tflite\''):
        latency_script(built(), EXAMPLE, runtime="tflite")  # type: ignore[arg-type]


def written(folder: Path, per_mac: float = 1e-6, device: str = "phone") -> str:
    return write_table(folder, built(16), EXAMPLE, per_mac, device)


def test_a_budget_is_one_of_the_device_where_the_table_is_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> float:
        raise AssertionError("nothing is measured here")

    monkeypatch.setattr(latency, "median_seconds", refuse)
    net, file = built(16), written(tmp_path)
    report = prune(net, EXAMPLE, budget={"latency_ms": 0.004}, latency_table=file)
    assert report.dense is not None
    assert report.final is not None
    macs = report.final.macs
    assert report.dense.table_latency == pytest.approx(1e-6 * report.dense.macs, rel=0.05)
    assert report.final.table_latency == pytest.approx(1e-6 * macs, rel=0.05)
    assert report.final.table_latency <= 0.004  # type: ignore[operator]
    assert report.notes == ["Latencies by the table are those of phone (onnxruntime (CPUExecutionProvider))."]
    history = history_of(net)
    assert history is not None
    assert history.latency is not None
    assert history.latency.device == "phone (onnxruntime (CPUExecutionProvider))"
    # It stays with the network, and another device's is said.
    prune(net, EXAMPLE, budget={"latency_ms": 0.003})
    with pytest.warns(UserWarning, match=r"with a latency table of phone .* now refer to .*, measured on board"):
        report = prune(net, EXAMPLE, budget={"latency": 0.3}, latency_table=written(tmp_path, 2e-6, "board"))
    assert report.dense is not None
    assert report.dense.table_latency == pytest.approx(2e-6 * report.dense.macs, rel=0.05)
    history = history_of(net)
    assert history is not None
    assert history.latency is not None
    assert history.latency.about["device"] == "board"


def test_a_table_of_a_busy_device_is_noted(tmp_path: Path) -> None:
    file = Path(written(tmp_path))
    stored = json.loads(file.read_text())
    stored["measured"]["networks"][1] *= 3
    file.write_text(json.dumps(stored))
    report = prune(built(16), EXAMPLE, budget={"macs": 0.9}, latency_table=str(file))
    assert re.search(r"table is off by up to \d\d % for .* other programs may have run meanwhile", report.notes[1])


def test_a_budget_that_the_device_cannot_reach(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"1e-06 milliseconds of latency cannot be reached: .* are left"):
        prune(built(16), EXAMPLE, budget={"latency_ms": 1e-6}, latency_table=written(tmp_path))


def edited(**parts: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda stored: {**stored, **parts}


def without_points(stored: dict[str, Any]) -> Any:
    stored["measured"]["kinds"][0].pop()
    return stored


def negative(stored: dict[str, Any]) -> Any:
    stored["measured"]["networks"][0] = -1.0
    return stored


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda _: [1, 2], "is no latency table: expected what a script of `latency_script` has written"),
        (edited(format=FORMAT + 1), f"of format {FORMAT + 1}, {FORMAT} is the last known. Update"),
        (edited(measured=None), "is damaged: it has no measured"),
        (edited(widths={"0": 8}), "of another network, Sequential: its layers or widths differ in 0"),
        (edited(widths={"conv": 16}), "another network, Sequential: its layers or widths differ in 0, conv"),
        (without_points, "times of all widths of each layer"),
        (negative, "expected positive times"),
        (lambda stored: {**stored, "layers": stored["layers"][:1]}, "it has 1 layers, this one 2"),
    ],
)
def test_a_damaged_table_or_one_of_another_network(damage: Any, message: str, tmp_path: Path) -> None:
    file = Path(written(tmp_path))
    file.write_text(json.dumps(damage(json.loads(file.read_text()))))
    net = built(16)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        prune(net, EXAMPLE, budget={"latency": 0.5}, latency_table=str(file))
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_a_table_of_other_layers_or_inputs(tmp_path: Path) -> None:
    file = written(tmp_path)
    net = network(16).eval()
    net(torch.zeros(1, 3, 7, 7))
    with pytest.raises(ValueError, match=r"inputs of another size: size \[6, 6\] there, \[7, 7\] here"):
        prune(net, torch.zeros(1, 3, 7, 7), budget={"latency": 0.5}, latency_table=file)
    with pytest.raises(ValueError, match=r"kernel \[3, 3\] there, \[2, 2\] here"):
        prune(built(16, 2), EXAMPLE, budget={"latency": 0.5}, latency_table=file)


def test_what_is_no_file_or_no_json(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected `latency_table` to be a file .* got 'nowhere.json'"):
        prune(built(), EXAMPLE, budget={"latency": 0.5}, latency_table="nowhere.json")
    (tmp_path / "text.json").write_text("no table")
    with pytest.raises(ValueError, match=r"text.json is no latency table: expected JSON"):
        prune(built(), EXAMPLE, budget={"latency": 0.5}, latency_table=str(tmp_path / "text.json"))
    with pytest.raises(TypeError, match="prune: expected `latency_table`"):
        prune(built(), EXAMPLE, budget={"latency": 0.5}, latency_table=3)  # type: ignore[arg-type]


def test_widths_are_rounded_up_to_the_step_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a layer takes as long with the next multiple of eight, that is what stays."""
    real = latency.fit_table

    def stepped(*given: Any) -> Any:
        table = real(*given)
        layers = tuple(latency.replace(layer, steps=(8, 8)) for layer in table.layers)
        return latency.replace(table, per_byte=0.0, layers=layers)

    plant_times(monkeypatch)
    monkeypatch.setattr(latency, "fit_table", stepped)
    net = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    report = prune(net, torch.zeros(2, 8), budget={"latency": 0.55})
    assert all(width % 8 == 0 for width in report.widths.values())
    assert report.final is not None
    assert report.dense is not None
    assert 0.45 * report.dense.table_latency < report.final.table_latency  # type: ignore[operator]
    assert report.final.table_latency <= 0.55 * report.dense.table_latency  # type: ignore[operator]
    other = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 8))
    prune(other, torch.zeros(2, 8), budget={"latency": 0.65, "units": 37}, scope=Scope(min_width=3))
    assert other[0].out_features == 37, "but no other budget is exceeded for it"
