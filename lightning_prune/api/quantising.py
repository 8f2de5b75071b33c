"""Quantisation to integers, after training or by the ranges of training, compared with the float network."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from lightning_prune.api.exporting import ExportError, export, program_of
from lightning_prune.api.formats import ONNX, Runner
from lightning_prune.api.inspecting import traced_model_for
from lightning_prune.api.integers import store_integers
from lightning_prune.api.samples import Samples, milliseconds, tensors_in
from lightning_prune.extras import require
from lightning_prune.reporting import Quantised
from lightning_prune.reporting.quantised import QuantisedRow
from lightning_prune.structure.traced_model import first_line, require_network
from lightning_prune.surgery import FakeQuantisation, history_of

__all__ = ["quantise"]

# Has 4-bit integers; read by onnxruntime 1.18 and newer.
_OPSET = 21

#: Inputs of a batch, and labels if it has them.
_Batch: TypeAlias = tuple[Tensor, Any]


def quantise(
    model: nn.Module,
    file: str | Path,
    calibration: Iterable[Any] | FakeQuantisation,
    test: Iterable[Any],
    *,
    dense: nn.Module | None = None,
) -> Quantised:
    """Quantise a classifier to integers in an ONNX file, and compare it with the float network.

    With calibration samples, this is quantisation after training: weights are quantised per channel, activations per
    tensor with the ranges that they have on these samples (onnxruntime's static quantisation). With the
    `FakeQuantisation` that the network was trained with, the file computes what was trained. Both hold pairs of
    QuantizeLinear and DequantizeLinear. Prune first: the ranges are those of the narrow network. The file is run on the
    test samples before it is moved into its place.

    Args:
        model: A pruned network, or a dense one, with one input and outputs ``(samples, classes)``. It is not modified.
        file: The file to write, ``.onnx``.
        calibration: Some hundred training samples: batches of inputs or of ``(inputs, labels)``, such as a DataLoader.
            After quantisation-aware training: ``callback.rounding`` of `QuantisationAware`.
        test: Samples to compare on, other than those: batches of the same kind, read one at a time. With labels (class
            numbers of shape ``(samples,)``) the accuracy is measured.
        dense: The network before pruning, for two more rows of the table.

    Returns:
        Accuracy, bytes, milliseconds and agreement of predictions with their 95 % interval, as a table of up to four
        rows: dense, pruned, dense quantised (after training only), pruned quantised. Without ``dense``, a network that
        has no history of cuts is called ``"network"``.

    Raises:
        ValueError: If the suffix or the batches are others than expected, or the network was not trained with the
            `FakeQuantisation`.
        ExportError: If the network cannot be exported or quantised, or its outputs are no ``(samples, classes)``.
        ModuleNotFoundError: If onnx, onnxscript or onnxruntime is missing (extra ``export``).
    """
    path = Path(file)
    if path.suffix != ".onnx":
        raise ValueError(f"quantise: expected a file with the suffix `.onnx`, got {path.name!r}.")
    own = "network" if dense is None and history_of(model) is None else "pruned"
    networks = {own: model} if dense is None else {"dense": dense, own: model}
    for network in networks.values():
        require_network(network)
    ONNX().require()
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"quantise: expected a folder for {path.name}, got {str(path.parent)!r}, which is none."
        )
    for name, data in (("calibration", calibration), ("test", test)):
        _require_batches(data, name)
    (example, _), held_out = _peeked(map(_labelled, test), "test")
    rounding = calibration if isinstance(calibration, FakeQuantisation) else None
    if rounding is not None:
        rounding.require_trained(model)
    ranges: list[Tensor] = []
    if not isinstance(calibration, FakeQuantisation):
        (example, _), batches = _peeked(map(partial(_inputs, "calibration"), calibration), "calibration")
        ranges = [inputs for inputs, _ in batches]
    last = f"{own}, quantised"
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        files = {name: _floats(net, Path(folder, f"{name}.onnx"), example) for name, net in networks.items()}
        references = {}
        if rounding is not None:
            files[last] = Path(folder, "trained.onnx")
            references[last] = _trained_integers(model, rounding, files[last], example)
        else:
            files |= {f"{name}, quantised": _integers(floats, ranges) for name, floats in files.items()}
        samples, rows = _compared(files, held_out, references)
        files[last].replace(path)
    return Quantised(path, ONNX().version(), torch.get_num_threads(), samples, rows, sum(map(len, ranges)))


def _require_batches(data: object, name: str) -> None:
    is_pair = isinstance(data, tuple) and len(data) == 2 and all(isinstance(part, Tensor) for part in data)
    if isinstance(data, Tensor) or is_pair:
        got = "a pair of tensors" if is_pair else "a tensor"
        raise ValueError(
            f"quantise: expected batches in `{name}`, got {got}. Give a DataLoader, a list such as "
            "`[(inputs, labels)]`, or `inputs.split(64)`."
        )


def _peeked(batches: Iterator[_Batch], name: str) -> tuple[_Batch, Iterator[_Batch]]:
    """The first batch, which is read at once, and all of them."""
    first = next(batches, None)
    if first is None:
        raise ValueError(f"quantise: expected samples in `{name}`, got none.")
    return first, chain([first], batches)


def _inputs(name: str, raw: Any) -> _Batch:
    """Inputs of a batch on the CPU, and its labels or None."""
    parts = tuple(raw) if isinstance(raw, (tuple, list)) else (raw,)
    if len(parts) not in (1, 2) or not isinstance(parts[0], Tensor):
        kinds = ", ".join(type(part).__name__ for part in parts)
        raise ValueError(
            f"quantise: expected batches that are a tensor or `(inputs, labels)` in `{name}`, got ({kinds}). "
            "Networks with several inputs are not supported."
        )
    return parts[0].detach().cpu(), parts[1] if len(parts) == 2 else None


def _labelled(raw: Any) -> _Batch:
    """Inputs and labels of a test batch."""
    inputs, labels = _inputs("test", raw)
    if labels is None:
        return inputs, None
    if not isinstance(labels, Tensor) or labels.shape != inputs.shape[:1] or labels.is_floating_point():
        got = f"{labels.dtype}, {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
        raise ValueError(
            "quantise: expected the class number of each sample as labels in `test`, integers of shape (samples,), "
            f"got {got}. Give these, or inputs alone."
        )
    return inputs, labels.cpu()


def _floats(model: nn.Module, file: Path, example: Tensor) -> Path:
    """Write the verified float32 file."""
    if export(model, file, example).batch_size is not None:
        raise ExportError(
            f"quantise: expected a network that takes batches of any size, got {type(model).__name__}, whose batch "
            "size is fixed. Leave it out of the code of `forward`."
        )
    return file


def _integers(file: Path, batches: Sequence[Tensor]) -> Path:
    """Quantise a float32 file with the ranges of these batches."""
    tools: Any = require("onnxruntime.quantization", extra=ONNX.extra)
    shapes: Any = require("onnxruntime.quantization.shape_inference", extra=ONNX.extra)
    prepared, quantised = (file.with_name(f"{file.stem}-{step}.onnx") for step in ("prepared", "int8"))
    with _quantising("onnxruntime cannot quantise"):
        shapes.quant_pre_process(str(file), str(prepared), skip_symbolic_shape=True)
        reader = _Reader(ONNX().inputs(prepared)[0], batches)
        tools.quantize_static(str(prepared), str(quantised), reader, per_channel=True)
    return quantised


def _trained_integers(model: nn.Module, rounding: FakeQuantisation, file: Path, example: Tensor) -> Runner:
    """Write the file that computes what was trained; returns what was trained, in PyTorch."""
    traced = traced_model_for(model, example)
    module = traced.copy("real").module.eval().requires_grad_(False).cpu()
    rounding.fix(module)
    with _quantising("PyTorch cannot export"):
        program = program_of(module, Samples(model, traced.calls[0]), None)
        converted = torch.onnx.export(program, dynamo=True, verbose=False, opset_version=_OPSET)
        assert converted is not None
        converted.save(str(file))
        layers = store_integers(file, rounding.weight_bits)
    if layers == 0:
        raise ExportError(f"quantise: found no layer of {type(model).__name__} in the file whose inputs are rounded.")

    @torch.no_grad()
    def run(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
        return tensors_in(module(*args, **kwargs))

    return run


class _Reader:
    """Batches as onnxruntime's calibration reads them."""

    def __init__(self, name: str, batches: Sequence[Tensor]) -> None:
        self._batches = iter([{name: inputs.numpy()} for inputs in batches])

    def get_next(self) -> dict[str, np.ndarray[Any, Any]] | None:
        """The next batch, None at the end."""
        return next(self._batches, None)


@contextmanager
def _quantising(problem: str) -> Iterator[None]:
    """Convert errors of the quantisation, and silence its advice, which has been followed."""
    root = logging.getLogger()
    before, root.disabled = root.disabled, True
    try:
        yield
    except Exception as error:
        raise ExportError(
            f"quantise: {problem} the network ({type(error).__name__}: {first_line(error)}). No file is left."
        ) from error
    finally:
        root.disabled = before


def _compared(
    files: dict[str, Path], batches: Iterable[_Batch], references: Mapping[str, Runner]
) -> tuple[int, tuple[QuantisedRow, ...]]:
    """Run all files on the test samples, and compare quantised ones with their references or the float network.

    Returns:
        The number of samples, and a row per file.
    """
    runs = {name: ONNX().runner(file) for name, file in files.items()}
    predicted: dict[Runner, list[Tensor]] = {run: [] for run in (*runs.values(), *references.values())}
    known: list[Tensor] = []
    times: list[float] = []
    for inputs, labels in batches:
        times = times or milliseconds([partial(run, (inputs[:1],), {}) for run in runs.values()])
        known += [] if labels is None else [labels]
        for run, classes in predicted.items():
            classes.append(_classes(run, inputs))
    predictions = {run: torch.cat(classes) for run, classes in predicted.items()}
    expected = torch.cat(known) if known else torch.empty(0)
    rows = []
    for (name, run), ms in zip(runs.items(), times, strict=True):
        found, reference = predictions[run], references.get(name, runs[name.partition(",")[0]])
        accuracy = float((found == expected).float().mean()) if len(expected) == len(found) else None
        agreed = int((found == predictions[reference]).sum()) if "," in name else None
        rows.append(QuantisedRow(name, files[name].stat().st_size, ms, accuracy, agreed))
    return len(found), tuple(rows)


def _classes(run: Runner, inputs: Tensor) -> Tensor:
    outputs = run((inputs,), {})
    if len(outputs) != 1 or outputs[0].dim() != 2 or outputs[0].shape[1] < 2:
        shapes = [tuple(out.shape) for out in outputs]
        raise ExportError(f"quantise: expected one output of shape (samples, classes), got {shapes}.")
    return outputs[0].argmax(1)
