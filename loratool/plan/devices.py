"""Where things are computed: by numpy on the processor, by torch on a GPU."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import wraps
from typing import Any, Final, ParamSpec, TypeVar

from loratool.errors import UnsupportedError

__all__ = ["check_torch", "exactly", "gpu_names", "gpus_for", "has_gpu", "mover_to"]

Given = ParamSpec("Given")
Result = TypeVar("Result")
PROCESSOR: Final = ("auto", "cpu")
WORTH_A_GPU: Final = 2_000_000_000
"""Bytes to read from which on a GPU gains more than the seconds that it takes to start it."""
DRIVER: Final = "libcuda.so.1"
LONGEST_NAME: Final = 256


def has_gpu() -> bool:
    """Whether the driver library finds a GPU; torch is not asked, for importing it takes long."""
    try:
        driver = ctypes.CDLL(DRIVER)
        count = ctypes.c_int(0)
        is_ready = driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0
    except (OSError, AttributeError):
        return False
    return is_ready and count.value > 0


def gpu_names() -> list[str]:
    """Return what the driver library calls the GPUs; none where there is no driver."""
    if not has_gpu():
        return []
    driver, count = ctypes.CDLL(DRIVER), ctypes.c_int(0)
    driver.cuDeviceGetCount(ctypes.byref(count))
    names = []
    for number in range(count.value):
        device, text = ctypes.c_int(0), ctypes.create_string_buffer(LONGEST_NAME)
        driver.cuDeviceGet(ctypes.byref(device), number)
        driver.cuDeviceGetName(text, LONGEST_NAME, device)
        names.append(text.value.decode(errors="replace"))
    return names


def gpus_for(name: str, nbytes: int) -> tuple[list[Any], str | None]:
    """Return the GPUs that ``--device`` means for work on so many bytes, and what to tell of it.

    ``auto`` is a GPU where there is one and the work is large. No GPU means the processor.

    Args:
        name: ``auto``, ``cpu``, ``cuda``, ``cuda:N``, or several with commas between them.
        nbytes: Bytes that will be read.

    Raises:
        UnsupportedError: There is no such device, or no torch to reach it with.
    """
    if name == "cpu" or (name == "auto" and (nbytes < WORTH_A_GPU or not has_gpu())):
        return [], None
    if name == "auto":
        try:
            return [_gpu("cuda")], None
        except UnsupportedError as error:
            return (
                [],
                f"there is a GPU, but PyTorch cannot use it ({error.what}): the processor did it",
            )
    return [_gpu(one) for one in dict.fromkeys(name.split(","))], None


def _gpu(name: str) -> Any:
    check_torch(name)
    from loratool.plan.gpu import resolve_device

    device = resolve_device(name)
    if device.type == "cuda" and device.index is None:
        import torch

        return torch.device("cuda", torch.cuda.current_device())
    return device


def exactly(verb: Callable[Given, Result]) -> Callable[Given, Result]:
    """Have a GPU multiply float32 in float32 while a verb that takes ``device`` works on one."""

    @wraps(verb)
    def call(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        device = str(kwargs.get("device", "auto"))
        if device in PROCESSOR:
            return verb(*args, **kwargs)
        check_torch(device)
        from loratool.plan.gpu import exact_products

        with exact_products():
            return verb(*args, **kwargs)

    return call


def mover_to(name: str) -> Callable[[Any], Any]:
    """Return what brings an array to the device that ``--device`` means.

    ``auto`` is the processor: what is done with factors takes less time than the way to a GPU.

    Raises:
        UnsupportedError: There is no such device, or no torch to reach it with.
    """
    if name in PROCESSOR:
        return _same
    check_torch(name)
    import torch

    from loratool.plan.gpu import resolve_device

    device = resolve_device(name)
    return lambda array: torch.from_numpy(array.copy()).to(device)


def check_torch(device: str) -> None:
    """Refuse a device that only torch reaches, where there is no torch.

    Raises:
        UnsupportedError: It cannot be imported.
    """
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise UnsupportedError(
            f"--device {device}",
            f"computing on a GPU needs PyTorch, which cannot be imported: {error}",
            hint="leave out --device to compute on the processor, which needs none",
        ) from None


def _same(array: Any) -> Any:
    return array
