"""A script that measures a latency table on the device that a network is meant for."""

from __future__ import annotations

import base64
import copy
import json
import zlib
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_prune.api.inspecting import traced_model_for
from lightning_prune.extras import require
from lightning_prune.structure import StructureError, Tracing
from lightning_prune.structure.latency import eval_copy, latency_times
from lightning_prune.structure.latency_file import plain_times
from lightning_prune.structure.time_layers import filled, torch_function
from lightning_prune.structure.traced_model import require_network
from lightning_prune.surgery import history_of

__all__ = ["latency_script"]

#: What runs the network on the device.
Runtime = Literal["torch", "onnxruntime"]

# Floating-point weights of at least so many elements are written by the script itself.
_LARGE = 256
# Versions of ONNX that devices with an older onnxruntime (1.14) know.
_OPSET, _IR_VERSION = 18, 8


def latency_script(
    model: nn.Module, example: Any = None, file: str = "time_layers.py", *, runtime: Runtime = "torch"
) -> None:
    """Write a Python script that measures a latency table of a network on another device.

    Copy the file to the device and run it there: ``python time_layers.py --threads 4``. It needs numpy and torch, or
    numpy and onnxruntime, and nothing of this package. It times the layers of the network at several widths, and the
    network at about nine, with random weights, and writes ``table.json`` with the name of the device, the runtime,
    threads and versions. If it is stopped, the next call goes on. Give the table as ``latency_table="table.json"`` to
    `prune` or a callback.

    Args:
        model: A LightningModule or any module, as it is pruned later.
        example: Input of ``forward``: a tensor, a tuple of arguments or a dict of keyword arguments. By default a
            LightningModule's ``example_input_array``. One sample of it is run.
        file: Where to write the script.
        runtime: ``"torch"`` runs the network as exported by `torch.export`, with ``--compile`` also compiled.
            ``"onnxruntime"`` runs it as ONNX, which needs the extra ``export`` here.

    Raises:
        ValueError: If the runtime is unknown.
        ModuleNotFoundError: If the extra is not installed.
        StructureError: If the network cannot be exported.

    Example:
        >>> import tempfile, torch
        >>> from lightning_prune import latency_script
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     latency_script(net, torch.zeros(1, 4), f"{folder}/time_layers.py")
    """
    if runtime not in get_args(Runtime):
        raise ValueError(f'latency_script: expected `runtime` of "torch" or "onnxruntime", got {runtime!r}.')
    if runtime == "onnxruntime":
        require("onnx", extra="export")
        require("onnxscript", extra="export")
    require_network(model)
    traced = traced_model_for(model, example)
    structure, history = Tracing(traced).structure, history_of(model)
    dense = None if history is None else history.size.widths
    times = latency_times(traced, structure, dense)
    name = type(traced.model).__name__
    spec = {"runtime": runtime, **plain_times(name, times, dense or structure.widths)}
    fake, args, kwargs = eval_copy(traced)
    for entry in spec["networks"]:
        with fake.cut(structure.axes({group: range(n) for group, n in entry["widths"].items()})), torch.no_grad():
            narrow = copy.deepcopy(fake.module)
            try:
                entry |= _as_torch(narrow, args, kwargs) if runtime == "torch" else _as_onnx(narrow, args, kwargs)
            except Exception as error:
                raise StructureError(
                    f"{name} cannot be exported for {runtime} ({type(error).__name__}: {error}). Export it by "
                    f"`torch.{'export.export' if runtime == 'torch' else 'onnx.export'}` to see where it fails."
                ) from error
    source = files("lightning_prune.structure").joinpath("time_layers.py").read_text()
    run = f'\n\nSPEC = json.loads(r"""\n{json.dumps(spec)}\n""")\n\nif __name__ == "__main__":\n    main(SPEC)\n'
    Path(file).write_text(source + run)


def _pack(content: bytes) -> str:
    return base64.b85encode(zlib.compress(content, 9)).decode()


def _as_torch(network: nn.Module, args: Any, kwargs: Any) -> dict[str, Any]:
    """A network as Python code of ATen operators, with its inputs, weights among them."""
    exported = torch.export.export(network, args, kwargs)
    values = [node.meta["val"] for node in exported.graph.nodes if node.op == "placeholder"]
    inputs = [_described(value) if isinstance(value, Tensor) else value for value in values]
    stored = {"torch": _pack(exported.graph_module.code.encode()), "inputs": inputs}
    generator = torch.Generator().manual_seed(0)
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    torch_function(stored)(*(filled(entry, generator, device) for entry in inputs))
    return stored


def _described(tensor: Tensor) -> dict[str, Any]:
    return {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}


def _as_onnx(network: nn.Module, args: Any, kwargs: Any) -> dict[str, Any]:
    """A network as an ONNX model without its large weights, and their names, types and shapes."""
    options: dict[str, Any] = {"dynamo": True, "verbose": False, "opset_version": _OPSET}
    program = torch.onnx.export(network, args, kwargs=kwargs, **options)
    assert program is not None
    model = program.model_proto
    model.ir_version = _IR_VERSION
    graph, weights = model.graph, []
    small = []
    for tensor in graph.initializer:
        size = 1
        for length in tensor.dims:
            size *= length
        if size >= _LARGE and tensor.data_type in (1, 10, 11):
            weights.append([tensor.name, tensor.data_type, list(tensor.dims)])
        else:
            small.append(tensor)
    del graph.initializer[:], graph.value_info[:], model.metadata_props[:], graph.metadata_props[:]
    graph.initializer.extend(small)
    for node in graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
    return {"onnx": _pack(model.SerializeToString()), "weights": weights}
