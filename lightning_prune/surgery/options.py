"""Options of the layers that specs support, and their allowed values, most of which PyTorch does not check."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

__all__ = ["KINDS", "Option", "require_options"]

#: Value of an option: a number, a bool, a string, None, or a size per dimension.
Option = int | float | bool | str | tuple[int | None, ...] | None

_CONVOLUTION = (
    *("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"),
    *("bias", "padding_mode"),
)
_BATCH_NORM = ("num_features", "eps", "momentum", "affine", "track_running_stats")
_MAX_POOL = ("kernel_size", "stride", "padding", "dilation", "return_indices", "ceil_mode")
_AVERAGE_POOL = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad")

#: Options of all supported layers, by class name in ``torch.nn``; `Sequential` is supported too.
KINDS: Mapping[str, tuple[str, ...]] = {
    "Identity": (),
    "Linear": ("in_features", "out_features", "bias"),
    **dict.fromkeys(("Conv1d", "Conv2d", "Conv3d"), _CONVOLUTION),
    **dict.fromkeys(
        ("ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"), (*_CONVOLUTION, "output_padding")
    ),
    **dict.fromkeys(("BatchNorm1d", "BatchNorm2d", "BatchNorm3d"), _BATCH_NORM),
    "LayerNorm": ("normalized_shape", "eps", "elementwise_affine", "bias"),
    "GroupNorm": ("num_groups", "num_channels", "eps", "affine"),
    **dict.fromkeys(("ReLU", "ReLU6", "SiLU", "Mish", "SELU", "Hardswish", "Hardsigmoid"), ("inplace",)),
    **dict.fromkeys(("Sigmoid", "Tanh", "Softsign"), ()),
    "GELU": ("approximate",),
    "LeakyReLU": ("negative_slope", "inplace"),
    "ELU": ("alpha", "inplace"),
    "PReLU": ("num_parameters",),
    **dict.fromkeys(("Softmax", "LogSoftmax"), ("dim",)),
    **dict.fromkeys(("Dropout", "Dropout1d", "Dropout2d", "Dropout3d"), ("p", "inplace")),
    "Flatten": ("start_dim", "end_dim"),
    **dict.fromkeys(
        (f"Adaptive{kind}Pool{dims}d" for kind in ("Avg", "Max") for dims in (1, 2, 3)), ("output_size",)
    ),
    **dict.fromkeys(("MaxPool1d", "MaxPool2d", "MaxPool3d"), _MAX_POOL),
    "AvgPool1d": _AVERAGE_POOL,
    **dict.fromkeys(("AvgPool2d", "AvgPool3d"), (*_AVERAGE_POOL, "divisor_override")),
}  # fmt: skip

#: Checks a value for a kind of layer.
Test = Callable[[str, object], bool]


def require_options(kind: str, options: Mapping[str, object]) -> None:
    """Validate the options of a layer.

    Raises:
        ValueError: If an option is unknown or its value invalid.
    """
    for name, value in options.items():
        if name not in KINDS[kind]:
            known = ", ".join(KINDS[kind]) or "none"
            raise ValueError(f"expected options of a {kind} ({known}), got {name!r}")
        expected, fits = _RULES[name]
        if not fits(kind, value):
            raise ValueError(f"{kind}: expected {name!r} to be {expected}, got {value!r} ({type(value).__name__})")
    for first, second, expected, agree in _PAIRS:
        if options.keys() >= {first, second} and not agree(kind, options):
            got = f"{options[first]!r} with {second!r} {options[second]!r}"
            raise ValueError(f"{kind}: expected {first!r} to be {expected}, got {got}")


# -- single values -----------------------------------------------------------------------------------------------------


def _is_count(value: object, least: int) -> bool:
    return type(value) is int and value >= least


def _is_number(value: object, least: float = -math.inf, most: float = math.inf) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and least <= value <= most  # type: ignore[arg-type, operator]


def _is_size(kind: str, value: object, least: int) -> bool:
    """A whole number, or one per dimension of the kind (``Conv2d``: two)."""
    if isinstance(value, tuple):
        return len(value) == int(kind[-2]) and all(_is_count(one, least) for one in value)
    return _is_count(value, least)


def _is_output_size(kind: str, value: object) -> bool:
    if isinstance(value, tuple):
        return len(value) == int(kind[-2]) and all(one is None or _is_count(one, 1) for one in value)
    return _is_count(value, 1)


def _is_padding(kind: str, value: object) -> bool:
    words = ("same", "valid") if kind.startswith("Conv") and "Transpose" not in kind else ()
    return value in words if isinstance(value, str) else _is_size(kind, value, 0)


def _is_padding_mode(kind: str, value: object) -> bool:
    return value == "zeros" or ("Transpose" not in kind and value in ("reflect", "replicate", "circular"))


def _is_shape(_: str, value: object) -> bool:
    lengths = value if isinstance(value, tuple) else (value,)
    return bool(lengths) and all(_is_count(one, 1) for one in lengths)


_COUNT: tuple[str, Test] = ("a whole number of at least 1", lambda _, value: _is_count(value, 1))
_SIZE: tuple[str, Test] = (
    "a whole number of at least 1, or one per dimension",
    lambda kind, value: _is_size(kind, value, 1),
)
_PADDING = "a whole number of at least 0, or one per dimension"
_SWITCH: tuple[str, Test] = ("True or False", lambda _, value: type(value) is bool)
_INDEX: tuple[str, Test] = ("a whole number", lambda _, value: type(value) is int)
_NUMBER: tuple[str, Test] = ("a finite number", lambda _, value: _is_number(value))

#: Description and check of every option.
_RULES: Mapping[str, tuple[str, Test]] = {
    **dict.fromkeys(("in_features", "out_features", "in_channels", "out_channels", "groups"), _COUNT),
    **dict.fromkeys(("num_features", "num_groups", "num_channels", "num_parameters"), _COUNT),
    **dict.fromkeys(("kernel_size", "dilation"), _SIZE),
    "stride": (
        f"{_SIZE[0]} (of a pooling, None for that of the kernel)",
        lambda kind, value: _is_size(kind, value, 1) or (value is None and "Pool" in kind),
    ),
    "padding": (f'{_PADDING} (of a convolution that is not transposed, "same" or "valid" too)', _is_padding),
    "output_padding": (_PADDING, lambda kind, value: _is_size(kind, value, 0)),
    "padding_mode": (
        '"zeros" (of a convolution that is not transposed, "reflect", "replicate" or "circular" too)',
        _is_padding_mode,
    ),
    "normalized_shape": ("a whole number of at least 1, or several", _is_shape),
    "output_size": ("a whole number of at least 1, or one (or None) per dimension", _is_output_size),
    "divisor_override": (
        "None or a whole number of at least 1",
        lambda _, value: value is None or _is_count(value, 1),
    ),
    "eps": ("a finite number of at least 0", lambda _, value: _is_number(value, 0)),
    "momentum": ("None or a number in [0, 1]", lambda _, value: value is None or _is_number(value, 0, 1)),
    "p": ("a number in [0, 1]", lambda _, value: _is_number(value, 0, 1)),
    **dict.fromkeys(("alpha", "negative_slope"), _NUMBER),
    "approximate": ('"none" or "tanh"', lambda _, value: value in ("none", "tanh")),
    "dim": ("None or a whole number", lambda _, value: value is None or type(value) is int),
    **dict.fromkeys(("start_dim", "end_dim"), _INDEX),
    **dict.fromkeys(
        (
            *("bias", "affine", "track_running_stats", "elementwise_affine", "inplace"),
            *("return_indices", "ceil_mode", "count_include_pad"),
        ),
        _SWITCH,
    ),
}


# -- pairs of values -----------------------------------------------------------------------------------------


def _per_dimension(kind: str, value: object) -> Sequence[int]:
    return value if isinstance(value, tuple) else (value,) * int(kind[-2])  # type: ignore[return-value]


def _pads_half(kind: str, options: Mapping[str, object]) -> bool:
    if "Pool" not in kind:
        return True
    sizes = (_per_dimension(kind, options.get(name, 1)) for name in ("padding", "kernel_size", "dilation"))
    return all(pad <= ((kernel - 1) * step + 1) // 2 for pad, kernel, step in zip(*sizes, strict=True))


def _is_within_step(kind: str, options: Mapping[str, object]) -> bool:
    sizes = (_per_dimension(kind, options.get(name, 1)) for name in ("output_padding", "stride", "dilation"))
    return all(pad < max(stride, step) for pad, stride, step in zip(*sizes, strict=True))


def _is_in_order(_: str, options: Mapping[str, object]) -> bool:
    start, end = options["start_dim"], options["end_dim"]
    return (start < 0) != (end < 0) or start <= end  # type: ignore[operator]


#: Pairs of options with a description of the first and a check.
_PAIRS: tuple[tuple[str, str, str, Callable[[str, Mapping[str, object]], bool]], ...] = (
    ("padding", "kernel_size", "at most half of the kernel", _pads_half),
    ("output_padding", "stride", "smaller than the stride or the dilation", _is_within_step),
    ("start_dim", "end_dim", "no later than the end", _is_in_order),
)
