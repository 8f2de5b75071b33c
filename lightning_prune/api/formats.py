"""File formats of other runtimes: how a network is written, and run again from the file."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves

from lightning_prune.api.samples import tensors_in
from lightning_prune.extras import require

__all__ = ["FORMATS", "ONNX", "ExecuTorch", "Format", "OpenVINO", "Runner", "TorchExport"]

#: Runs a file on the arguments and keywords of ``forward``; returns the tensors among its outputs.
Runner = Callable[[tuple[Any, ...], Mapping[str, Any]], list[Tensor]]


class Format(ABC):
    """A file format."""

    #: Packages it needs, the extra that installs them, and the one whose version is told.
    packages: ClassVar[tuple[str, ...]]
    extra: ClassVar[str]
    runtime: ClassVar[str]
    #: Whether a file can take any number of samples.
    any_batch: ClassVar[bool] = True

    def require(self) -> None:
        """Raise a ModuleNotFoundError that names the extra if a package is missing."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of their imports
            for package in self.packages:
                require(package, extra=self.extra)

    def version(self) -> str:
        """The runtime with its version."""
        return f"{self.runtime} {version(self.runtime)}"

    @abstractmethod
    def write(self, program: ExportedProgram, file: Path) -> None:
        """Convert a traced network and write it."""

    @abstractmethod
    def runner(self, file: Path) -> Runner:
        """Load the file into its runtime, on as many threads as PyTorch uses."""


class ONNX(Format):
    """ONNX, run by onnxruntime."""

    packages, extra, runtime = ("onnx", "onnxscript", "onnxruntime"), "export", "onnxruntime"

    def write(self, program: ExportedProgram, file: Path) -> None:
        """Write a file; weights above 2 GB, which it cannot hold, go to a second one beside it."""
        converted = torch.onnx.export(program, dynamo=True, verbose=False)
        assert converted is not None
        converted.save(str(file))

    def runner(self, file: Path) -> Runner:
        """Load it with graph optimizations, as they are on by default."""
        session = self._session(file)
        names = [value.name for value in session.get_inputs()]

        def run(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
            arrays = (tensor.numpy() for tensor in tensors_in((args, kwargs)))
            return [torch.as_tensor(out) for out in session.run(None, dict(zip(names, arrays, strict=True)))]

        return run

    def inputs(self, file: Path) -> list[str]:
        """Names of a file's inputs."""
        return [value.name for value in self._session(file).get_inputs()]

    def _session(self, file: Path) -> Any:
        runtime = require("onnxruntime", extra=self.extra)
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3  # errors
        return runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


class TorchExport(Format):
    """The graph of `torch.export`, run by PyTorch without the network's code."""

    packages, extra, runtime = (), "", "torch"

    def write(self, program: ExportedProgram, file: Path) -> None:
        """Write the graph and its weights."""
        torch.export.save(program, file)

    def runner(self, file: Path) -> Runner:
        """Load it as a module."""
        program = torch.export.load(file)
        module = program.module()

        @torch.no_grad()
        def run(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
            return tensors_in(module(*args, **kwargs))

        return run


class ExecuTorch(Format):
    """ExecuTorch for phones and small devices; XNNPACK computes what it can."""

    packages, extra, runtime = ("executorch.exir", "executorch.runtime"), "executorch", "executorch"
    any_batch = False  # memory is planned for the largest batch

    def write(self, program: ExportedProgram, file: Path) -> None:
        """Lower to XNNPACK and write a file."""
        exir = require("executorch.exir", extra=self.extra)
        xnnpack = require("executorch.backends.xnnpack.partition.xnnpack_partitioner", extra=self.extra)
        lowered = exir.to_edge_transform_and_lower(program, partitioner=[xnnpack.XnnpackPartitioner()])
        file.write_bytes(lowered.to_executorch().buffer)

    def runner(self, file: Path) -> Runner:
        """Load it into the runtime's Python bindings."""
        portable: Any = require("executorch.extension.pybindings.portable_lib", extra=self.extra)
        portable._unsafe_reset_threadpool(torch.get_num_threads())  # nothing of it is running
        runtime = require("executorch.runtime", extra=self.extra)
        method = runtime.Runtime.get().load_program(str(file)).load_method("forward")
        return lambda args, kwargs: [out.clone() for out in method.execute(tree_leaves((args, kwargs)))]


class OpenVINO(Format):
    """OpenVINO's intermediate representation, by way of ONNX, with weights and computations in float32."""

    packages, extra, runtime = ("openvino", "onnx", "onnxscript"), "openvino", "openvino"

    def write(self, program: ExportedProgram, file: Path) -> None:
        """Write a graph and its weights (``.bin``), which are not halved to float16 as by default."""
        openvino: Any = require("openvino", extra=self.extra)
        onnx = file.with_suffix(".onnx")
        try:
            ONNX().write(program, onnx)
            openvino.save_model(openvino.Core().read_model(str(onnx)), str(file), compress_to_fp16=False)
        finally:
            for part in file.parent.glob(f"{onnx.name}*"):
                part.unlink()

    def runner(self, file: Path) -> Runner:
        """Compile it for the processor in float32; by default, processors that have bfloat16 compute in that."""
        openvino: Any = require("openvino", extra=self.extra)
        options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        compiled = openvino.Core().compile_model(str(file), "CPU", options)

        def run(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
            outs = compiled([tensor.numpy() for tensor in tensors_in((args, kwargs))])
            return [torch.as_tensor(outs[port].copy()) for port in compiled.outputs]

        return run


#: The formats by the suffix of their files.
FORMATS: dict[str, Format] = {".onnx": ONNX(), ".pt2": TorchExport(), ".pte": ExecuTorch(), ".xml": OpenVINO()}
