"""Integer weights in an ONNX file whose layers have rounded inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_prune.api.formats import ONNX
from lightning_prune.extras import require

__all__ = ["store_integers"]

_Array = npt.NDArray[Any]


def store_integers(file: Path, weight_bits: int) -> int:
    """Replace weights that are multiples of a step, of layers with rounded inputs, by integers and their steps.

    A layer is a Conv, Gemm or MatMul whose input comes from a DequantizeLinear. Its largest weight of each output
    channel is the largest integer, also after a BatchNorm was folded into it, which gives the step. The biases of Conv
    and Gemm become 32-bit integers, with 8 bits in steps of the products, as kernels for integers need them.

    Returns:
        The number of layers.
    """
    onnx: Any = require("onnx", extra=ONNX.extra)
    model = onnx.load(file)
    graph = _Graph(onnx, model.graph)
    layers = [node for node in model.graph.node if graph.has_rounded_input(node)]
    for node in layers:
        axis = _output_axis(node, graph.array(node.input[1]).ndim)
        steps = graph.store(node, 1, axis, weight_bits)
        if len(node.input) > 2 and node.input[2] in graph.constants:
            products = steps * graph.array(graph.producers[node.input[0]].input[1])
            graph.store_bias(node, products if weight_bits == 8 else None)
    graph.finish()
    del model.graph.value_info[:]
    onnx.save(model, file)
    return len(layers)


class _Graph:
    """Constants and producers of an ONNX graph."""

    def __init__(self, onnx: Any, graph: Any) -> None:
        self._onnx, self._graph = onnx, graph
        self._nodes: list[Any] = []
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        self.producers = {output: node for node in graph.node for output in node.output}

    def has_rounded_input(self, node: Any) -> bool:
        """Whether it is a layer with a constant weight and an input from a DequantizeLinear."""
        if node.op_type not in ("Conv", "Gemm", "MatMul") or node.input[1] not in self.constants:
            return False
        producer = self.producers.get(node.input[0])
        return producer is not None and producer.op_type == "DequantizeLinear"

    def array(self, name: str) -> _Array:
        """The values of a constant."""
        found: _Array = self._onnx.numpy_helper.to_array(self.constants[name])
        return found

    def store(self, node: Any, position: int, axis: int, bits: int) -> _Array:
        """Store a layer's weight as integers; returns the steps of its output channels."""
        weight, top = self.array(node.input[position]), 2 ** (bits - 1) - 1
        others = tuple(other for other in range(weight.ndim) if other != axis)
        largest = np.abs(weight).max(axis=others).astype(np.float32)
        steps = np.where(largest > 0, largest / np.float32(top), np.float32(1))
        integers = np.rint(weight / np.expand_dims(steps, others))
        kind = self._onnx.TensorProto.INT8 if bits == 8 else self._onnx.TensorProto.INT4
        self._dequantise(node, position, integers, steps, axis, kind)
        return steps

    def store_bias(self, node: Any, steps: _Array | None) -> None:
        """Store a layer's bias as 32-bit integers, unless it is too large for its steps; without steps, exactly.

        onnxruntime rounds a bias in float32 to the steps of the products, which are coarse with 4-bit weights.
        """
        bias = self.array(node.input[2])
        if steps is None:
            steps = np.where(bias == 0, np.float32(1), np.abs(bias) * np.float32(2**-30))
        integers = np.rint(bias / steps.astype(np.float64))
        if np.abs(integers).max() < 2**31:
            self._dequantise(node, 2, integers, steps, 0, self._onnx.TensorProto.INT32)

    def finish(self) -> None:
        """Put the new nodes first, and leave out constants that are no longer used, and the exporter's notes."""
        nodes = [*self._nodes, *self._graph.node]
        del self._graph.node[:]
        self._graph.node.extend(nodes)
        for node in self._graph.node:
            del node.metadata_props[:]
        used = {name for node in nodes for name in node.input} | {output.name for output in self._graph.output}
        kept = [tensor for tensor in self._graph.initializer if tensor.name in used]
        del self._graph.initializer[:]
        self._graph.initializer.extend(kept)

    def _dequantise(self, node: Any, position: int, integers: _Array, steps: _Array, axis: int, kind: int) -> None:
        name = f"{node.input[position]}_of_{node.output[0]}"
        zeros = np.zeros(len(steps), dtype=np.int32)
        self._graph.initializer.extend(
            [
                _tensor(self._onnx, name, integers, kind),
                self._onnx.numpy_helper.from_array(steps.astype(np.float32), f"{name}_scale"),
                _tensor(self._onnx, f"{name}_zero_point", zeros, kind),
            ]
        )
        inputs, output = [name, f"{name}_scale", f"{name}_zero_point"], f"{name}_dequantized"
        self._nodes.append(self._onnx.helper.make_node("DequantizeLinear", inputs, [output], axis=axis))
        node.input[position] = output


def _tensor(onnx: Any, name: str, values: _Array, kind: int) -> Any:
    """A tensor of integers with its values as raw bytes: two 4-bit ones in each."""
    if kind == onnx.TensorProto.INT4:
        flat = values.astype(np.int8).ravel().view(np.uint8) & 15
        flat = np.append(flat, np.zeros(len(flat) % 2, dtype=np.uint8))
        raw = flat[::2] | flat[1::2] << 4
    else:
        raw = values.astype(np.int8 if kind == onnx.TensorProto.INT8 else np.int32)
    return onnx.helper.make_tensor(name, kind, values.shape, raw.tobytes(), raw=True)


def _output_axis(node: Any, dimensions: int) -> int:
    """The axis of a weight that is that of the output channels."""
    transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
    return 0 if node.op_type == "Conv" or transposed else dimensions - 1
