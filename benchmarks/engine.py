"""Structure analysis of real and pretrained networks, compared with Torch-Pruning.

- ``python -m benchmarks.engine prune`` compares the time of `lightning_prune.prune` with Torch-Pruning.
- ``... compare`` compares the time of analysis and cut alone; both run in turn in one process, and need ``pip install
  torch-pruning==1.6.1``.
- ``... survey`` removes half of every group of every torchvision network and of some others, and checks the result
  (needs ``timm`` and ``transformers`` for those families).
- ``... pictures`` draws the structure of two networks.
- ``... pretrained`` tests pretrained ResNets before and after removing their dead channels.
- ``... random`` cuts random networks, and ``... wrong`` networks on which indices are easily confused, also with
  Torch-Pruning (both from the root of the repository, because they use networks of the tests).
"""

from __future__ import annotations

import argparse
import gc
import json
import time
import warnings
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import EVIDENCE, add_resume, command, machine
from benchmarks.drawn import draw_networks
from benchmarks.pretrained import pretrained
from benchmarks.survey import half, survey
from benchmarks.survey_networks import torchvision_model
from benchmarks.wrong import wrong
from lightning_prune import prune
from lightning_prune.reporting import Inspection
from lightning_prune.structure import TracedModel, trace
from lightning_prune.surgery import cut

Method = Callable[[nn.Module, Tensor], None]

COMPARED = ("resnet18", "resnet50", "densenet121", "vgg16_bn")


# -- beside Torch-Pruning ---------------------------------------------------------------------------------------------


def ours(model: nn.Module, x: Tensor) -> None:
    """Analyse and cut half of every group."""
    structure = trace(TracedModel.of(model, x))
    kept = half(structure)
    cut(model, structure.axes(kept), factors=structure.factors(kept))


def theirs(model: nn.Module, x: Tensor) -> None:
    """The same with Torch-Pruning."""
    _torch_pruning(model, x, "RandomImportance")


def called(model: nn.Module, x: Tensor) -> None:
    """What a user calls: half of the units of every group by L1, checked, with a report."""
    prune(model, x, pruning_ratio=0.5)


def called_theirs(model: nn.Module, x: Tensor) -> None:
    """What a user of Torch-Pruning calls; it has neither check nor report."""
    _torch_pruning(model, x, "MagnitudeImportance", p=1)


def _torch_pruning(model: nn.Module, x: Tensor, importance: str, **options: Any) -> None:
    import torch_pruning

    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    how = getattr(torch_pruning.importance, importance)(**options)
    torch_pruning.pruner.BasePruner(model, x, importance=how, pruning_ratio=0.5, ignored_layers=[last]).step()


def seconds(method: Method, name: str) -> float:
    """Processor time, on one thread, of one analysis and cut of a fresh network: other processes do not count."""
    model, x = torchvision_model(name).eval(), torch.randn(1, 3, 224, 224)
    gc.collect()
    start = time.process_time()
    method(model, x)
    return time.process_time() - start


def compare(repeats: int, mine_of: Method, rival_of: Method, what: str) -> tuple[dict[str, Any], str]:
    """Both in turn, several times; the median of each and of their ratios."""
    rows = {}
    torch.set_num_threads(1)
    for name in COMPARED:
        (
            seconds(mine_of, name),
            seconds(rival_of, name),
        )  # what is imported and cached at first use is no matter of either
        pairs = [(seconds(mine_of, name), seconds(rival_of, name)) for _ in range(repeats)]
        mine, rival = (median(side) for side in zip(*pairs, strict=True))
        rows[name] = {"ours": mine, "torch_pruning": rival, "ratio": median(a / b for a, b in pairs), "pairs": pairs}
        print(name, {key: round(value, 3) for key, value in rows[name].items() if key != "pairs"}, flush=True)
    lines = ["| network | lightning_prune (s) | Torch-Pruning 1.6.1 (s) | ratio |", "|---|---|---|---|"]
    lines += [f"| {n} | {r['ours']:.3f} | {r['torch_pruning']:.3f} | {r['ratio']:.3f} |" for n, r in rows.items()]
    text = f"{what}: processor time, one thread, median of {repeats} runs, in turn."
    return {"rows": rows, "threads": torch.get_num_threads()}, "\n".join([text, "", *lines])


def pictures() -> None:
    """What can be pruned in ResNet-50 and DenseNet-121."""
    for name in ("resnet50", "densenet121"):
        structure = trace(TracedModel.of(torchvision_model(name), torch.zeros(2, 3, 224, 224)))
        Inspection(structure).figure().savefig(EVIDENCE / "engine" / f"{name}.png")


def main() -> None:
    """Run, print, and write to ``docs/evidence/engine``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("compare", "pictures", "pretrained", "prune", "random", "survey", "wrong"))
    parser.add_argument(
        "names", nargs="*", help="networks or families to survey, or depths of pretrained ResNets; default: all"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--count", type=int, default=10_000, help="number of random networks")
    parser.add_argument("--first", type=int, default=0, help="their first seed")
    parser.add_argument("--minutes", type=float, default=60.0, help="time limit for random networks")
    add_resume(parser)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.what == "pictures":
        pictures()
        return
    work = {
        "compare": lambda: compare(options.repeats, ours, theirs, "Analysis and cut of half of every group"),
        "prune": lambda: compare(
            options.repeats, called, called_theirs, "Half of the units of every group, by L1, as called"
        ),
        "pretrained": lambda: pretrained([int(depth) for depth in options.names]),
        "random": lambda: draw_networks(options.count, options.first, options.minutes, resume=options.resume),
        "survey": lambda: survey(options.names, resume=options.resume),
        "wrong": wrong,
    }
    result, table = work[options.what]()
    # With `--resume` these are made in pieces, whose rows are kept together.
    pieces = options.what in ("random", "survey")
    line = f"python -m benchmarks.engine {options.what}" if pieces else command("benchmarks.engine")
    result = {"command": line, "machine": machine(), **result}
    header = f"`{result['command']}` on {result['machine']['processor']}, {result['machine']['cores']} cores."
    folder = EVIDENCE / "engine"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{options.what}.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / f"{options.what}.md").write_text(f"{header}\n\n{table}\n")
    print(f"{header}\n\n{table}")


if __name__ == "__main__":
    main()
