"""Every criterion once more: slow, plain, with everything written out, and sharing nothing with the package.

A new criterion adds a function of about three lines under ``@reference(Criterion())``; further instances beside the
default one run through the contract too.
"""

import copy
import functools
import itertools
import operator
import zlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from lightning_prune.scoring import (
    CHIP,
    FPGM,
    L1,
    L2,
    LAMP,
    LRP,
    NISP,
    SNIP,
    APoZ,
    BNScale,
    Contribution,
    Criterion,
    DataPass,
    Fisher,
    GraSP,
    HRank,
    KLDivergence,
    Misclassification,
    Random,
    Reconstruction,
    SPvR,
    SynFlow,
    Taylor,
)
from lightning_prune.structure import Group
from tests.scoring.spvr import reference as spvr

REFERENCES = {}
NORMS = (nn.BatchNorm2d, nn.InstanceNorm2d, nn.GroupNorm, nn.LayerNorm)


def reference(*criteria: Criterion):
    """Register a function ``(criterion, evidence) -> scores`` for these instances."""

    def register(function):
        REFERENCES.update(dict.fromkeys(criteria, function))
        return function

    return register


@dataclass
class Evidence:
    """All that there is to know about one group.

    Attributes:
        group: The group.
        tensors: Parameters and buffers at the time of scoring, as arrays.
        batches: Per training batch: inputs of every module's calls by name, and gradients by parameter name.
        modules: The network's modules by name.
        model: The network; to be copied, not changed.
        inputs: What it was trained on, after ``torch.manual_seed(0)``.
    """

    group: Group
    tensors: dict[str, np.ndarray]
    batches: list[tuple[dict[str, list[torch.Tensor]], dict[str, np.ndarray]]]
    modules: dict[str, nn.Module]
    model: nn.Module
    inputs: list[torch.Tensor]

    @property
    def units(self):
        return range(self.group.width)

    def slices(self, unit, role="out"):
        """What a unit holds of every weight with this role."""
        members = [m for m in self.group.members if m.role == role]
        return [np.take(self.tensors[m.tensor], p, axis=m.dim) for m in members for p in m.index[unit]]

    def everything(self, unit, values):
        """What a unit holds of arrays by name, in whatever role, each number once, as one long array."""
        members = [m for m in self.group.members if m.tensor in values]
        owned = {m.tensor: np.zeros(values[m.tensor].shape, dtype=bool) for m in members}
        for m in members:
            np.moveaxis(owned[m.tensor], m.dim, 0)[m.index[unit]] = True
        return np.concatenate([values[name][where] for name, where in owned.items()])

    def saliency(self, function):
        """Mean over batches of a function of weights and gradients, summed over everything a unit holds."""
        per_batch = [{n: function(self.tensors[n], g) for n, g in gradients.items()} for _, gradients in self.batches]
        return [np.mean([self.everything(unit, values).sum() for values in per_batch]) for unit in self.units]

    def consumers(self):
        """Layers that take the units together with others: name, and which unit each of their inputs is (or -1)."""
        for member in [m for m in self.group.members if m.role == "in"]:
            layer = self.modules[member.layer]
            owned = [inputs_of(layer, member, unit) for unit in self.units]
            if any(alone(layer, own) for own in owned):
                continue
            units = np.full(layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels, -1)
            for unit, own in enumerate(owned):
                units[own] = unit
            yield member.layer, units

    def over_consumers(self, function):
        """Mean over consumers and passes of a function of what a unit puts into a layer in one pass."""
        means = []
        for layer, units in self.consumers():
            passes = [a for seen, _ in self.batches for x in seen[layer] for a in x]
            means.append([np.mean([function(a[units == unit]) for a in passes]) for unit in self.units])
        return np.mean(means, 0)

    def rewired(self, change, absolute=False):
        """A copy of the network with ``change(x, units)`` on what enters each consumer; of absolute weights, if asked.

        ``units`` says which unit each channel is, -1 if none.
        """
        model = copy.deepcopy(self.model)
        model.zero_grad()
        for layer, units in self.consumers():
            model.get_submodule(layer).register_forward_pre_hook(
                functools.partial(_change, change, units), with_kwargs=True
            )
        if absolute:
            model.eval()
            for tensor in model.parameters():
                tensor.data.abs_()
            for module in model.modules():
                if isinstance(module, NORMS) and getattr(module, "running_mean", None) is not None:
                    module.running_mean.zero_()
                elif isinstance(module, NORMS):  # doubled inputs would give the same: it only scales and shifts
                    module.forward = functools.partial(_scaled, module)
        return model


def _scaled(norm, x):
    return (x.transpose(1, -1) * norm.weight + norm.bias).transpose(1, -1)


def _change(change, units, module, args, kwargs):
    x = args[0] if args else kwargs["input"]
    return (change(x.transpose(1, -1), torch.as_tensor(units)).transpose(1, -1),), {}


def _note(inputs, module, args, kwargs, output):
    inputs.append((args[0] if args else kwargs["input"]).detach().clone())


def watch(model, inputs):
    """Train on these inputs and write down everything: the ``batches`` of ``Evidence``."""
    seen = []
    for x in inputs:
        calls = {name: [] for name, _ in model.named_modules()}
        handles = [
            module.register_forward_hook(functools.partial(_note, calls[name]), with_kwargs=True)
            for name, module in model.named_modules()
        ]
        model.zero_grad()
        model(x).square().sum().backward()
        for handle in handles:
            handle.remove()
        seen.append((calls, {n: p.grad.numpy().copy() for n, p in model.named_parameters() if p.grad is not None}))
    return seen


# -- criteria --------------------------------------------------------------------------------------------------------


@reference(L1())
def l1(criterion, evidence):
    return [sum(abs(w).sum() for w in evidence.slices(unit)) for unit in evidence.units]


@reference(L2())
def l2(criterion, evidence):
    return [sum((w**2).sum() for w in evidence.slices(unit)) ** 0.5 for unit in evidence.units]


@reference(BNScale())
def bn_scale(criterion, evidence):
    norms = [m for m in evidence.group.members if isinstance(evidence.modules[m.layer], NORMS)]
    scales = [abs(evidence.tensors[m.tensor][m.index]).sum(1) for m in norms if m.tensor.endswith("weight")]
    return sum(scales) if scales else l2(criterion, evidence)


@reference(LAMP())
def lamp(criterion, evidence):
    size = [sum((w**2).sum() for w in evidence.slices(unit)) for unit in evidence.units]
    return [mine / sum(other for other in size if other >= mine) for mine in size]


@reference(FPGM())
def fpgm(criterion, evidence):
    flat = [np.concatenate([w.ravel() for w in evidence.slices(unit)]) for unit in evidence.units]
    return [sum(np.linalg.norm(mine - other) for other in flat) for mine in flat]


@reference(Taylor())
def taylor(criterion, evidence):
    products = [
        {name: evidence.tensors[name] * g for name, g in gradients.items()} for _, gradients in evidence.batches
    ]
    return [np.mean([evidence.everything(unit, batch).sum() ** 2 for batch in products]) for unit in evidence.units]


@reference(SNIP())
def snip(criterion, evidence):
    return evidence.saliency(lambda w, g: abs(w * g))


@reference(Fisher())
def fisher(criterion, evidence):
    squares = []
    model = evidence.rewired(lambda x, units: x * factors[(slice(None), *[None] * (x.dim() - 2), units)])
    torch.manual_seed(0)
    for x in evidence.inputs:
        factor = torch.ones(len(x), evidence.group.width, dtype=x.dtype, requires_grad=True)
        factors = torch.cat([factor, torch.ones(len(x), 1, dtype=x.dtype)], 1)  # the last is of no unit
        model(x).square().sum().backward()
        squares.append((len(x) * factor.grad).square())
    return torch.cat(squares).mean(0)


@reference(APoZ())
def apoz(criterion, evidence):
    return evidence.over_consumers(lambda a: (a != 0).double().mean())


@reference(HRank(), HRank(every_n_batches=1, samples=2))
def hrank(criterion, evidence):
    few = copy.copy(evidence)
    few.batches = [({n: [x[: criterion.samples] for x in c] for n, c in calls.items()}, g) for calls, g in few.batches]
    return few.over_consumers(
        lambda a: np.linalg.matrix_rank(
            a.reshape(-1, a.shape[-1]) if a.dim() > 1 else a.reshape(2 if len(a) in (4, 6) else len(a), -1)
        )
    )


@reference(CHIP(), CHIP(every_n_batches=1, samples=2))
def chip(criterion, evidence):
    means = []
    for layer, units in evidence.consumers():
        passes = [a for seen, _ in evidence.batches for x in seen[layer] for a in x[: criterion.samples]]
        maps = [np.stack([a[units == unit].flatten() for unit in evidence.units]) for a in passes]
        norms = [[np.linalg.svd(np.delete(m, gone, 0))[1].sum() for gone in ([], *evidence.units)] for m in maps]
        means.append(np.mean([[whole - without for without in rest] for whole, *rest in norms], 0))
    return np.round(np.mean(means, 0), 12) + 0.0


@reference(Reconstruction(), Reconstruction(strength=0.3))
def reconstruction(criterion, evidence):
    """Solve for every set of removed units from scratch, by the Schur complement of the remaining ones."""
    model, seen = copy.deepcopy(evidence.model).eval(), {}
    for name, layer in model.named_modules():
        keep = functools.partial(lambda calls, _, args, kwargs: calls.append(args[0] if args else kwargs["input"]))
        layer.register_forward_pre_hook(functools.partial(keep, seen.setdefault(name, [])), with_kwargs=True)
    with torch.no_grad():
        for x in evidence.inputs:
            model(x)
    problems = []
    for name, units in evidence.consumers():
        layer = model.get_submodule(name)
        for rows, weight, channels in per_output(layer, [x.detach() for x in seen[name]]):
            covariance = np.cov(rows.T, bias=True).reshape(len(channels), len(channels))
            scale = np.trace(covariance) / len(covariance)
            penalized = covariance + criterion.strength * scale * np.eye(len(covariance))
            problems.append((name, weight, penalized, units[channels], weight @ covariance @ weight))
    problems = weighed(problems, model, evidence.inputs)
    outputs = len({name for name, *_ in problems})

    def error(gone):
        total = 0
        for _, weight, penalized, of in problems:
            out = np.isin(of, gone)
            inner = penalized[np.ix_(out, out)]
            cross = penalized[np.ix_(out, ~out)]
            rest = penalized[np.ix_(~out, ~out)]
            schur = inner - cross @ np.linalg.solve(rest, cross.T) if (~out).any() else inner
            total += weight[out] @ schur @ weight[out]
        return total / outputs

    scores, gone = np.zeros(evidence.group.width), []
    while len(gone) < evidence.group.width:
        costs = {unit: error([*gone, unit]) - error(gone) for unit in evidence.units if unit not in gone}
        unit = min(costs, key=costs.get)
        scores[unit] = max(costs[unit], *(scores[other] for other in gone), 0)
        gone.append(unit)
    return scores


def weighed(problems, model, inputs):
    """Weights in units of what the outputs become: behind a batch norm, and on a stream that is there before."""
    found = []
    for name in dict.fromkeys(name for name, *_ in problems):
        own = [problem for problem in problems if problem[0] == name]
        scale, values = becomes(model, name, inputs)
        power = sum(variance for *_, variance in own)
        if values is not None:
            axis = -1 if isinstance(model.get_submodule(name), nn.Linear) else 1
            power = np.concatenate([v.movedim(axis, 0).flatten(1).numpy() for v in values], 1).var(1).sum()
        for output, (_, weight, penalized, units, _) in enumerate(own):
            found.append((name, weight * scale[output % len(scale)] / np.sqrt(power), penalized, units))
    return found


@torch.no_grad()
def becomes(model, name, inputs):
    """The scale of the batch norm after a layer, and what the outputs are then and on their stream, by batch."""
    graph = torch.fx.symbolic_trace(model)
    nodes, modules = list(graph.graph.nodes), dict(graph.named_modules())
    calls = [node for node in nodes if node.target == name]
    if len(calls) != 1:
        return np.ones(1), None
    node, scale = calls[0], torch.ones(1)
    (user,) = node.users
    norm = modules.get(user.target) if user.op == "call_module" else None
    if isinstance(norm, nn.BatchNorm2d) and norm.track_running_stats:
        node, scale = user, norm.weight / (norm.running_var + norm.eps).sqrt()
        (user,) = node.users
    if user.target is operator.add and all(nodes.index(other) < nodes.index(calls[0]) for other in user.args[:1]):
        node = user
    values = []

    class Run(torch.fx.Interpreter):
        def run_node(self, n):
            value = super().run_node(n)
            values.extend([value.clone()] if n is node else [])  # what follows may be in place
            return value

    for x in inputs:
        Run(graph).run(x)
    return scale.numpy(), values


def per_output(layer, calls):
    """For each output: what it is computed from (a patch is the gradient by its weights), weights, input channels."""
    weight = layer.weight.detach()
    outputs = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    for output in range(outputs):
        rows = []
        for x in calls:
            layer.zero_grad()
            y = layer(x)
            y = y.movedim(-1, 0) if isinstance(layer, nn.Linear) else y.movedim(1, 0)
            rows += [torch.autograd.grad(one, layer.weight, retain_graph=True)[0] for one in y[output].flatten()]
        own = torch.zeros_like(weight, dtype=torch.bool)
        channel = torch.zeros_like(weight, dtype=torch.int64)
        groups = getattr(layer, "groups", 1)
        if getattr(layer, "transposed", False):
            per_in, per_out = len(weight) // groups, weight.shape[1]
            group, local = divmod(output, per_out)
            own[group * per_in : (group + 1) * per_in, local] = True
            channel += torch.arange(len(weight)).reshape(-1, *[1] * (weight.ndim - 1))
        else:
            own[output] = True
            first = output // (len(weight) // groups) * weight.shape[1]
            channel += (first + torch.arange(weight.shape[1])).reshape(1, -1, *[1] * (weight.ndim - 2))
        yield torch.stack([row[own] for row in rows]).numpy(), weight[own].numpy(), channel[own].numpy()


@reference(NISP())
def nisp(criterion, evidence):
    shift = torch.zeros(evidence.group.width + 1, dtype=torch.float64, requires_grad=True)
    model = evidence.rewired(lambda x, units: x + shift[units], absolute=True)
    sum(model(torch.ones_like(x)).sum() for x in evidence.inputs).backward()
    return shift.grad[:-1] / len(evidence.inputs)


@reference(SynFlow())
def synflow(criterion, evidence):
    model = evidence.rewired(lambda x, units: x, absolute=True)
    sum(model(torch.ones_like(x)).sum() for x in evidence.inputs).backward()
    flow = {name: (p * p.grad).detach().numpy() / len(evidence.inputs) for name, p in model.named_parameters()}
    return [evidence.everything(unit, flow).sum() for unit in evidence.units]


@reference(KLDivergence(), Misclassification(), SPvR(), SPvR(group_size=2))
def masking(criterion, evidence):
    def probabilities(masked):
        model = evidence.rewired(lambda x, units: x * ~torch.isin(units, torch.tensor(masked))).eval()
        return spvr.probabilities(model, evidence.inputs)

    measure = {KLDivergence: "kl_divergence", Misclassification: "misclassification", SPvR: "prediction_change"}
    p, scores = probabilities([-2]), np.empty(evidence.group.width)
    for group in groups_of_units(criterion, evidence):
        scores[list(group)] = spvr.importance(p, probabilities(group), measure[type(criterion)])
    return scores


def groups_of_units(criterion, evidence):
    """Algorithm 1 on what enters the next layers, the correlations of several layers averaged."""
    model, matrices = copy.deepcopy(evidence.model).eval(), []
    for layer, units in evidence.consumers():
        rows = []
        twin = copy.deepcopy(model)
        twin.get_submodule(layer).register_forward_pre_hook(
            lambda _, args, kwargs, rows=rows: rows.append(args[0] if args else kwargs["input"]), with_kwargs=True
        )
        for x in evidence.inputs:
            twin(x)
        last = [x.detach().transpose(1, -1) for x in rows]  # units on the last dimension
        by_unit = [torch.stack([x[..., units == u].flatten(1) for u in evidence.units], 1) for x in last]
        matrices.append(spvr.correlations(spvr.pooled(torch.cat(by_unit), evidence.group.width)))
    return spvr.groups_of(np.mean(matrices, 0), criterion.group_size)


@reference(GraSP())
def grasp(criterion, evidence):
    scores = []
    for x in evidence.inputs:
        (x,) = next(iter(DataPass([x]))).args  # in its order, which dropout sees
        model = copy.deepcopy(evidence.model).train()
        weights = dict(model.named_parameters())

        def gradients_of_loss(model=model, weights=weights, x=x):
            torch.manual_seed(0)
            return torch.autograd.grad(model(x).square().sum(), list(weights.values()), create_graph=True)

        fixed = [gradient.detach() for gradient in gradients_of_loss()]
        hessian_product = torch.autograd.grad(gradients_of_loss(), list(weights.values()), fixed)
        flow = {n: (w * h).detach().numpy() for (n, w), h in zip(weights.items(), hessian_product, strict=True)}
        scores.append([evidence.everything(unit, flow).sum() for unit in evidence.units])
    return np.mean(scores, 0)


@reference(LRP(), LRP(epsilon=0.1))
def lrp(criterion, evidence):
    relevance = []
    model = evidence.rewired(lambda x, units: x * factors[(slice(None), *[None] * (x.dim() - 2), units)]).eval()

    def stabilised(_, __, z):  # the same numbers, but a smaller derivative
        less = z * (z / (z + criterion.epsilon * torch.where(z < 0, -1, 1))).detach()
        return less + (z - less).detach()

    for module in model.modules():
        if isinstance(module, (nn.Tanh, nn.SiLU)):
            module.register_forward_hook(lambda _, args, out: args[0] * (out / args[0]).detach())
        elif hasattr(module, "weight") and not isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
            module.register_forward_hook(stabilised)
    for x in evidence.inputs:
        factor = torch.ones(len(x), evidence.group.width, dtype=x.dtype, requires_grad=True)
        factors = torch.cat([factor, torch.ones(len(x), 1, dtype=x.dtype)], 1)  # the last is of no unit
        model(x).amax(1).sum().backward()
        relevance.append(factor.grad.abs())
    return torch.cat(relevance).mean(0)


@reference(Random(), Random(seed=7))
def random(criterion, evidence):
    text = f"{criterion.seed}/{evidence.group.name}/{evidence.group.width}"
    return torch.rand(
        evidence.group.width, generator=torch.Generator().manual_seed(zlib.crc32(text.encode())), dtype=torch.float64
    )


@reference(
    Contribution(),
    Contribution(ratio="signed"),
    Contribution(lambda_avg=0, lambda_max=1),
    Contribution(lambda_avg=0.5, lambda_max=2, ratio="signed", epsilon=0.1),
)
def contribution(criterion, evidence):
    averages, maxima = [], []  # per consumer and unit
    for member in [m for m in evidence.group.members if m.role == "in"]:
        layer = evidence.modules[member.layer]
        inputs = [inputs_of(layer, member, unit) for unit in evidence.units]
        if any(alone(layer, own) for own in inputs):
            continue
        calls = [x for called, _ in evidence.batches for x in called[member.layer]]
        every = [shares(layer, x, criterion.ratio, criterion.epsilon) for x in calls]  # (taps, outputs, inputs) each
        outputs = sum((share != 0).any((0, 2)).sum() for share in every)
        averages.append([sum(share[..., own].sum() for share in every) / outputs for own in inputs])
        maxima.append([max(0, *(share[..., own].max() for share in every)) for own in inputs])
    average, maximum = np.mean(averages, 0), np.mean(maxima, 0)
    return criterion.lambda_avg * average / abs(average).mean() + criterion.lambda_max * maximum / maximum.mean()


# -- what a linear layer adds up -------------------------------------------------------------------------------------


def _only(x, channel):
    alone = torch.zeros_like(x)
    alone[:, channel] = x[:, channel]
    return alone


@torch.no_grad()
def products(layer, x):
    """Every ``w · a`` of every output by itself: an array of (taps, outputs over passes and positions, inputs).

    Taken from the layer's own forward, with one tap of the kernel and one channel of the input left in place at a
    time, so that there is no formula of a convolution here.
    """
    if isinstance(layer, nn.Linear):
        x = x.reshape(-1, x.shape[-1])
        return torch.einsum("jk,nk->njk", layer.weight, x).flatten(0, 1)[None].numpy()
    x = x if x.dim() == len(layer.kernel_size) + 2 else x[None]
    found = []
    for tap in itertools.product(*map(range, layer.kernel_size)):
        single = copy.deepcopy(layer)
        single.bias = None
        single.weight.zero_()
        single.weight[(..., *tap)] = layer.weight[(..., *tap)]
        found.append(torch.stack([single(_only(x, k)).flatten() for k in range(x.shape[1])], -1))
    return torch.stack(found).numpy()


def shares(layer, x, ratio, epsilon=1e-6):
    """Share of every input in every output, shape as ``products``; 0 where the output is."""
    terms = products(layer, x) if ratio == "signed" else abs(products(layer, x))
    z = terms.sum((0, 2), keepdims=True)
    z = z + epsilon * np.sign(z) if ratio == "signed" else z
    return np.divide(terms, z, out=np.zeros_like(terms), where=z != 0)


@torch.no_grad()
def connections(layer, member=None, unit=None):
    """Which inputs reach which outputs, (outputs, inputs), with all weights 1 but those of a unit."""
    ones = copy.deepcopy(layer)
    torch.nn.init.ones_(ones.weight)
    if member is not None:
        ones.weight.movedim(member.dim, 0)[member.index[unit]] = 0
    linear = isinstance(layer, nn.Linear)
    sizes = (layer.in_features,) if linear else (layer.in_channels, *(3 * k for k in layer.kernel_size))
    return products(ones, torch.ones(1, *sizes, dtype=layer.weight.dtype)).any(0)


def inputs_of(layer, member, unit):
    """Inputs that reach nothing once the unit's weights are 0."""
    return np.flatnonzero(~connections(layer, member, unit).any(0))


def alone(layer, own):
    """Whether inputs have all the outputs they reach to themselves (depthwise), so that their share says nothing."""
    reached = connections(layer)
    return not np.delete(reached[reached[:, own].any(1)], own, axis=1).any()
