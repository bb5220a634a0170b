"""The functions between the layers of a network, by the names that transformers has for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

from loratool.math.namespace import Array, array_namespace

__all__ = ["ACTIVATIONS"]


def _relu(values: Array) -> Array:
    return array_namespace(values).where(values > 0, values, 0.0)


def _leaky_relu(values: Array) -> Array:
    return array_namespace(values).where(values > 0, values, 0.01 * values)


def _sigmoid(values: Array) -> Array:
    # Of a large negative number the exponential itself is infinite.
    return 0.5 * (array_namespace(values).tanh(0.5 * values) + 1.0)


def _silu(values: Array) -> Array:
    return values * _sigmoid(values)


def _tanh(values: Array) -> Array:
    return array_namespace(values).tanh(values)


def _linear(values: Array) -> Array:
    return values


ACTIVATIONS: Final[Mapping[str, Callable[[Array], Array]]] = MappingProxyType(
    {
        "relu": _relu,
        "leaky_relu": _leaky_relu,
        "sigmoid": _sigmoid,
        "silu": _silu,
        "swish": _silu,
        "tanh": _tanh,
        "linear": _linear,
    }
)
