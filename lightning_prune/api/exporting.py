"""Export to other runtimes, verified against the network before the file is put in its place."""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.fx import GraphModule

from lightning_prune.api.formats import FORMATS, Format
from lightning_prune.api.inspecting import traced_model_for
from lightning_prune.api.samples import Samples, largest_difference, milliseconds, tensors_in
from lightning_prune.errors import PruningError
from lightning_prune.reporting import Exported
from lightning_prune.structure.attention_calls import fastpath_disabled
from lightning_prune.structure.traced_model import first_line, require_network, written
from lightning_prune.structure.tracing import forked_rng

__all__ = ["ExportError", "export", "program_of"]

#: Largest difference of an output from the network's, as a share of its largest magnitude.
_TOLERANCE = 1e-4
_FLOATS = (torch.float32, torch.float64)
_FOLLOWS = (
    "It follows PyTorch's operators only: Python code that decides by the values of tensors (`if x.sum() > 0:`) has to "
    "be written with `torch.where` or `torch.cond`, or to be left out of `forward`."
)


#: A file as it was verified, and what runs it on one sample.
_Runnable: TypeAlias = tuple[Exported, Callable[[], object]]


class ExportError(PruningError, RuntimeError):
    """Raised when a network cannot be exported, or the file does not compute what the network computes."""


def export(model: nn.Module, file: str | Path, example: Any = None, *, dense: nn.Module | None = None) -> Exported:
    """Export a network to a file for another runtime, and verify it there.

    The suffix says the format:

    - ``.onnx``: ONNX, run by onnxruntime (extra ``export``),
    - ``.pt2``: the graph of `torch.export`, which PyTorch loads without the network's code,
    - ``.pte``: ExecuTorch with XNNPACK, for phones (extra ``executorch``),
    - ``.xml`` with ``.bin``: OpenVINO (extra ``openvino``).

    The network is exported in eval mode, as a copy on the CPU. The file is written beside its place, run on the
    example, and moved there only if every output differs from the network's by at most 1e-4 of its largest magnitude.
    It takes batches of any size where the network and the format allow it, else one sample at a time.

    Args:
        model: A pruned network, or a dense one: a LightningModule or any module, compiled or not. It is not modified.
        file: The file to write; its suffix is the format.
        example: What ``forward`` takes, on which the file is verified: a batch of real samples, two or more; a tensor,
            a tuple of arguments, a dict of keywords, or a training batch. By default a LightningModule's
            ``example_input_array``.
        dense: A second network, such as the one before pruning, which is exported for comparison; its file is not
            kept.

    Returns:
        Size, latency and largest difference, as a table that can be printed.

    Raises:
        ValueError: If the suffix is unknown, or the weights are not in float32 or float64.
        StructureError: If there is no example, or the network fails on it.
        ExportError: If the network cannot be exported, or the file computes something else. No file is left, and an
            earlier one stays.
        ModuleNotFoundError: If a package is missing; the message names the extra.

    Example:
        >>> import lightning_prune, tempfile, torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> report = lightning_prune.prune(net, torch.zeros(2, 4), pruning_ratio=0.5)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     exported = lightning_prune.export(net, f"{folder}/small.pt2", torch.randn(8, 4))
        >>> exported.difference < 1e-4, exported.batch_size is None
        (True, True)
    """
    path, written_as = Path(file), _format_of(Path(file))
    networks = [model] if dense is None else [model, dense]
    for network in networks:
        _require_floats(network)
    written_as.require()
    if not path.parent.is_dir():
        raise FileNotFoundError(f"export: expected a folder for {path.name}, got {str(path.parent)!r}, which is none.")
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        files = []
        for name, network in zip(("network", "dense"), networks, strict=False):
            part = Path(folder, name, path.name)
            part.parent.mkdir()
            files.append(_exported(network, written_as, part, example))
        latencies = milliseconds([run for _, run in files])
        results = [replace(result, latency_ms=ms) for (result, _), ms in zip(files, latencies, strict=True)]
        for found in sorted(Path(folder, "network").iterdir(), key=lambda found: found.name == path.name):
            found.replace(path.with_name(found.name))  # the file itself last
    own, *others = (replace(result, file=path) for result in results)
    return replace(own, dense=others[0] if others else None)


def _format_of(file: Path) -> Format:
    if file.suffix not in FORMATS:
        known = ", ".join(f"`{suffix}` ({kind.runtime})" for suffix, kind in FORMATS.items())
        raise ValueError(f"export: expected a file whose suffix is one of {known}, got {file.name!r}.")
    return FORMATS[file.suffix]


def _require_floats(model: nn.Module) -> None:
    require_network(model)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise ValueError(f"export: expected a network with weights, got {name!r} on the meta device.")
        if tensor.is_floating_point() and tensor.dtype not in _FLOATS:
            raise ValueError(
                f"export: expected weights in float32 or float64, got {tensor.dtype} for {name!r}. Give "
                "`copy.deepcopy(model).float()`, and let the runtime choose a smaller type."
            )


def _exported(model: nn.Module, written_as: Format, file: Path, example: Any) -> _Runnable:
    """Write one network to a file and verify it."""
    traced = traced_model_for(model, example)
    samples = Samples(model, traced.calls[0], repeat=written_as.any_batch)
    _require_repeatable(model, samples)
    module = traced.copy("real").module.eval().requires_grad_(False).cpu()
    if samples.at_once == 1 < samples.number and written_as.any_batch:
        try:
            return _attempt(module, samples, None, written_as, file)
        except ExportError:  # its batch size is fixed
            for left in file.parent.iterdir():
                left.unlink()
    return _attempt(module, samples, samples.at_once, written_as, file)


def _attempt(module: nn.Module, samples: Samples, batch_size: int | None, written_as: Format, file: Path) -> _Runnable:
    """Write a copy of the network to a file for one batch size, or for any, and compare it with the network.

    Raises:
        ExportError: If it cannot be written, or computes something else.
    """
    name, threads, runtime = type(module).__name__, torch.get_num_threads(), written_as.version()
    cure = f"Try another format: {', '.join(f'`{suffix}`' for suffix in FORMATS if suffix != file.suffix)}."
    with _stage(f"`torch.export` cannot follow {name}", _FOLLOWS):
        program = program_of(module, samples, batch_size)
    with _stage(f"{name} cannot be written as `{file.suffix}`", cure):
        written_as.write(program, file)
    parts = [(0, samples.number), (0, 1)] if batch_size is None else _parts(samples.number, batch_size)
    with _stage(f"{runtime} cannot run {name}", cure):
        run = written_as.runner(file)
        difference = max(largest_difference(run(*samples.arguments(*part)), samples.outputs(*part)) for part in parts)
        args, kwargs = samples.arguments(0, batch_size or 1)
    if not difference <= _TOLERANCE:
        raise ExportError(
            f"export: expected outputs that differ from those of {name} by at most {_TOLERANCE:.0e} of the largest, "
            f"got {difference:.1e} in {runtime}. No file is left. {cure}"
        )
    size = sum(found.stat().st_size for found in file.parent.iterdir())
    result = Exported(file, size, runtime, threads, batch_size, samples.number, difference, latency_ms=math.nan)
    return result, partial(run, args, kwargs)


def program_of(module: nn.Module, samples: Samples, batch_size: int | None) -> ExportedProgram:
    """Trace a module by `torch.export`.

    Raises:
        ValueError: If it should take batches of any size, and does not.
    """
    args, kwargs = samples.arguments(0, batch_size or samples.number)
    shapes, batched = ShapesCollection(), []  # type: ignore[no-untyped-call]
    if batch_size is None:
        batched = [leaf for leaf in tensors_in((args, kwargs)) if samples.has_samples(leaf)]
    for leaf in batched:
        shapes[leaf] = {0: Dim.AUTO}
    with fastpath_disabled(), torch.no_grad(), forked_rng():
        dynamic = shapes.dynamic_shapes(module, args, kwargs)  # type: ignore[no-untyped-call]
        program = torch.export.export(module, args, kwargs, dynamic_shapes=dynamic)
    if batched and not program.range_constraints:
        raise ValueError("its batch size is fixed")
    for graph in program.graph_module.modules():
        for node in graph.graph.nodes if isinstance(graph, GraphModule) else ():
            node.meta.pop("stack_trace", None)  # lines of source code, with the folders of this machine
    return program


def _parts(samples: int, batch_size: int) -> list[tuple[int, int]]:
    return [(begin, begin + batch_size) for begin in range(0, samples, batch_size)]


def _require_repeatable(model: nn.Module, samples: Samples) -> None:
    """Raise an error if the network returns no tensors, or other ones for the same samples."""
    name, whole = type(written(model)).__name__, (0, samples.number)
    outputs = samples.outputs(*whole)
    if not outputs:
        raise ExportError(f"export: expected tensors from `forward` of {name}, got none.")
    difference = largest_difference(samples.outputs_again(*whole, seed=1), outputs)
    if not difference <= _TOLERANCE:
        raise ExportError(
            f"export: {name} returns other outputs when it is run again on the same samples (difference "
            f"{difference:.1e}), so no file can be verified. Leave random numbers, and what one call stores for the "
            "next, out of `forward` in eval mode."
        )


@contextmanager
def _stage(problem: str, cure: str) -> Iterator[None]:
    """Convert whatever an exporter or a runtime raises into an ExportError, and silence its warnings."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about its own inner workings
            yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        reason: BaseException = error
        while reason.__cause__ is not None:
            reason = reason.__cause__
        raise ExportError(
            f"export: {problem} ({type(reason).__name__}: {first_line(reason)}). No file is left. {cure}"
        ) from error
