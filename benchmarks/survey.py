"""Structure analysis of networks of other libraries: half of every group is removed, and everything is checked."""

from __future__ import annotations

import contextlib
import json
import math
import re
import resource
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any
from unittest import mock

import numpy as np
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import EVIDENCE, computed, fill
from lightning_prune.reporting import Inspection
from lightning_prune.structure import Axes, Call, Frozen, Structure, TracedModel, trace
from lightning_prune.surgery import cut, mask

ROWS = EVIDENCE / "engine" / "survey.jsonl"

#: Below this a difference in float64 is one of rounding.
_EXACT = 1e-10

#: timm's networks, many kinds and small ones; timm is no dependency of the package (``pip install timm``).
TIMM = (
    *("resnet26d", "resnetv2_50", "res2net50_26w_4s", "resnest14d", "skresnet18", "seresnet50", "ecaresnet26t"),
    *("dpn68", "dla34", "hrnet_w18_small", "cspresnet50", "darknet53", "ese_vovnet19b_dw", "xception41"),
    *("inception_v4", "inception_resnet_v2", "ghostnet_100", "mobilenetv4_conv_small", "tf_efficientnet_b0"),
    *("mixnet_s", "rexnet_100", "repvgg_a0", "nfnet_l0", "convnextv2_atto", "convmixer_768_32", "mobileone_s0"),
    *("fastvit_t8", "edgenext_xx_small", "efficientformer_l1", "poolformer_s12", "levit_128s", "mobilevit_xxs"),
    *("deit_tiny_patch16_224", "beit_base_patch16_224", "mixer_s32_224", "resmlp_12_224", "gmlp_s16_224"),
    *("pvt_v2_b0", "xcit_nano_12_p16_224", "tiny_vit_5m_224", "focalnet_tiny_srf", "davit_tiny"),
)

#: What a network may take: seconds, and bytes of memory.
_SECONDS, _MEMORY = 600, 16 * 2**30

#: What torchvision's detectors choose their boxes from.
_HEADS = ("head", "rpn.head", *(f"roi_heads.{part}_predictor" for part in ("box", "mask", "keypoint")))

#: Side of the images that detectors get, and that those that resize them make of them.
_DETECTION = 128

#: Smallest share of a network's parameters that the table of reasons counts.
_SHOWN = 0.005

#: The folder of torchvision that a network's builder lies in, and its family here.
_FOLDERS = {"segmentation": "segmentation", "detection": "detection", "video": "video", "optical_flow": "optical flow"}


class Encoder(nn.Module):
    """PyTorch's own transformer encoder at the size of BERT (base), with embeddings and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(30522, 768), nn.Parameter(0.02 * torch.randn(128, 768))
        layer = nn.TransformerEncoderLayer(768, 12, 3072, activation="gelu", batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 12)
        self.head = nn.Linear(768, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``(batch, 2)`` of ``tokens`` ``(batch, positions)``."""
        hidden: Tensor = self.layers(self.words(tokens) + self.places[: tokens.shape[1]])
        logits: Tensor = self.head(hidden[:, 0])
        return logits


@dataclass(frozen=True)
class Network:
    """A network and how it is run.

    Attributes:
        model: The network.
        args: Arguments in eval mode, one sample (two where one would be too few for batch norms).
        train: Arguments in train mode, if they are others.
        kwargs: Keyword arguments in both.
        heads: Modules whose outputs are compared instead of the network's: what detectors choose from them hangs on
            the order of scores, and untrained ones have many that are equal.
    """

    model: nn.Module
    args: tuple[Any, ...]
    train: tuple[Any, ...] | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    heads: tuple[str, ...] = ()

    def traced(self) -> TracedModel:
        """What the engine needs to know."""
        calls = (
            Call(self.args, self.kwargs),
            Call(self.args if self.train is None else self.train, self.kwargs, training=True),
        )
        return TracedModel(self.model, calls)

    def __call__(self, *, training: bool = False) -> list[Tensor]:
        """Every tensor of the output."""
        args = self.train if training and self.train is not None else self.args
        found: list[Any] = []
        watched = [m for name, m in self.model.named_modules() if name in self.heads and not training]
        handles = [m.register_forward_hook(lambda _module, _args, out: found.append(out)) for m in watched]
        out = self.model.train(training)(*args, **self.kwargs)
        for handle in handles:
            handle.remove()
        leaves = tree_leaves(found or out)
        return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


# -- which networks there are -----------------------------------------------------------------------------------------


def catalogue() -> dict[str, list[str]]:
    """Names by family: all that torchvision has, some of timm's, encoders of text."""
    families: dict[str, list[str]] = {"classification": [], **{family: [] for family in _FOLDERS.values()}}
    for name in torchvision.models.list_models():
        folder = torchvision.models.get_model_builder(name).__module__.split(".")[2]
        if folder != "quantization":
            families[_FOLDERS.get(folder, "classification")].append(name)
    return {**families, "timm": list(TIMM), "encoders": ["nn.TransformerEncoder", "BertModel"]}


def build(name: str, family: str) -> Network:
    """An untrained network in float64, and an example."""
    torch.manual_seed(0)
    if family == "timm":
        import timm

        return Network(timm.create_model(name).double(), (_image(2, 224),))
    if family == "encoders":
        return _encoder(name)
    model = torchvision_model(name).double()
    if family == "detection":
        images = [*_image(2, _DETECTION)]
        target = {"boxes": torch.tensor([[20.0, 30.0, 100.0, 110.0]]).double(), "labels": torch.tensor([1])}
        target["masks"] = torch.ones(1, _DETECTION, _DETECTION, dtype=torch.uint8)
        target["keypoints"] = torch.tensor([[[50.0, 60.0, 1.0]] * 17])  # it wants them in float32
        return Network(model, (images,), (images, [target, target]), heads=_HEADS)
    if family == "video":
        # S3D and MViT have the lengths of their pooling windows and positions built in.
        frames, side = (16, 224) if name.startswith(("s3d", "mvit")) else (8, 64)
        return Network(model, (torch.randn(1, 3, frames, side, side, dtype=torch.float64),))
    if family == "optical flow":
        return Network(model, tuple(_image(1, 128) for _ in range(2)))
    return Network(model, (_image(2, 299 if name == "inception_v3" else 128 if family == "segmentation" else 224),))


def torchvision_model(name: str) -> nn.Module:
    """An untrained torchvision network."""
    options: dict[str, Any] = {"weights": None}
    if any(part in name for part in ("rcnn", "retinanet", "fcos", "ssd", "deeplab", "fcn", "lraspp")):
        options["weights_backbone"] = None
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    if any(part in name for part in ("rcnn", "retinanet", "fcos")):  # the others have their size built in
        options |= {"min_size": _DETECTION, "max_size": _DETECTION}
    if "rcnn" in name:  # few regions: their heads are most of the work
        options |= {"rpn_pre_nms_top_n_test": 50, "rpn_post_nms_top_n_test": 20, "box_detections_per_img": 5}
        options |= {"rpn_post_nms_top_n_train": 50, "box_batch_size_per_image": 32}
    return torchvision.models.get_model(name, **options)


def _encoder(name: str) -> Network:
    tokens = torch.randint(30522, (2, 32))
    if name == "nn.TransformerEncoder":
        return Network(Encoder().double(), (tokens,))
    from transformers import BertConfig, BertModel

    model = BertModel(BertConfig(attn_implementation="eager")).double()
    return Network(model, (), kwargs={"input_ids": tokens, "return_dict": False})


def _image(n: int, side: int) -> Tensor:
    return torch.randn(n, 3, side, side, dtype=torch.float64)


# -- one network ------------------------------------------------------------------------------------------------------


def half(structure: Structure) -> dict[str, tuple[int, ...]]:
    """A drawn half of every group."""
    draw = np.random.default_rng(0)
    return {g.name: tuple(sorted(draw.permutation(g.width)[: (g.width + 1) // 2].tolist())) for g in structure.groups}


@torch.no_grad()
def settle(model: nn.Module) -> None:
    """Numbers that matter: no statistic, scale, bias or head that starts out constant stays so."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point() and tensor.numel() > 1 and bool((tensor == tensor.flatten()[0]).all()):
            start = 1.0 if tensor.flatten()[0] else 0.0  # a layer scale of 1e-6 would hide what it scales
            tensor.copy_(start + 0.1 * torch.randn_like(tensor))


def _uneven(module: nn.Module) -> bool:
    """Whether a norm's statistics run over units, so that a cut leaves others than a mask does."""
    if isinstance(module, nn.GroupNorm):
        return module.num_groups < module.num_channels
    return isinstance(module, (nn.LayerNorm, nn.RMSNorm)) or type(module).__name__ == "GlobalResponseNorm"


@contextlib.contextmanager
def still_norms(model: nn.Module) -> Iterator[None]:
    """Norms over units without their statistics: weight · x + bias."""

    def affine(module: Any, args: tuple[Tensor, ...], _: Tensor) -> Tensor:
        x, shape = args[0], [-1]
        if isinstance(module, nn.GroupNorm) or type(module).__name__.endswith("Norm2d"):
            shape = [-1, *[1] * (x.dim() - 2)]
        shape = list(getattr(module, "wb_shape", shape))  # timm's global response norm
        for name, combine in (("weight", torch.mul), ("bias", torch.add)):
            if getattr(module, name, None) is not None:
                x = combine(x, getattr(module, name).view(shape))
        return x

    handles = [module.register_forward_hook(affine) for module in model.modules() if _uneven(module)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def outputs(network: Network, axes: Axes | None = None) -> list[Tensor]:
    """What comes out in eval mode, norms stilled; with slices set to zero for the time being."""
    with torch.no_grad(), still_norms(network.model), contextlib.ExitStack() as stack:
        if axes is not None:
            stack.enter_context(mask(network.model, axes))
        return network()


def difference(expected: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """Largest difference, as a share of the largest number of each output."""
    if [t.shape for t in expected] != [t.shape for t in found]:
        return float("inf")
    pairs = [(a, b) for a, b in zip(expected, found, strict=True) if a.numel()]
    return max(float((a - b).abs().max() / a.abs().max().clamp(min=1e-300)) for a, b in pairs)


def reason(frozen: Frozen) -> str:
    """Why an axis is frozen, without the place and the numbers."""
    text = re.sub(r" in `[^`]*`", "", frozen.reason)
    return re.sub(r"[\d, ]*\d", " n", text).strip()


def counted_macs(network: Network) -> float:
    """MACs of one sample by PyTorch's own counter, which does not know every fused operator."""
    one = replace(network, args=_first(network.args), kwargs=_first(network.kwargs))
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        one()
    return counter.get_total_flops() / 2


def _first(tree: Any) -> Any:
    """The first sample of every tensor, and of every list."""
    if isinstance(tree, (Tensor, list)):
        return tree[:1]
    if isinstance(tree, tuple):
        return tuple(map(_first, tree))
    return {name: _first(value) for name, value in tree.items()} if isinstance(tree, dict) else tree


def examine(network: Network) -> dict[str, Any]:
    """Trace, cut half of every group, compare with the mask, run in both modes, step back, count."""
    model = network.model
    settle(model)
    start = time.perf_counter()
    structure = trace(network.traced())
    row: dict[str, Any] = {"groups": len(structure.groups), "seconds": time.perf_counter() - start}
    before = structure.cost.params(structure.widths)
    counted = sum(p.numel() for p in model.parameters())
    kept = half(structure)
    axes, widths = structure.axes(kept), {name: len(units) for name, units in kept.items()}
    dense, expected = outputs(network), outputs(network, axes)
    cut(model, axes)
    row["error"] = difference(expected, outputs(network))
    row["effect"] = difference(dense, expected)
    row["stilled"] = any(map(_uneven, model.modules()))
    after = sum(p.numel() for p in model.parameters())
    row["params_agree"] = (before, structure.cost.params(widths)) == (counted, after)
    row["macs_counted"] = counted_macs(network)
    row["macs_predicted"] = structure.cost.macs(widths)
    losses = network(training=True)
    torch.stack([loss.square().mean() for loss in losses if loss.requires_grad]).sum().backward()
    row["trained"] = sum(p.grad is not None for p in model.parameters()) / sum(1 for _ in model.parameters())
    row |= {"params": before, "left": after / before, "reached": Inspection(structure).reachable}
    row["frozen"] = dict(Counter(reason(f) for f in structure.frozen).most_common())
    row["out_of_reach"] = out_of_reach(structure, [name for name, _ in model.named_parameters()])
    return row


def out_of_reach(structure: Structure, parameters: Sequence[str]) -> dict[str, float]:
    """Share of the parameters that lie on no axis that can shrink, by the reason of the axis that produces them."""
    free = Counter[tuple[str, int]]()
    for member in (member for group in structure.groups for member in group.members):
        free[member.tensor, member.dim] += member.index.size
    reasons = {frozen.tensor: reason(frozen) for frozen in reversed(structure.frozen)}
    lost = Counter[str]()
    for name in parameters:
        shape = structure.cost.shapes[name]
        why = reasons.get(name, "lies along another frozen axis")
        lost[why] += math.prod(n - free[name, dim] for dim, n in enumerate(shape))
    total = sum(math.prod(structure.cost.shapes[name]) for name in parameters)
    return {why: n / total for why, n in lost.most_common() if n}


# -- all of them ------------------------------------------------------------------------------------------------------


def survey(names: Sequence[str], *, resume: bool) -> tuple[dict[str, Any], str]:
    """Every network, or those named (a family's name stands for its networks).

    Each row is stored as soon as it is there; with `resume`, those that are stored are taken.
    """
    jobs = [
        {"network": name, "family": family}
        for family, members in catalogue().items()
        for name in members
        if not names or name in names or family in names
    ]
    run = computed(jobs, lambda job: _apart(job["network"], job["family"]), ROWS, resume=resume)
    rows = {row["network"]: row for row in run}
    fill(EVIDENCE.parent / "architectures.md", f"{summary(rows)}\n\n{by_reason(rows)}")
    return {"rows": rows}, survey_table(rows)


def _apart(name: str, family: str) -> dict[str, Any]:
    """One network in a process of its own, which may be killed for time or memory without harm to the others."""
    command = [sys.executable, "-m", "benchmarks.survey", name, family]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return {"family": family, "failure": f"not done after {_SECONDS} s"}
    if done.returncode:
        return {"family": family, "failure": f"its process ended with code {done.returncode}"}
    row: dict[str, Any] = json.loads(done.stdout)
    return row


def _attempt(name: str, family: str) -> dict[str, Any]:
    # RAFT makes its coordinates in float32, whatever its weights are.
    flow = family == "optical flow"
    coordinates = mock.patch.object(Tensor, "float", Tensor.double) if flow else contextlib.nullcontext()
    try:
        with coordinates:
            return {"family": family, **examine(build(name, family))}
    except Exception as failure:  # a survey goes on
        text = (str(failure).strip().splitlines() or [""])[0][:200]
        return {"family": family, "failure": f"{type(failure).__name__}: {text}"}


def survey_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """A table per family, and what is frozen and why."""
    lines = [
        "Half of every group removed, drawn; float64; every number that starts out constant drawn anew. *error*:",
        "largest difference to the masked network over its largest output (\\* with norms over units stilled on both",
        "sides, since their statistics differ by design; detectors: at their heads); *effect*: the same between masked",
        "and dense network. *reached*: share of the parameters that lie on an axis that can shrink. MACs: predicted",
        "against `FlopCounterMode` / 2 on the cut network.",
    ]
    for family in dict.fromkeys(row["family"] for row in rows.values()):
        members = {name: row for name, row in rows.items() if row["family"] == family}
        lines += ["", f"## {family.capitalize()}", ""]
        lines += ["| network | groups | trace (s) | error | effect | params | MACs | parameters left | reached |"]
        lines += ["|---|---:|---:|---:|---:|---|---|---:|---:|", *map(_line, members, members.values())]
        reasons = Counter(reason for row in members.values() for reason in row.get("frozen", ()))
        lines += ["", "Why axes are frozen, and in how many of these networks:", ""]
        lines += [f"- {reason}: {n}" for reason, n in reasons.most_common()]
    return "\n".join(lines)


def summary(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """A line per family: how many work, how exactly, and how much of them can shrink."""
    lines = [
        "| family | networks | exact | largest error | parameters and MACs as predicted | reached, median | least |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    for family in dict.fromkeys(row["family"] for row in rows.values()):
        members = {name: row for name, row in rows.items() if row["family"] == family}
        done = {name: row for name, row in members.items() if "failure" not in row and row["error"] < _EXACT}
        agree = sum(row["params_agree"] and row["macs_counted"] == row["macs_predicted"] for row in done.values())
        least = min(done, key=lambda name: done[name]["reached"])
        lines.append(
            f"| {family} | {len(members)} | {len(done)} | {max(row['error'] for row in done.values()):.0e} | {agree} "
            f"| {100 * median(row['reached'] for row in done.values()):.1f} % "
            f"| {100 * done[least]['reached']:.0f} % ({least}) |"
        )
    return "\n".join(lines)


def by_reason(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """A line per reason why parameters lie on no axis that can shrink, and the share of them in the networks."""
    lost = {name: {w: n for w, n in row.get("out_of_reach", {}).items() if n >= _SHOWN} for name, row in rows.items()}
    reasons = Counter(why for shares in lost.values() for why in shares)
    lines = ["| reason | networks | share of their parameters, median | most |", "|---|---:|---:|---|"]
    for why, n in reasons.most_common():
        shares = {name: 100 * shares[why] for name, shares in lost.items() if why in shares}
        most = max(shares, key=lambda name: shares[name])
        lines.append(f"| {why} | {n} | {median(shares.values()):.1f} % | {shares[most]:.0f} % ({most}) |")
    return "\n".join(lines)


def _line(name: str, row: Mapping[str, Any]) -> str:
    if "failure" in row:
        return f"| {name} | {row['failure']} | | | | | | | |"
    star = " \\*" if row["stilled"] else ""
    counted, predicted = row["macs_counted"], row["macs_predicted"]
    macs = "equal" if counted == predicted else f"{predicted / max(counted, 1) - 1:+.1e}"
    return (
        f"| {name} | {row['groups']} | {row['seconds']:.2f} | {row['error']:.1e}{star} | {row['effect']:.1e} "
        f"| {'equal' if row['params_agree'] else '**differ**'} | {macs} | {row['left']:.2f} | {row['reached']:.2f} |"
    )


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY, _MEMORY))
    print(json.dumps(_attempt(*sys.argv[1:])))
