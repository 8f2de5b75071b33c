"""A network in 8-bit integers predicts what it predicted, its file is whole, and every number of the table is true."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import FakeQuantisation, prune, quantise
from lightning_prune.api import quantising
from lightning_prune.api.exporting import ExportError
from lightning_prune.reporting import wilson

IMAGES, LABELS = torch.randn(48, 1, 8, 8), torch.randint(4, (48,))


def network() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4)),
    )
    with torch.no_grad():
        net[7].weight.mul_(10)  # classes that are apart
    net(IMAGES)
    return net.eval()


class TestFourRows:
    def test_dense_pruned_quantised_and_both(self, tmp_path: Path) -> None:
        dense, net = network(), network()
        prune(net, IMAGES, pruning_ratio=0.5)
        data = DataLoader(TensorDataset(IMAGES, LABELS), batch_size=16)
        done = quantise(net, tmp_path / "small.onnx", [IMAGES[:16]], data, dense=dense)
        assert [*tmp_path.iterdir()] == [done.file]
        assert [row.name for row in done.rows] == ["dense", "pruned", "dense, quantised", "pruned, quantised"]
        with torch.no_grad():
            predictions = [model(IMAGES).argmax(1) for model in (dense, net)]
        for row, found in zip(done.rows, predictions, strict=False):
            assert row.accuracy == pytest.approx(float((found == LABELS).float().mean()))
            assert row.agreed is None
        session = onnxruntime.InferenceSession(str(done.file), providers=["CPUExecutionProvider"])
        outputs = torch.as_tensor(session.run(None, {session.get_inputs()[0].name: IMAGES.numpy()})[0])
        last = done.rows[-1]
        assert last.agreed == int((outputs.argmax(1) == predictions[1]).sum())
        assert last.accuracy == pytest.approx(float((outputs.argmax(1) == LABELS).float().mean()))
        assert last.bytes == done.file.stat().st_size
        assert done.agreement == last.agreed / 48
        assert done.agreement > 0.8
        assert all(row.latency_ms > 0 for row in done.rows)
        stored = {tensor.data_type for tensor in onnx.load(done.file).graph.initializer if len(tensor.dims) == 4}
        assert stored == {onnx.TensorProto.INT8}
        low, high = wilson(last.agreed, 48)
        assert f"({100 * low:.2f} to {100 * high:.2f})" in str(done)

    def test_test_batches_without_labels_one_at_a_time(self, tmp_path: Path) -> None:
        held: list[StorageWeakRef] = []

        def batches() -> Iterator[Tensor]:
            for part in IMAGES.split(6):
                # The first, which was read before the rest, and the one before.
                assert sum(not one.expired() for one in held) <= 2
                batch = part.clone()
                held.append(StorageWeakRef(batch.untyped_storage()))
                yield batch
                del batch

        labels = {"of": "another kind"}  # not used for ranges
        done = quantise(network(), tmp_path / "small.onnx", [(IMAGES, labels)], batches())
        assert [row.name for row in done.rows] == ["network", "network, quantised"]
        assert [row.accuracy for row in done.rows] == [None, None]
        assert done.samples == 48


class Rows(nn.Module):
    """Layers of each kind, with a negative scale of a norm that is folded, and rows of three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8, bias=False)),
            *(nn.BatchNorm2d(8), nn.Flatten(2)),
        )
        self.rows, self.norm, self.line = nn.Linear(16, 6), nn.LayerNorm(6), nn.Conv1d(8, 2, 1)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.line(self.norm(self.rows(self.features(x)).relu())).flatten(1))


def trained(bits: int) -> tuple[Rows, FakeQuantisation]:
    """A network after three steps with rounding."""
    torch.manual_seed(0)
    net, rounding = Rows(), FakeQuantisation(bits)
    with torch.no_grad():
        net.features[1].weight[::2] *= -1
        net.features[4].weight[0] = 0
        net.head.weight.mul_(10)  # classes that are apart
    rounding.attach(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(IMAGES), LABELS).backward()
        optimizer.step()
    net.eval()
    return net, rounding


class TestTrainedWithRounding:
    @pytest.mark.parametrize(("bits", "top"), [(8, 127), (4, 7)])
    def test_the_file_computes_what_was_trained(self, bits: int, top: int, tmp_path: Path) -> None:
        net, rounding = trained(bits)
        with torch.no_grad():
            expected = net(IMAGES)
        rounding.detach()
        done = quantise(net, tmp_path / "small.onnx", rounding, [(IMAGES, LABELS)])
        assert [*tmp_path.iterdir()] == [done.file]
        assert [row.name for row in done.rows] == ["network", "network, quantised"]
        session = onnxruntime.InferenceSession(str(done.file), providers=["CPUExecutionProvider"])
        found = torch.as_tensor(session.run(None, {session.get_inputs()[0].name: IMAGES.numpy()})[0])
        # With 8 bits, biases are rounded, and in a few samples a value between two integers falls to the other side.
        same = (found - expected).abs().amax(1) < 1e-3 * expected.abs().max()
        assert same.float().mean() > (0.7 if bits == 8 else 0.9)
        last = done.rows[-1]
        assert last.agreed == int((found.argmax(1) == expected.argmax(1)).sum()) >= 45
        assert last.accuracy == pytest.approx(float((found.argmax(1) == LABELS).float().mean()))
        assert "same prediction as in training" in str(done)
        self.check_integers(done.file, net, bits, top)

    def check_integers(self, file: Path, net: Rows, bits: int, top: int) -> None:
        """All five weights are integers; those of the first layer are the rounded ones, with the norm's sign."""
        model = onnx.load(file)
        kind = onnx.TensorProto.INT8 if bits == 8 else onnx.TensorProto.INT4
        weights = [t for t in model.graph.initializer if t.data_type == kind and len(t.dims) > 1]
        assert len(weights) == 5
        arrays = [torch.as_tensor(onnx.numpy_helper.to_array(t).astype("int32")) for t in weights]
        weight = net.features[0].weight.detach()
        integers = (weight / weight.abs().amax((1, 2, 3), keepdim=True) * top).round()
        expected = (integers * net.features[1].weight.detach().sign().reshape(-1, 1, 1, 1)).int()
        assert any(torch.equal(array, expected) for array in arrays)
        assert not any(node.op_type == "BatchNormalization" for node in model.graph.node)
        floats = sum(len(t.raw_data) for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT)
        assert floats < 4 * sum(p.numel() for p in net.parameters())

    def test_while_it_rounds(self, tmp_path: Path) -> None:
        net, rounding = trained(8)
        with pytest.raises(ValueError, match="expected one that is not attached"):
            quantise(net, tmp_path / "small.onnx", rounding, [IMAGES])
        rounding.detach()
        with pytest.raises(ValueError, match=r"expected the network that was trained with it, got Sequential"):
            quantise(network(), tmp_path / "small.onnx", rounding, [IMAGES])
        assert not [*tmp_path.iterdir()]


class TestRefusals:
    @pytest.fixture
    def file(self, tmp_path: Path) -> Iterator[Path]:
        file = tmp_path / "small.onnx"
        file.write_text("old")
        yield file
        assert file.read_text() == "old"
        assert [*tmp_path.iterdir()] == [file]

    @pytest.mark.parametrize(
        ("data", "match"),
        [
            ((IMAGES, [IMAGES]), "expected batches in `calibration`, got a tensor"),
            (([IMAGES], (IMAGES, LABELS)), "expected batches in `test`, got a pair of tensors"),
            (([], [IMAGES]), "expected samples in `calibration`, got none"),
            (([IMAGES], []), "expected samples in `test`, got none"),
            (([{"x": IMAGES}], [IMAGES]), r"`\(inputs, labels\)` in `calibration`, got \(dict\)"),
            (([IMAGES], [(IMAGES, LABELS[:, None])]), r"integers of shape \(samples,\), got torch\.int64, \(48, 1\)"),
            (([IMAGES], [(IMAGES, {"of": "another kind"})]), r"integers of shape \(samples,\), got dict"),
            (([IMAGES], [(IMAGES, LABELS, LABELS)]), r"in `test`, got \(Tensor, Tensor, Tensor\)"),
        ],
    )
    def test_data(self, data: tuple[list[Any], list[Any]], match: str, file: Path) -> None:
        with pytest.raises(ValueError, match=match):
            quantise(network(), file, *data)

    def test_another_format(self, file: Path) -> None:
        with pytest.raises(ValueError, match=r"suffix `\.onnx`, got 'small\.pte'"):
            quantise(network(), file.with_suffix(".pte"), [IMAGES], [IMAGES])

    def test_no_folder(self, file: Path) -> None:
        with pytest.raises(FileNotFoundError, match="expected a folder"):
            quantise(network(), file.parent / "nowhere" / "small.onnx", [IMAGES], [IMAGES])

    def test_no_network(self, file: Path) -> None:
        with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module"):
            quantise(3, file, [IMAGES], [IMAGES])  # type: ignore[arg-type]

    def test_a_fixed_batch_size(self, file: Path) -> None:
        class Loop(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                return torch.stack([super(Loop, self).forward(row) for row in x])

        with pytest.raises(ExportError, match="takes batches of any size, got Loop"):
            quantise(Loop(3, 2), file, [torch.randn(3, 3)], [torch.randn(3, 3)])

    def test_no_classes(self, file: Path) -> None:
        with pytest.raises(ExportError, match=r"\(samples, classes\), got \[\(48, 1\)\]"):
            quantise(nn.Sequential(nn.Flatten(), nn.Linear(64, 1)), file, [IMAGES], [IMAGES])

    def test_what_onnxruntime_refuses(self, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refusing(name: str, batches: Any) -> None:
            raise RuntimeError("no such operator\nsecond line")

        monkeypatch.setattr(quantising, "_Reader", refusing)
        with pytest.raises(ExportError, match=r"cannot quantise the network \(RuntimeError: no such operator\)"):
            quantise(nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), file, [IMAGES], [IMAGES])


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (95, 100, 0.8882, 0.9785)],
)
def test_wilson(successes: int, trials: int, low: float, high: float) -> None:
    """Values of the literature."""
    assert wilson(successes, trials) == pytest.approx((low, high), abs=1e-4)
