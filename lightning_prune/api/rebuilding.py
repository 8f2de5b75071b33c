"""A small Python file that makes a narrow network out of a newly built dense one, without this package."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.api import standalone
from lightning_prune.api.portable import tensors_to_store, whole_file
from lightning_prune.errors import PruningError
from lightning_prune.structure import TracedModel, attention
from lightning_prune.structure.layers import is_within, options, tensors
from lightning_prune.structure.module_configs import ModuleConfig, module_configs, own_integers
from lightning_prune.structure.stubs import Constant, Empty
from lightning_prune.structure.traced_model import require_network, written
from lightning_prune.surgery import History, Keep, LayerSpec, history_of, spec_of
from lightning_prune.surgery.restore import dense_copy
from lightning_prune.surgery.tensors import canonical, named, non_persistent

__all__ = ["rebuild"]

#: Of a layer, by name: what changes, dense and narrow.
Parts = dict[str, tuple[Any, Any]]

_IMPORTS = """\
from collections.abc import Mapping
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn"""


def rebuild(model: nn.Module, file: str | Path) -> None:
    """Write a small Python file that makes a pruned network without this package.

    The file has a table of the layers that changed, and two functions: ``narrow(model)`` gives a newly built dense
    network the sizes of the pruned one, ``load(model, weights)`` also loads the weights that `save` wrote. It needs
    PyTorch, and safetensors to read the file of weights. Before it is written, it is run on a dense copy of the
    network, and what comes out must have the same layers and weights.

    Args:
        model: A pruned network with its history, before `strip`.
        file: The file to write, such as ``"small.py"``.

    Raises:
        ValueError: If the network has no history, or a replaced layer that is no plain layer of PyTorch.
        PruningError: If the file would not make this network.

    Example:
        >>> import lightning_prune, runpy, tempfile, torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> report = lightning_prune.prune(net, torch.zeros(2, 4), pruning_ratio=0.5)
        >>> again = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     lightning_prune.save(net, f"{folder}/small.safetensors")
        ...     lightning_prune.rebuild(net, f"{folder}/small.py")
        ...     small = runpy.run_path(f"{folder}/small.py")
        ...     small["load"](again, f"{folder}/small.safetensors")
        Sequential(
          (0): Linear(in_features=4, out_features=4, bias=True)
          (1): ReLU()
          (2): Linear(in_features=4, out_features=2, bias=True)
        )
    """
    require_network(model)
    network = written(model)
    history = history_of(network)
    if history is None:
        raise ValueError(
            f"rebuild: expected a pruned {type(network).__name__} with its pruning history, got one without: it is "
            "dense, a part of the module that was pruned (give that one), or was stripped or loaded without a history. "
            "Call `rebuild` before `strip`."
        )
    weights, tied = tensors_to_store(network)
    text = _text(network, history, tied)
    _verify(text, network, weights)
    with whole_file(Path(file)) as part:
        part.write_text(text, encoding="utf-8")


def _text(network: nn.Module, history: History, tied: Mapping[str, str]) -> str:
    """The content of the file."""
    # Names of a network with layers of `torch.compile` have prefixes.
    modules = {canonical(name): module for name, module in network.named_modules(remove_duplicate=False)}
    replaced = {name: (type(old).__name__, _call(modules[name])) for name, old in history.dense.layers.items()}
    layers = {name: parts for name, parts in _changed(network, history) if parts}
    kind = type(network)
    has_stubs = any(isinstance(modules[name], (Constant, Empty)) for name in modules if is_within(name, replaced))
    functions: list[Any] = [standalone.narrow, standalone.narrow_layer, standalone.differences, standalone.load]
    functions += [standalone.Empty, standalone.Constant, standalone.positions] if has_stubs else []
    functions += [ModuleConfig] if module_configs(network) else []
    attentions = [name for name, module in modules.items() if type(module) is attention.MultiheadAttention]
    sources = [inspect.getsource(one) for one in functions]
    if attentions:
        own = inspect.getsource(attention)
        sources.append(own[own.index("def attention(") :])
    shown = {name: f"({kind!r}, lambda: {call})" for name, (kind, call) in replaced.items()}
    blocks = [
        f'"""Makes a narrow {kind.__name__} of a dense one, which is built as it was before it was pruned.\n\n'
        f'    network = load({kind.__name__}(...), "small.safetensors")\n\n'
        'Written by `lightning_prune.rebuild`; it needs PyTorch, and safetensors to read such a file.\n"""',
        _IMPORTS + ("\nfrom torch.nn import functional as F" if has_stubs or attentions else ""),
        f"NETWORK = {kind.__name__!r}",
        _table("LAYERS", "Of each layer: options and shapes of tensors, dense and narrow.", _shown(layers)),
        _table("REPLACED", "Layers of another class: the dense class, and what stands there now.", shown),
        _table(
            "POSITIONS",
            "Positions that are kept of buffers that no file holds, by dimension.",
            _shown(_positions(history, non_persistent(network) & history.shapes.keys())),
        ),
        f"#: Attention layers whose heads have another width in all than their inputs.\nATTENTIONS = {attentions}",
        _table("TIED", "Tensors that are one with another, under whose name they are saved.", _shown(tied)),
    ]
    return "\n\n".join(blocks) + "\n\n\n" + "\n\n".join(source.rstrip() + "\n" for source in sources)


def _table(name: str, comment: str, entries: Mapping[str, str]) -> str:
    lines = "".join(f"    {key!r}: {value},\n" for key, value in entries.items())
    return f"#: {comment}\n{name} = {{\n{lines}}}" if lines else f"{name} = {{}}"


def _shown(entries: Mapping[str, Any]) -> dict[str, str]:
    return {name: repr(value) for name, value in entries.items()}


def _changed(network: nn.Module, history: History) -> Iterator[tuple[str, Parts]]:
    """What has changed of each layer that is still the dense network's, in the network's order."""
    # Of a layer and what `torch.compile` has put around it, the layer comes last.
    for name, module in {canonical(name): module for name, module in network.named_modules()}.items():
        if is_within(name, history.dense.layers):
            continue
        before = history.dense.attributes.get(name, {})
        parts: Parts = {
            part: (dense, now) if type(dense) is type(now) is list else (_plain(dense), _plain(now))
            for part, whole in before.items()
            for dense, now in [own_integers(whole, vars(module)[part])]
        }
        if type(module) is nn.Unflatten:  # a cut lets it infer a length, and nothing tells what that was
            parts["unflattened_size"] = (None, _plain(module.unflattened_size))
        if isinstance(module, nn.MultiheadAttention) and "scale" in vars(module):  # which PyTorch's has not
            parts["scale"] = (None, vars(module)["scale"])
        for own, tensor in tensors(module).items():
            full = f"{name}.{own}" if name else own
            if full in history.shapes:
                parts[own] = (tuple(history.shapes[full]), tuple(tensor.shape))
        yield name, {part: (dense, now) for part, (dense, now) in parts.items() if dense != now}


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, (tuple, list)) else value


def _positions(history: History, names: set[str]) -> dict[str, dict[int, list[int]]]:
    """Kept positions of these tensors, in the dense network's numbering."""
    kept: dict[str, dict[int, Any]] = {}
    for edit in (edit for edit in history.edits if isinstance(edit, Keep)):
        for name in sorted(names & edit.axes.keys()):
            for dim, now in edit.axes[name].items():
                before = kept.setdefault(name, {}).get(dim)
                kept[name][dim] = now if before is None else before[now]
    return {name: {dim: now.tolist() for dim, now in axes.items()} for name, axes in kept.items()}


def _call(module: nn.Module) -> str:
    """The expression that builds a replaced layer."""
    if isinstance(module, Empty):
        return f"Empty({module.window})"
    if isinstance(module, Constant):
        return f"Constant({len(module.weight)}, {module.bias is not None}, {module.window})"
    if type(module) is nn.Sequential:
        return f"nn.Sequential({', '.join(map(_call, module))})"
    return _spec_call(spec_of(module))


def _spec_call(spec: LayerSpec) -> str:
    inside = [_spec_call(layer) for layer in spec.layers]
    return f"nn.{spec.kind}({', '.join([*inside, *(f'{name}={value!r}' for name, value in spec.options.items())])})"


# -- verification ------------------------------------------------------------------------------------------------------


def _verify(text: str, network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Run the file on a dense copy of the network.

    Raises:
        PruningError: If what comes out differs.
    """
    dense = dense_copy(TracedModel(network, ()), "real")
    defined: dict[str, Any] = {}
    exec(compile(text, "<the file>", "exec"), defined)
    try:
        problem = next(_differences(defined["load"](dense, copy.copy(weights)), network), None)
    except (ValueError, RuntimeError, AttributeError, KeyError, IndexError) as error:
        problem = f"{type(error).__name__}: {error}"
    if problem is not None:
        raise PruningError(
            f"rebuild: expected a file that makes this {type(network).__name__}, but {problem}. Nothing was written. "
            "Use `save` and `load`, and report it: this is a fault of lightning_prune."
        )


def _differences(made: nn.Module, network: nn.Module) -> Iterator[str]:
    unsaved = non_persistent(network)
    here = {canonical(name): module for name, module in made.named_modules(remove_duplicate=False)}
    expected = {canonical(name): module for name, module in network.named_modules(remove_duplicate=False)}
    yield from (f"only one of both has {name!r}" for name in here.keys() ^ expected.keys())
    for name, module in expected.items():
        if type(here[name]).__name__ != type(module).__name__:
            yield f"{name} is a {type(here[name]).__name__} instead of a {type(module).__name__}"
        elif _options(here[name]) != _options(module):
            yield f"{name} has the options {_options(here[name])} instead of {_options(module)}"
    present = named(made)
    for name, tensor in named(network).items():
        if present[name].shape != tensor.shape:
            yield f"{name} is {list(present[name].shape)} instead of {list(tensor.shape)}"
        elif name not in unsaved and not _same(present[name], tensor):
            yield f"{name} has other weights"


def _options(module: nn.Module) -> dict[str, Any]:
    return {name: _plain(value) for name, value in options(module).items()}


def _same(first: Tensor, second: Tensor) -> bool:
    return bool(torch.all((first == second) | ((first != first) & (second != second))))
