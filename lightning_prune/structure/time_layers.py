"""Times the layers of a network at several widths on this device, and writes a table.

This file stands alone: it needs Python 3.8 or later, numpy, and torch or onnxruntime (1.14 or later).
`lightning_prune.latency_script` writes a copy of it with the layers of a network at its end, to be run on the device
that the network is meant for.
"""

from __future__ import annotations

import argparse
import base64
import json
import math
import os
import platform
import statistics
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

__all__ = [
    "FORMAT",
    "PROBES",
    "OnnxRuntime",
    "Torch",
    "device_name",
    "filled",
    "grid_of",
    "lengths_of",
    "main",
    "measure",
    "median_ms",
    "middle_of",
    "onnx_layer",
    "points_of",
    "probes_of",
    "torch_function",
    "torch_layer",
    "unpack",
]

#: Version of the format of tables.
FORMAT = 1

# Fractions of the dense lengths at which a layer is timed, and multiples to which these are rounded.
_SHARES = (0.125, 0.25, 0.5, 0.75, 1.0)
_MULTIPLES = ((64, 16), (32, 8), (16, 4))
#: Distances from a point of the grid at which the step is found in which times rise.
PROBES = (1, 5, 9, 17)
# Passes over all layers and over all networks, because another load may disturb one of them for seconds.
_LAYER_ROUNDS, _NETWORK_ROUNDS = 3, 8
# Seconds to time one layer at one width and one network, in one pass.
_POINT, _NETWORK = 0.01, 0.05

# A plain dict that describes a layer.
Kind = Any
if TYPE_CHECKING:  # Python 3.8 has no such types
    Run = Callable[[], object]


def grid_of(length: int, *, varies: bool) -> list[int]:
    """Lengths at which a dimension is timed, ascending, up to the dense one."""
    if not varies:
        return [length]
    multiple = next((multiple for least, multiple in _MULTIPLES if length >= least), 1)
    inner = {min(max(round(share * length / multiple), 1) * multiple, length) for share in _SHARES}
    return sorted({*inner, length})


def points_of(grid: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """All points at which a layer is timed: the grid, and between its points some for the step in which times rise."""
    rows, columns = grid
    points = [(a, b) for a in rows for b in columns]
    points += [(probe, columns[len(columns) // 2]) for probe in probes_of(rows)]
    points += [(rows[len(rows) // 2], probe) for probe in probes_of(columns)]
    return points


def probes_of(lengths: Sequence[int]) -> list[int]:
    """Lengths between two neighbours in the middle of a dimension's grid."""
    if len(lengths) < 3:
        return []
    start, end = middle_of(lengths)
    return [start + offset for offset in PROBES if start + offset < end]


def middle_of(lengths: Sequence[int]) -> tuple[int, int]:
    """The two neighbours between which a dimension is probed."""
    low = min(len(lengths) // 2, len(lengths) - 2)
    return lengths[low], lengths[low + 1]


def measure(
    kinds: Sequence[Kind],
    networks: int,
    time_layer: Callable[[Kind, int, int, float], float],
    time_network: Callable[[int, float], float],
    *,
    found: dict[str, Any] | None = None,
    save: Callable[[dict[str, Any]], object] = lambda _: None,
    progress: Callable[[float], object] = lambda _: None,
    limit: float = 60.0,
) -> dict[str, Any]:
    """Time all layers and networks several times over, and keep the lowest time of each.

    Args:
        kinds: The layers.
        networks: Number of networks.
        time_layer: Milliseconds of a layer with so many rows and columns, measured for so many seconds.
        time_network: Milliseconds of a network by its number, measured for so many seconds.
        found: What was found so far by a process that ended early.
        save: Called with what was found so far.
        progress: Called with the share that is done.
        limit: Seconds after which the layers, and then the networks, are not timed once more.

    Returns:
        ``"kinds"``: for each layer, rows, columns and milliseconds of every point; ``"networks"``: milliseconds.
    """
    found = found or {"kinds": [None] * len(kinds), "networks": [None] * networks, "done": 0}
    layers = [("kinds", i) for _ in range(_LAYER_ROUNDS) for i in range(len(kinds))]
    steps = layers + [("networks", i) for _ in range(_NETWORK_ROUNDS) for i in range(networks)]
    began = time.monotonic()
    for number, (what, i) in enumerate(steps):
        if number == len(layers):
            began = time.monotonic()
        before = found[what][i]
        if number < found["done"] or (before is not None and time.monotonic() - began > limit):
            continue
        if what == "kinds":
            found[what][i] = _time_kind(kinds[i], time_layer, before)
        else:
            ms = time_network(i, _NETWORK)
            found[what][i] = ms if before is None else min(ms, before)
        found["done"] = number + 1
        save(found)
        progress(found["done"] / len(steps))
    return found


def _time_kind(kind: Kind, time_layer: Callable[[Kind, int, int, float], float], before: Any) -> Any:
    """Rows, columns and milliseconds of all points of a layer, the lower of these and those ``before``."""
    points = points_of(kind["grid"])
    ms = [time_layer(kind, a, b, _POINT) for a, b in points]
    if before is not None:
        ms = [min(now, then[2]) for now, then in zip(ms, before)]  # noqa: B905 - Python 3.8 has no `strict`
    return [[a, b, value] for (a, b), value in zip(points, ms)]  # noqa: B905


def median_ms(run: Run, seconds: float, wait: Callable[[], object] = lambda: None) -> float:
    """Median time of a run in milliseconds, measured for about so many seconds after a warm-up."""
    run()
    wait()
    times: list[float] = []
    while len(times) < 3 or (sum(times) < seconds and len(times) < 1000):
        start = time.perf_counter()
        run()
        wait()
        times.append(time.perf_counter() - start)
        if times[0] > 10 * seconds:
            break
    return 1e3 * statistics.median(times)


# -- torch --------------------------------------------------------------------------------------------------------


class Torch:
    """Runs layers and networks with PyTorch.

    Args:
        device: Device, such as ``"cpu"`` or ``"cuda"``.
        threads: Threads of the CPU; by default PyTorch's choice.
        compiled: Whether networks are compiled. Layers are not: what compiling them makes faster is found by timing the
            whole network.
    """

    def __init__(self, device: str = "cpu", threads: int | None = None, *, compiled: bool = False) -> None:
        import torch

        self.torch, self.device, self.compiled = torch, torch.device(device), compiled
        if threads:
            torch.set_num_threads(threads)
        self.threads = torch.get_num_threads()

    def about(self) -> dict[str, Any]:
        """What the times depend on."""
        name = self.torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else device_name()
        runtime = "torch.compile" if self.compiled else "torch"
        versions = {"torch": str(self.torch.__version__)}
        return {"device": name, "runtime": runtime, "threads": self.threads, "versions": versions}

    def timer(self, run: Run, seconds: float) -> float:
        """Milliseconds of a run."""
        with self.torch.no_grad():
            return median_ms(run, seconds, self.torch.cuda.synchronize if self.device.type == "cuda" else lambda: None)

    def layer(self, kind: Kind, rows: int, columns: int) -> Run:
        """The layer's operator with a weight whose first two dimensions are ``rows`` × ``columns``."""
        x = self.torch.zeros(1, device=self.device, dtype=getattr(self.torch, kind["dtype"]))
        return torch_layer(kind, x, rows, columns)

    def network(self, stored: dict[str, Any]) -> Run:
        """A network of the script."""
        torch, made = self.torch, torch_function(stored)
        generator = torch.Generator().manual_seed(0)
        inputs = [filled(entry, generator, self.device) for entry in stored["inputs"]]
        function = torch.compile(made) if self.compiled else made
        return lambda: function(*inputs)


def torch_layer(kind: Kind, like: Any, rows: int, columns: int) -> Run:
    """The operator of a layer in PyTorch, see `Torch.layer`; ``like`` gives type and device."""
    from torch.nn import functional as F

    bias = kind["bias"]
    if kind["op"] == "linear":
        weight, x = like.new_zeros(rows, columns), like.new_zeros(*kind["lead"], columns)
        own = like.new_zeros(rows) if bias else None
        return lambda: F.linear(x, weight, own)
    rows, columns, groups, channels, outputs = lengths_of(kind, rows, columns)
    weight = like.new_zeros(rows, columns, *kind["kernel"])
    x = like.new_zeros(*kind["lead"], channels, *kind["size"])
    own = like.new_zeros(outputs) if bias else None
    dims = len(kind["kernel"])
    if kind["transposed"]:
        up = getattr(F, f"conv_transpose{dims}d")
        settings = (kind["stride"], kind["padding"], kind["output_padding"], groups, kind["dilation"])
        return lambda: up(x, weight, own, *settings)
    convolve = getattr(F, f"conv{dims}d")
    return lambda: convolve(x, weight, own, kind["stride"], kind["padding"], kind["dilation"], groups)


def lengths_of(kind: Kind, rows: int, columns: int) -> tuple[int, int, int, int, int]:
    """Rows, columns, groups, and channels that enter and leave a convolution with such a weight."""
    groups = max(rows // kind["per_group"], 1) if kind["depthwise"] else kind["groups"]
    rows = max(rows // groups, 1) * groups
    channels, outputs = (rows, columns * groups) if kind["transposed"] else (columns * groups, rows)
    return rows, columns, groups, channels, outputs


def torch_function(stored: dict[str, Any]) -> Callable[..., object]:
    """The function that was written by `torch.export` as Python code of ATen operators."""
    import torch

    names: dict[str, Any] = {"torch": torch, "device": torch.device, "inf": math.inf, "nan": math.nan}
    exec(unpack(stored["torch"]).decode(), names)  # written by the package into this file
    forward: Callable[..., object] = names["forward"]
    return lambda *inputs: forward(None, *inputs)


def filled(entry: Any, generator: Any, device: Any) -> Any:
    """An input of a network: a tensor of small random numbers for a shape and a type, else the value itself."""
    import torch

    if not isinstance(entry, dict):
        return entry
    kind = getattr(torch, entry["dtype"])
    if not kind.is_floating_point:
        return torch.zeros(entry["shape"], dtype=kind, device=device)
    return torch.rand(entry["shape"], generator=generator).add(0.5).mul(0.02).to(device, kind)


# -- onnxruntime --------------------------------------------------------------------------------------------------


class OnnxRuntime:
    """Runs layers and networks with ONNX Runtime; layers are written as ONNX by this file itself.

    Args:
        providers: Execution providers, such as ``"CUDAExecutionProvider"``; by default the CPU.
        threads: Threads of an operator; by default ONNX Runtime's choice.
    """

    def __init__(self, providers: Sequence[str] = (), threads: int | None = None) -> None:
        self.runtime, self.providers = _onnxruntime(), list(providers) or ["CPUExecutionProvider"]
        self.options = self.runtime.SessionOptions()
        self.options.log_severity_level = 3
        self.options.intra_op_num_threads = threads or 0
        self.threads = threads or os.cpu_count() or 1

    def about(self) -> dict[str, Any]:
        """What the times depend on."""
        runtime = f"onnxruntime ({', '.join(self.providers)})"
        versions = {"onnxruntime": str(self.runtime.__version__)}
        return {"device": device_name(), "runtime": runtime, "threads": self.threads, "versions": versions}

    def timer(self, run: Run, seconds: float) -> float:
        """Milliseconds of a run."""
        return median_ms(run, seconds)

    def layer(self, kind: Kind, rows: int, columns: int) -> Run:
        """The layer as a network of one operator."""
        return self._run(onnx_layer(kind, rows, columns))

    def network(self, stored: dict[str, Any]) -> Run:
        """A network of the script."""
        # A message of protocol buffers is merged with what follows it.
        return self._run(unpack(stored["onnx"]) + _field(7, _tensors(stored["weights"])))

    def _run(self, model: bytes) -> Run:
        session = self.runtime.InferenceSession(model, self.options, providers=self.providers)
        inputs = {entry.name: _array(entry.type, entry.shape) for entry in session.get_inputs()}
        return lambda: session.run(None, inputs)


def _onnxruntime() -> Any:
    import onnxruntime

    return onnxruntime


def onnx_layer(kind: Kind, rows: int, columns: int) -> bytes:
    """A layer as an ONNX model."""
    if kind["op"] == "linear":
        lead = kind["lead"]
        tensors = [("w", (columns, rows))] + [("b", (rows,))] * bool(kind["bias"])
        nodes = [_node("MatMul", ["x", "w"], "y" if not kind["bias"] else "m")]
        if kind["bias"]:
            nodes.append(_node("Add", ["m", "b"], "y"))
        return _model(nodes, tensors, (*lead, columns), (*lead, rows))
    rows, columns, groups, channels, outputs = lengths_of(kind, rows, columns)
    tensors = [("w", (rows, columns, *kind["kernel"]))] + [("b", (outputs,))] * bool(kind["bias"])
    settings = {
        "strides": kind["stride"],
        "dilations": kind["dilation"],
        "pads": [*kind["padding"], *kind["padding"]],
        "group": groups,
    }
    if kind["transposed"]:
        settings["output_padding"] = kind["output_padding"]
    op = "ConvTranspose" if kind["transposed"] else "Conv"
    lead = kind["lead"] or [1]
    size = [_size_after(kind, axis) for axis in range(len(kind["size"]))]
    node = _node(op, ["x", "w", *(["b"] if kind["bias"] else [])], "y", settings)
    return _model([node], tensors, (*lead, channels, *kind["size"]), (*lead, outputs, *size))


def _size_after(kind: Kind, axis: int) -> int:
    """Length of a spatial axis after a convolution."""
    names = ("size", "kernel", "stride", "padding", "dilation", "output_padding")
    n, k, s, p, d, o = (kind[name][axis] for name in names)
    reach = d * (k - 1)
    size: int = (n - 1) * s - 2 * p + reach + o + 1 if kind["transposed"] else (n + 2 * p - reach - 1) // s + 1
    return size


# The few fields of ONNX's protocol buffers that a network of one or two operators needs.

# Floating-point types of ONNX and numpy.
_FLOATS = {1: "<f4", 10: "<f2", 11: "<f8"}


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _field(number: int, value: int | str | bytes) -> bytes:
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    data = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _node(op: str, inputs: Sequence[str], output: str, settings: dict[str, Any] | None = None) -> bytes:
    attributes = b""
    for name, value in (settings or {}).items():
        if isinstance(value, int):
            attributes += _field(5, _field(1, name) + _field(3, value) + _field(20, 2))
        else:
            ints = b"".join(_field(8, number) for number in value)
            attributes += _field(5, _field(1, name) + ints + _field(20, 7))
    return b"".join(_field(1, name) for name in inputs) + _field(2, output) + _field(4, op) + attributes


def _value(name: str, shape: Sequence[int]) -> bytes:
    dims = b"".join(_field(1, _field(1, length)) for length in shape)
    return _field(1, name) + _field(2, _field(1, _field(1, 1) + _field(2, dims)))


def _tensors(weights: Iterable[Any]) -> bytes:
    """Weights of a network by name, type and shape, with small random numbers."""
    rng, graph = np.random.default_rng(0), b""
    for name, code, shape in weights:
        data = (0.02 * (0.5 + rng.random(shape))).astype(_FLOATS[code]).tobytes()
        dims = b"".join(_field(1, length) for length in shape)
        graph += _field(5, dims + _field(2, code) + _field(8, name) + _field(9, data))
    return graph


def _model(nodes: Sequence[bytes], weights: Any, enters: Sequence[int], leaves: Sequence[int]) -> bytes:
    graph = b"".join(_field(1, node) for node in nodes) + _field(2, "layer")
    graph += _tensors((name, 1, shape) for name, shape in weights)
    graph += _field(11, _value("x", enters)) + _field(12, _value("y", leaves))
    return _field(1, 8) + _field(7, graph) + _field(8, _field(1, "") + _field(2, 17))


def _array(kind: str, shape: Sequence[int]) -> Any:
    """An input of an ONNX model."""
    types = {"tensor(float)": np.float32, "tensor(double)": np.float64, "tensor(float16)": np.float16}
    if kind in types:
        return np.random.default_rng(0).random(shape).astype(types[kind])
    return np.zeros(shape, dtype={"tensor(int32)": np.int32, "tensor(bool)": np.bool_}.get(kind, np.int64))


# -- the script ---------------------------------------------------------------------------------------------------


def unpack(text: str) -> bytes:
    """What was packed into the script."""
    return zlib.decompress(base64.b85decode(text))


def device_name() -> str:
    """Name of this machine's processor."""
    for place, key in (("/proc/device-tree/model", None), ("/proc/cpuinfo", "model name"), ("/proc/cpuinfo", "Model")):
        try:
            with open(place, errors="replace") as file:
                lines = file.read().strip("\0 \n").splitlines()
        except OSError:
            continue
        named = lines[:1] if key is None else [line.partition(":")[2].strip() for line in lines if line.startswith(key)]
        if named:
            return named[0]
    return platform.processor() or platform.machine()


def main(spec: dict[str, Any], arguments: Sequence[str] | None = None) -> None:
    """Time the layers and networks of ``spec``, and write the table."""
    parser = argparse.ArgumentParser(
        description="Times the layers of a network at several widths on this device, and writes a table for "
        "lightning_prune. If it is stopped, the next call goes on."
    )
    parser.add_argument("--out", default="table.json", help="file to write (%(default)s)")
    parser.add_argument("--threads", type=int, help="threads of an operator; by default the runtime's choice")
    if spec["runtime"] == "torch":
        parser.add_argument("--device", default="cpu", help="such as cuda (%(default)s)")
        parser.add_argument("--compile", action="store_true", help="compile the networks by torch.compile")
    else:
        parser.add_argument(
            "--provider", action="append", default=[], help="such as CUDAExecutionProvider; CPU if none"
        )
    given = parser.parse_args(arguments)
    runtime: Any
    if spec["runtime"] == "torch":
        runtime = Torch(given.device, given.threads, compiled=given.compile)
    else:
        runtime = OnnxRuntime(given.provider, given.threads)
    table = {
        "format": FORMAT,
        "about": runtime.about(),
        **{name: spec[name] for name in ("model", "widths", "layers", "kinds")},
        "networks": [{name: entry[name] for name in ("widths", "memory", "multiple")} for entry in spec["networks"]],
    }
    _run_all(table, spec["networks"], runtime, given.out)


def _run_all(table: dict[str, Any], networks: Sequence[Any], runtime: Any, out: str) -> None:
    """Measure, keeping in a file beside ``out`` what was found so far."""
    partial, runs = out + ".part", {}
    found = _found(partial, table)

    def time_network(number: int, seconds: float) -> float:
        if number not in runs:
            runs[number] = runtime.network(networks[number])
        return float(runtime.timer(runs[number], seconds))

    def time_layer(kind: Kind, rows: int, columns: int, seconds: float) -> float:
        return float(runtime.timer(runtime.layer(kind, rows, columns), seconds))

    shown = [0.0]

    def show(share: float) -> None:
        end = "\r" if sys.stderr.isatty() else "\n"
        if end == "\r" or share >= shown[0]:  # a log gets a line for each tenth
            print(f"{table['model']}: {100 * share:3.0f} % timed", end=end, file=sys.stderr, flush=True)
            shown[0] = share + 0.1

    measured = measure(
        table["kinds"],
        len(networks),
        time_layer,
        time_network,
        found=found,
        save=lambda now: _write(partial, {"table": table, "found": now}),
        progress=show,
    )
    table["about"]["at"] = time.strftime("%Y-%m-%d %H:%M:%S")
    _write(out, {**table, "measured": {name: measured[name] for name in ("kinds", "networks")}})
    if os.path.exists(partial):
        os.remove(partial)
    print(f"{out}: {table['model']} on {table['about']['device']}, {table['about']['runtime']}")


def _found(partial: str, table: dict[str, Any]) -> Any:
    """What an earlier call has found for the same network, device and runtime."""
    try:
        with open(partial) as file:
            stored = json.load(file)
    except (OSError, ValueError):
        return None
    return stored["found"] if stored["table"] == table else None


def _write(path: str, content: Any) -> None:
    with open(path + ".new", "w") as file:
        json.dump(content, file)
    os.replace(path + ".new", path)
