"""Networks in processes without Lightning: pruned and saved in the first, built and loaded in the second.

``python -m benchmarks.portable_process prune|load FOLDER NETWORK=FAMILY...`` prints a row per network.
"""

from __future__ import annotations

import hashlib
import json
import resource
import runpy
import sys
import time
import warnings
from pathlib import Path
from typing import Any


class NoLightning:
    """Finds no Lightning, as where it is not installed."""

    packages = ("lightning", "pytorch_lightning", "lightning_fabric", "jsonargparse")

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        """Raise what an import of a missing package raises."""
        if name.partition(".")[0] in self.packages:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, NoLightning())  # type: ignore[arg-type]

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import lightning_prune  # noqa: E402
from benchmarks.survey_networks import Network, build, coordinates_in_double, settle  # noqa: E402
from lightning_prune.planning import Scope, Target, make_plan, select  # noqa: E402
from lightning_prune.scoring import L1, score_groups  # noqa: E402
from lightning_prune.structure import Size, trace  # noqa: E402
from lightning_prune.surgery import transaction  # noqa: E402
from lightning_prune.surgery.tensors import named  # noqa: E402

#: Share of the units that is removed from each layer.
_RATIO = 1 / 3
_MEMORY = 18 * 2**30
#: Parameters of the largest network that is rebuilt, too, for which two must fit into memory.
_REBUILT = 200_000_000


def prune(network: Network, folder: Path) -> dict[str, Any]:
    """Prune a network of other weights than it is built with, and save it with its inputs and outputs."""
    model = network.model.eval()  # detectors train with targets only
    torch.manual_seed(1)
    settle(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.1 * torch.rand_like(parameter))
    before = sum(parameter.numel() for parameter in model.parameters())
    structure = trace(network.traced())
    target, selected = Target.of(_RATIO, None).resolve(structure, select(structure)[0])
    scores = score_groups(L1(), [structure.group(name) for name in selected], named(model), None)
    plan = make_plan(structure, scores, target, 1.0, Scope(), Size.of(structure))
    call = network.traced().calls[0]
    with transaction(model, run=lambda: model(*call.args, **call.kwargs)) as change:
        change.keep(structure, plan.kept)
    began = time.perf_counter()
    lightning_prune.save(model, folder / "small.safetensors")
    seconds = time.perf_counter() - began
    torch.save((network.args, dict(network.kwargs), outputs(network), digest(model)), folder / "outputs.pt")
    if before <= _REBUILT:
        lightning_prune.rebuild(model, folder / "small.py")
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    size = (folder / "small.safetensors").stat().st_size
    after = sum(parameter.numel() for parameter in model.parameters())
    return {"params": before, "left": after / before, "save_s": seconds, "bytes": size, "beside": size - weights}


def load(network: Network, folder: Path, name: str, family: str) -> dict[str, Any]:
    """Load the file into a newly built network, and compare the outputs; then with what `rebuild` wrote, in another."""
    args, kwargs, expected, weights = torch.load(folder / "outputs.pt", weights_only=True)
    network = Network(network.model, args, None, kwargs, network.heads)
    dense = outputs(network)
    began = time.perf_counter()
    lightning_prune.load(network.model, folder / "small.safetensors")
    seconds = time.perf_counter() - began
    assert not [name for name in sys.modules if name.partition(".")[0] in NoLightning.packages]
    found, own = outputs(network), digest(network.model)
    rebuilt = None
    if (folder / "small.py").is_file():
        fresh = build(name, family).model
        runpy.run_path(str(folder / "small.py"))["load"](fresh, folder / "small.safetensors")
        rebuilt = same(outputs(Network(fresh, args, None, kwargs, network.heads)), found)
    return {
        "load_s": seconds,
        "equal": same(found, expected),
        "dense_equal": same(dense, expected),
        "rebuilt": rebuilt,
        "weights_equal": own == weights,
        "difference": difference(found, expected),
        "torch": torch.__version__,
    }


def digest(model: nn.Module) -> str:
    """A hash of names, shapes and bits of the weights."""
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        found.update(f"{name} {[*tensor.shape]} {tensor.dtype}".encode())
        found.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def difference(first: list[Tensor], second: list[Tensor]) -> float:
    """The largest difference, relative to the largest output."""
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if a.numel()]
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-300)) for a, b in pairs)


def outputs(network: Network) -> list[Tensor]:
    """What comes out in eval mode."""
    with torch.no_grad(), torch.random.fork_rng(devices=()):
        torch.manual_seed(2)
        return network()


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    """Whether all outputs are equal, bit for bit."""
    return len(first) == len(second) and all(
        a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(first, second, strict=True)
    )


def main(step: str, name: str, family: str, folder: Path) -> dict[str, Any]:
    """A row, or why there is none."""
    try:
        with coordinates_in_double(family):
            network = build(name, family)
            return prune(network, folder) if step == "prune" else load(network, folder, name, family)
    except Exception as failure:
        text = (str(failure).strip().splitlines() or [""])[0][:200]
        return {"failure": f"{step}: {type(failure).__name__}: {text}"}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY, _MEMORY))
    torch.set_num_threads(1)
    step, folder, *networks = sys.argv[1:]
    for name, _, family in (network.partition("=") for network in networks):
        own = Path(folder) / name
        own.mkdir(exist_ok=True)
        print(json.dumps({"network": name, **main(step, name, family, own)}), flush=True)
