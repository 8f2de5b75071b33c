"""The script that times layers elsewhere: it runs them in their shapes, and goes on where it was stopped."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from lightning_prune.structure import time_layers
from lightning_prune.structure.latency import _kind
from lightning_prune.structure.time_layers import (
    OnnxRuntime,
    Torch,
    main,
    measure,
    median_ms,
    onnx_layer,
    points_of,
    torch_layer,
)

LAYERS = [
    (nn.Linear(12, 8), (2, 5, 12)),
    (nn.Linear(12, 8, bias=False), (1, 12)),
    (nn.Conv2d(12, 8, (3, 5), stride=2, padding=(1, 2), dilation=(2, 1)), (1, 12, 11, 12)),
    (nn.Conv2d(12, 12, 3, groups=12, padding="same", bias=False), (1, 12, 9, 9)),
    (nn.Conv2d(12, 24, 3, groups=12, padding="valid"), (1, 12, 9, 9)),
    (nn.Conv2d(12, 8, 1, groups=4), (1, 12, 4, 4)),
    (nn.Conv1d(12, 8, 4, stride=2), (1, 12, 16)),
    (nn.Conv3d(12, 8, 2), (1, 12, 4, 5, 6)),
    (nn.ConvTranspose2d(12, 8, 3, stride=2, padding=1, output_padding=1), (1, 12, 5, 6)),
    (nn.ConvTranspose2d(12, 8, 2, groups=4, dilation=2), (1, 12, 5, 6)),
]


def test_it_is_python_of_an_old_device() -> None:
    """Of version 3.8: its grammar, and no types such as ``list[int]`` where they are evaluated."""
    tree = ast.parse(Path(time_layers.__file__).read_text(), feature_version=(3, 8))
    evaluated = [node for node in tree.body if isinstance(node, ast.Assign | ast.AnnAssign)]
    assert not [ast.unparse(node) for top in evaluated for node in ast.walk(top) if isinstance(node, ast.Subscript)]
    calls = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert not [call for call in calls if "strict=" in call or ".removesuffix(" in call or ".removeprefix(" in call]


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=lambda value: str(value))
def test_a_layer_is_run_in_its_shape(layer: nn.Module, shape: tuple[int, ...]) -> None:
    """By both runtimes, at all of its widths and at half of them."""
    x = torch.randn(shape)
    kind, weight = _kind(layer, x), layer.weight
    json.dumps(kind)
    rows, columns = weight.shape[:2]  # type: ignore[index]
    expected = tuple(layer(x).shape)
    assert tuple(torch_layer(kind, x, rows, columns)().shape) == expected  # type: ignore[attr-defined]
    session = onnxruntime.InferenceSession(onnx_layer(kind, rows, columns), providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {"x": np.zeros(session.get_inputs()[0].shape, np.float32)})
    assert result.shape == expected
    fewer = (rows // 2, columns) if kind.get("depthwise") or kind.get("groups", 1) > 1 else (rows // 2, columns // 2)
    assert torch_layer(kind, x, *fewer)() is not None
    assert OnnxRuntime(threads=1).layer(kind, *fewer)() is not None


def test_the_lowest_time_of_several_rounds_is_kept() -> None:
    kinds, calls = [{"grid": [[2, 4], [3]]}, {"grid": [[1], [1]]}], []

    def time_layer(kind: Any, rows: int, columns: int, seconds: float) -> float:
        calls.append((kind, rows, columns))
        return {0: 5.0, 1: 3.0, 2: 4.0}[(len(calls) - 1) // 3]

    clock = iter(range(100, 0, -1))
    shares: list[float] = []
    found = measure(kinds, 2, time_layer, lambda _number, _seconds: float(next(clock)), progress=shares.append)
    assert found["kinds"] == [[[2, 3, 3.0], [4, 3, 3.0]], [[1, 1, 3.0]]]
    assert found["networks"] == [86.0, 85.0]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_beyond_the_limit_everything_is_timed_once() -> None:
    times: list[str] = []
    measure(
        [{"grid": [[2, 4], [3]]}],
        2,
        lambda *_: times.append("layer") or 1.0,  # type: ignore[func-returns-value]
        lambda *_: times.append("network") or 1.0,  # type: ignore[func-returns-value]
        limit=-1.0,
    )
    assert times == ["layer"] * 2 + ["network"] * 2


def test_a_long_run_is_timed_once_and_a_short_one_often() -> None:
    runs: list[int] = []
    assert median_ms(lambda: runs.append(0), 0.01) < 1
    assert len(runs) > 100
    runs.clear()
    median_ms(lambda: (runs.append(0), sum(range(10**6))), 1e-6)
    assert len(runs) == 2, "a warm-up and one that counts"


class StopError(Exception):
    pass


def spec() -> dict[str, Any]:
    kind = {**_kind(nn.Linear(4, 4), torch.zeros(1, 4)), "grid": [[1, 2, 3, 4], [2, 4]]}
    code = "def forward(self, w, x):\n    return torch.ops.aten.linear.default(x, w)\n"
    inputs = [{"shape": [4, 4], "dtype": "float32"}, {"shape": [1, 4], "dtype": "float32"}]
    stored = {"torch": time_layers.base64.b85encode(time_layers.zlib.compress(code.encode())).decode()}
    return {
        "runtime": "torch",
        "model": "Net",
        "widths": {"0": 4},
        "kinds": [kind, {**kind, "bias": False}],
        "layers": [{"axes": [{"fixed": 0, "repeat": {"0": 1}}, {"fixed": 4, "repeat": {}}], "kind": 0}],
        "networks": [{"widths": {"0": n}, "memory": n, "multiple": 0, **stored, "inputs": inputs} for n in (4, 2)],
    }


def test_it_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, timed = str(tmp_path / "table.json"), []
    real = Torch.timer

    def timer(self: Torch, run: Any, seconds: float) -> float:
        timed.append(seconds)
        if len(timed) == stops[-1]:
            raise StopError
        return real(self, run, 1e-6)

    monkeypatch.setattr(Torch, "timer", timer)
    stops = [0]
    main(spec(), ["--out", out])
    everything = len(timed)
    complete = json.loads(Path(out).read_text())
    assert set(complete["about"]) == {"device", "runtime", "threads", "versions", "at"}
    assert [len(points) for points in complete["measured"]["kinds"]] == [len(points_of([[1, 2, 3, 4], [2, 4]]))] * 2
    Path(out).unlink()
    for at in (7, everything - 20):
        stops.append(at)
        timed.clear()
        with pytest.raises(StopError):
            main(spec(), ["--out", out])
        assert not Path(out).exists()
    before = len(timed)
    stops.append(0)
    timed.clear()
    main(spec(), ["--out", out])
    assert len(timed) < 0.6 * everything
    assert before < everything
    assert not Path(out + ".part").exists()
    assert json.loads(Path(out).read_text())["widths"] == {"0": 4}
    # With other threads it starts again.
    (tmp_path / "table.json.part").write_text(json.dumps({"table": {}, "found": {}}))
    timed.clear()
    main(spec(), ["--out", out])
    assert len(timed) == everything
