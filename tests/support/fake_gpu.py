"""A GPU for tests: tensors that call themselves ``cuda:0`` and are computed by the processor.

It refuses to mix tensors of the two, counts kernels, waits and uploads, and can be short of
memory. Only what the project uses of ``torch.cuda`` is there.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

__all__ = ["FakeGpu", "fake_gpu"]

GPU = torch.device("cuda", 0)
WAITS = (torch.ops.aten._local_scalar_dense, torch.ops.aten.item)


@dataclass
class FakeGpu:
    """What happened on the GPU.

    Attributes:
        kernels: Operations.
        waits: How often the processor had to wait for a result.
        uploads: Copies to it.
        bad_uploads: Those that were neither pinned nor without waiting.
        memory: Bytes that one tensor may have; more is "out of memory".
        flags: The values of ``allow_tf32`` seen by products.
    """

    kernels: int = 0
    waits: int = 0
    uploads: int = 0
    bad_uploads: int = 0
    memory: int = 1 << 40
    flags: set[bool] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, **changes: int) -> None:
        """Add to counters, from any thread."""
        with self.lock:
            for name, value in changes.items():
                setattr(self, name, getattr(self, name) + value)


_current: FakeGpu | None = None
_pinned: set[int] = set()


def gpu() -> FakeGpu:
    """Return the one that is in use."""
    assert _current is not None
    return _current


class OnGpu(torch.Tensor):
    """A tensor of the GPU."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> OnGpu:
        if inner.nbytes > gpu().memory:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory (a fake one)")
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device="meta",
        )
        made.inner = inner
        return made  # type: ignore[no-any-return]

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return GPU

    def __repr__(self) -> str:
        return f"OnGpu({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        packet = func.overloadpacket
        gpu().count(kernels=1)
        if packet in WAITS:
            gpu().count(waits=1)
        if packet is torch.ops.aten.mm:
            gpu().flags.add(torch.backends.cuda.matmul.allow_tf32)
        if packet is torch.ops.aten.copy_ and not isinstance(args[1], OnGpu):
            _note_upload(args[1], non_blocking=_is_non_blocking(args, kwargs, 2))
        else:
            _refuse_mixture(func, (args, kwargs))
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        inner = functools.partial(tree_map, lambda x: x.inner if isinstance(x, OnGpu) else x)
        result = func(*inner(args), **inner(kwargs))
        if packet in WAITS:
            return result
        if func._schema.name.endswith("_") and isinstance(args[0], OnGpu):
            return args[0]
        return tree_map(lambda x: OnGpu(x) if isinstance(x, torch.Tensor) else x, result)


def _is_non_blocking(args: Any, kwargs: Any, place: int) -> bool:
    return bool(kwargs.get("non_blocking", args[place] if len(args) > place else False))


def _note_upload(values: torch.Tensor, *, non_blocking: bool) -> None:
    is_pinned = values.untyped_storage().data_ptr() in _pinned
    gpu().count(uploads=1, bad_uploads=int(not (is_pinned and non_blocking)))


def _refuse_mixture(func: Any, given: Any) -> None:
    found: list[torch.Tensor] = []
    tree_map(lambda x: found.append(x) if isinstance(x, torch.Tensor) else None, given)
    if any(not isinstance(x, OnGpu) and x.dim() > 0 for x in found):
        raise RuntimeError(f"{func}: tensors of the processor and of the GPU together")


class _Functions(TorchFunctionMode):
    """What makes tensors on a device, or moves them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        is_there = bool(args) and isinstance(args[0], OnGpu)
        if name == "pin_memory":
            made = args[0].clone()
            _pinned.add(made.untyped_storage().data_ptr())
            _keep.append(made)
            return made
        if kwargs.pop("pin_memory", False):
            made = func(*args, **kwargs)
            _pinned.add(made.untyped_storage().data_ptr())
            _keep.append(made)
            return made
        if name in ("cpu", "tolist", "numpy") and is_there:
            gpu().count(waits=1)
            return args[0].inner.clone() if name == "cpu" else getattr(args[0].inner, name)()
        if name == "to" and is_there and "cpu" in str(args[1:2]):
            gpu().count(waits=1)
            return args[0].inner.clone()
        if name == "to" and args and isinstance(args[0], torch.Tensor):
            wanted = [x for x in (*args[1:], *kwargs.values()) if isinstance(x, torch.device | str)]
            if wanted and "cuda" in str(wanted[0]):
                return _sent(args, kwargs, is_there=is_there)
        if name == "where" and any(isinstance(arg, OnGpu) for arg in args):
            # torch puts numbers beside the tensors, where none can be read again.
            gpu().count(kernels=1)
            _refuse_mixture(func, args)
            return OnGpu(func(*(arg.inner if isinstance(arg, OnGpu) else arg for arg in args)))
        device = kwargs.get("device")
        if device is not None and "cuda" in str(device) and not is_there:
            kwargs["device"] = torch.device("cpu")
            with torch._C.DisableTorchFunctionSubclass():
                return OnGpu(func(*args, **kwargs))
        return func(*args, **kwargs)


_keep: list[torch.Tensor] = []


def _sent(args: Any, kwargs: Any, *, is_there: bool) -> Any:
    kinds = [x for x in args[1:] if isinstance(x, torch.dtype)]
    values = args[0]
    if not is_there:
        _note_upload(values, non_blocking=bool(kwargs.get("non_blocking")))
        values = OnGpu(values.clone())
    return values.to(*kinds, copy=bool(kwargs.get("copy"))) if kinds else values


class _Event:
    def record(self) -> None:
        """Everything before is done."""

    def synchronize(self) -> None:
        """It is."""


@contextlib.contextmanager
def fake_gpu(monkeypatch: Any, *, memory: int = 1 << 40) -> Iterator[FakeGpu]:
    """Have torch find one GPU for a while, in every thread that begins meanwhile."""
    global _current
    cuda: Any = torch.cuda
    for name, value in {
        "Event": _Event,
        "Stream": lambda device=None: object(),
        "stream": lambda stream: contextlib.nullcontext(),
        "device": lambda device: contextlib.nullcontext(),
        "current_device": lambda: 0,
        "is_available": lambda: True,
        "get_device_name": lambda device=None: "fake",
        "empty_cache": lambda: None,
        "synchronize": lambda device=None: None,
    }.items():
        monkeypatch.setattr(cuda, name, value)
    run: Callable[[threading.Thread], None] = threading.Thread.run

    def with_functions(thread: threading.Thread) -> None:
        with _Functions():
            run(thread)

    monkeypatch.setattr(threading.Thread, "run", with_functions)
    _current = FakeGpu(memory=memory)
    from loratool.verbs.extraction.gpu import _stream

    try:
        with _Functions():
            yield _current
    finally:
        _current = None
        _stream.cache_clear()
        _pinned.clear()
        _keep.clear()
