"""Files for other runtimes compute what the network computes, or there is no file."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune import PruningError, export, prune
from lightning_prune.api import exporting
from lightning_prune.api.exporting import ExportError
from lightning_prune.api.formats import FORMATS, Format
from lightning_prune.api.samples import largest_difference
from lightning_prune.models import CNNClassifier
from lightning_prune.structure import StructureError
from lightning_prune.surgery.masks import apply_masks, attach_masks
from lightning_prune.surgery.tensors import named

INSTALLED = [
    suffix for suffix, kind in FORMATS.items() if all(find_spec(name.partition(".")[0]) for name in kind.packages)
]
VECTORS, IMAGES = torch.randn(3, 6), torch.randn(3, 3, 8, 8)


class Block(nn.Module):
    """A residual block behind a stem, normalized."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.inner, self.outer = nn.Conv2d(8, 6, 1), nn.Conv2d(6, 8, 1)
        self.drop, self.head = nn.Dropout(), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = (x + self.outer(F.relu(self.inner(x)))).mean((2, 3))
        return self.head(self.drop(x))


class Parts(nn.Module):
    """Takes keywords and a flag, and returns a dict with an integer output."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, left: Tensor, *, right: Tensor, double: bool = False) -> dict[str, Tensor | None]:
        both = self.left(left) - self.right(right) * (2 if double else 1)
        return {"both": both, "none": None, "class": both.argmax(1)}


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def called(forward: Callable[[Tensor], Tensor]) -> nn.Module:
    """A network of a linear layer and a function."""

    class Called(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return forward(self.layer(x))

    return Called()


def trained_statistics(net: nn.Module, images: Tensor) -> nn.Module:
    for _ in range(3):
        net(images)
    return net


class TestAgreement:
    def test_what_is_developed_is_tested(self) -> None:
        assert {".onnx", ".pt2"} <= set(INSTALLED)

    @pytest.mark.parametrize("suffix", INSTALLED)
    def test_a_pruned_network(self, suffix: str, tmp_path: Path) -> None:
        net = trained_statistics(Block(), IMAGES)
        prune(net, IMAGES, pruning_ratio=0.4)
        done = export(net, tmp_path / f"small{suffix}", IMAGES)
        names = {f"small{suffix}", *(["small.bin"] if suffix == ".xml" else [])}
        assert {file.name for file in tmp_path.iterdir()} == names
        assert done.file == tmp_path / f"small{suffix}"
        assert done.bytes == sum(file.stat().st_size for file in tmp_path.iterdir())
        assert done.runtime.startswith(FORMATS[suffix].runtime)
        assert done.batch_size == (1 if suffix == ".pte" else None)
        assert done.samples == 3
        assert 0 <= done.difference <= 1e-4
        assert done.latency_ms > 0
        assert done.dense is None
        run, net = FORMATS[suffix].runner(done.file), net.eval()
        others = torch.randn(1 if suffix == ".pte" else 5, 3, 8, 8)
        torch.testing.assert_close(run((others,), {})[0], net(others), rtol=0, atol=1e-5)

    def test_onnxruntime_alone_runs_it(self, tmp_path: Path) -> None:
        net = trained_statistics(CNNClassifier(channels=(4, 4), hidden=(6, 6)), torch.randn(9, 3, 32, 32))
        prune(net, pruning_ratio=0.5)
        done = export(net, tmp_path / "small.onnx", torch.randn(2, 3, 32, 32))
        session = onnxruntime.InferenceSession(str(done.file), providers=["CPUExecutionProvider"])
        assert [value.name for value in session.get_inputs()] == ["images"]
        images = torch.randn(5, 3, 32, 32)
        np.testing.assert_allclose(
            session.run(None, {"images": images.numpy()})[0], net.eval()(images).detach(), atol=1e-5
        )

    def test_no_source_code_in_the_file(self, tmp_path: Path) -> None:
        for suffix in (".onnx", ".pt2"):
            content = export(mlp(), tmp_path / f"small{suffix}", VECTORS).file.read_bytes()
            assert str(Path(torch.__file__).parent).encode() not in content

    @pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
    def test_keywords_and_several_outputs(self, suffix: str, tmp_path: Path) -> None:
        example = {"double": True, "right": torch.randn(3, 6), "left": VECTORS}
        assert export(Parts(), tmp_path / f"parts{suffix}", example).difference <= 1e-4

    def test_masks_and_hooks_belong_to_the_network(self, tmp_path: Path) -> None:
        net = mlp()
        masks = {"0.weight": named(net)["0.weight"].detach() < 0}
        attach_masks(net, masks)
        apply_masks(net, masks)
        net[1].register_forward_hook(lambda module, given, out: out + 1)
        done = export(net, tmp_path / "small.pt2", VECTORS)
        program = torch.export.load(done.file)
        assert torch.equal(program.module()(VECTORS), net.eval()(VECTORS))
        assert not program.state_dict["0.weight"][masks["0.weight"]].any()

    def test_compiled_networks(self, tmp_path: Path) -> None:
        net = mlp()
        net[2] = torch.compile(net[2])  # type: ignore[assignment]
        whole: Any = torch.compile(net)
        assert export(whole, tmp_path / "small.pt2", VECTORS).difference == 0

    def test_a_lightning_module_has_its_own_example(self, tmp_path: Path) -> None:
        done = export(CNNClassifier(channels=(4, 4), hidden=(6, 6)), tmp_path / "small.pt2")
        assert done.batch_size is None

    def test_one_sample_suffices(self, tmp_path: Path) -> None:
        done = export(mlp(), tmp_path / "small.pt2", VECTORS[:1])
        assert (done.batch_size, done.samples) == (None, 2)

    def test_transformers_have_a_fused_kernel(self, tmp_path: Path) -> None:
        net = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        assert export(net, tmp_path / "small.pt2", torch.randn(3, 5, 8)).batch_size is None
        assert torch.backends.mha.get_fastpath_enabled()


class TestBatchSize:
    def test_one_at_a_time_where_the_code_counts_samples(self, tmp_path: Path) -> None:
        net = called(lambda x: torch.stack([row.softmax(0) for row in x]))
        done = export(net, tmp_path / "small.pt2", VECTORS)
        assert (done.batch_size, done.samples) == (1, 3)
        assert "It takes 1 sample at a time" in str(done)

    def test_the_example_s_where_the_network_takes_no_other(self, tmp_path: Path) -> None:
        done = export(called(lambda x: x.reshape(3, 2, 2)), tmp_path / "small.pt2", VECTORS)
        assert done.batch_size == 3
        assert "It takes 3 samples at a time" in str(done)

    def test_one_where_the_network_takes_no_two(self, tmp_path: Path) -> None:
        done = export(called(lambda x: x.reshape(1, 2, 2)), tmp_path / "small.pt2", VECTORS[:1])
        assert (done.batch_size, done.samples) == (1, 1)


class TestNothingElseChanges:
    def test_the_network(self, tmp_path: Path) -> None:
        net = trained_statistics(Block(), IMAGES)
        net.stem.eval()
        calls: list[int] = []
        net.head.register_forward_hook(lambda *_: calls.append(1))
        net(IMAGES).sum().backward()
        contents = {name: tensor.detach().clone() for name, tensor in named(net).items()}
        objects = {name: id(tensor) for name, tensor in named(net).items()}
        gradients = [parameter.grad for parameter in net.parameters()]
        modes = [module.training for module in net.modules()]
        images, random = IMAGES.clone(), torch.get_rng_state()
        export(net, tmp_path / "small.pt2", images)
        assert torch.equal(images, IMAGES)
        assert torch.equal(torch.get_rng_state(), random)
        assert {name: id(tensor) for name, tensor in named(net).items()} == objects
        assert all(torch.equal(tensor, contents[name]) for name, tensor in named(net).items())
        assert [parameter.grad for parameter in net.parameters()] == gradients
        assert [module.training for module in net.modules()] == modes
        assert len(net.head._forward_hooks) == 1

    def test_the_example_is_not_written_to(self, tmp_path: Path) -> None:
        images = VECTORS.clone()

        class InPlace(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x.mul_(2))

        export(InPlace(6, 2), tmp_path / "small.pt2", images)
        assert torch.equal(images, VECTORS)


class TestBesideTheDense:
    def test_sizes_and_times(self, tmp_path: Path) -> None:
        dense, net = mlp(), mlp()
        prune(net, VECTORS, pruning_ratio=0.5)
        done = export(net, tmp_path / "small.pt2", VECTORS, dense=dense)
        assert done.dense is not None
        assert done.dense.bytes > done.bytes
        assert done.dense.latency_ms > 0
        assert [*tmp_path.iterdir()] == [done.file]
        lines = str(done).splitlines()
        assert any(line.split()[0] == "dense" for line in lines if line.strip())
        assert "| dense |" in done.grids()[0].markdown()


class Wrong(Format):
    """Writes a file that computes something else."""

    packages, extra, runtime = (), "", "torch"

    def write(self, program: Any, file: Path) -> None:
        file.write_text("wrong")

    def runner(self, file: Path) -> Any:
        return lambda args, kwargs: [torch.zeros(len(args[0]), 3)]


class TestRefusals:
    """There is no new file, and an old one stays."""

    @pytest.fixture
    def file(self, tmp_path: Path) -> Iterator[Path]:
        file = tmp_path / "small.pt2"
        file.write_text("old")
        yield file
        assert file.read_text() == "old"
        assert [*tmp_path.iterdir()] == [file]

    def refused(self, file: Path, match: str, net: Any = None, example: Any = VECTORS, **others: Any) -> None:
        error = others.pop("error", ExportError)
        with pytest.raises(error, match=match):
            export(mlp() if net is None else net, file, example, **others)

    def test_an_unknown_format(self, file: Path) -> None:
        expected = r"suffix is one of `\.onnx` \(onnxruntime\), .*got 'small\.tflite'"
        self.refused(file.with_suffix(".tflite"), expected, error=ValueError)

    def test_no_folder(self, file: Path) -> None:
        self.refused(file.parent / "nowhere" / "small.pt2", "expected a folder", error=FileNotFoundError)

    def test_no_network(self, file: Path) -> None:
        self.refused(file, r"expected a torch\.nn\.Module, got a int", 3, error=TypeError)

    def test_no_example(self, file: Path) -> None:
        self.refused(file, "expected an example of what `forward` takes", example=None, error=StructureError)

    def test_an_example_of_another_shape(self, file: Path) -> None:
        self.refused(
            file, r"fails on the example, .*\(3, 5\).*Give an example", example=VECTORS[:, :5], error=ValueError
        )

    def test_halved_weights(self, file: Path) -> None:
        self.refused(
            file, r"expected weights in float32 or float64, got torch\.bfloat16", mlp().bfloat16(), error=ValueError
        )

    def test_no_weights(self, file: Path) -> None:
        self.refused(file, "'0.weight' on the meta device", mlp().to("meta"), error=ValueError)

    def test_a_dense_network_that_cannot_be_exported(self, file: Path) -> None:
        self.refused(file, "expected weights in float32", dense=mlp().half(), error=ValueError)

    @pytest.mark.parametrize(
        "forward", [lambda x: x if x.sum() > 0 else -x, lambda x: x[: int(x.argmax()) or 1] * len(x)], ids=["if", "or"]
    )
    def test_control_flow_by_values(self, forward: Callable[[Tensor], Tensor], file: Path) -> None:
        self.refused(file, r"cannot follow Called \(.*torch\.where", called(forward))

    def test_random_outputs(self, file: Path) -> None:
        self.refused(file, "other outputs when it is run again", called(lambda x: x + torch.randn_like(x)))

    def test_no_outputs(self, file: Path) -> None:
        self.refused(file, "expected tensors from `forward` of Called, got none", called(lambda x: None))  # type: ignore[arg-type,return-value]

    def test_a_file_that_computes_something_else(self, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(FORMATS, ".pt2", Wrong())
        self.refused(file, r"differ from those of Sequential by at most 1e-04 of the largest, got 1\.0e\+00 in torch")

    def test_a_file_that_cannot_be_written(self, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def unknown(program: Any, file: Path) -> None:
            file.write_text("torn")
            raise NotImplementedError("no `tanh` here\nsecond line")

        monkeypatch.setattr(FORMATS[".pt2"], "write", unknown)
        self.refused(
            file, r"cannot be written as `\.pt2` \(NotImplementedError: no `tanh` here\).*another format: `\.onnx`"
        )

    @pytest.mark.parametrize(
        ("suffix", "package", "extra"),
        [
            (".onnx", "onnxscript", "export"),
            (".onnx", "onnxruntime", "export"),
            (".pte", "executorch", "executorch"),
            (".xml", "openvino", "openvino"),
        ],
    )
    def test_a_package_that_is_not_installed(
        self, suffix: str, package: str, extra: str, file: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        present = importlib.import_module

        def missing(name: str) -> Any:
            if name.partition(".")[0] == package:
                raise ModuleNotFoundError(f"No module named {package!r}", name=package)
            return present(name)

        monkeypatch.setattr("lightning_prune.extras.importlib.import_module", missing)
        expected = rf"`{package}` is needed here .* extra `{extra}`: pip install"
        self.refused(file.with_suffix(suffix), expected, error=ModuleNotFoundError)

    def test_an_interrupt(self, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupted(*_: Any) -> None:
            raise KeyboardInterrupt("by hand")

        monkeypatch.setattr(exporting, "program_of", interrupted)
        self.refused(file, "^by hand$", error=KeyboardInterrupt)

    def test_the_error_is_one_of_this_package(self) -> None:
        assert issubclass(ExportError, PruningError)


@pytest.mark.parametrize(
    ("found", "expected", "difference"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([1.0, 2.1], [1.0, 2.0], 0.05),
        ([float("inf"), 1.0], [float("inf"), 1.0], 0.0),
        ([float("nan"), 1.0], [float("nan"), 1.0], 0.0),
        ([float("nan"), 1.0], [2.0, 1.0], float("inf")),
        ([1.0, 1.0], [float("nan"), 1.0], float("inf")),
        ([1.0], [1.0, 1.0], float("inf")),
        ([0.5], [0.0], 0.5),
        ([], [], 0.0),
    ],
)
def test_largest_difference(found: list[float], expected: list[float], difference: float) -> None:
    assert largest_difference([torch.tensor(found)], [torch.tensor(expected)]) == pytest.approx(difference)


def test_outputs_are_compared_each_by_its_own_magnitude() -> None:
    small, large = torch.tensor([1e-3]), torch.tensor([1e3])
    assert largest_difference([small + 1e-4, large], [small, large]) == pytest.approx(0.1)
    assert largest_difference([small], [small, large]) == float("inf")
