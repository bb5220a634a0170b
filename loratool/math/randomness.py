"""Random numbers that depend on a seed and on what they are for, on nothing else."""

from __future__ import annotations

import hashlib

import numpy as np

__all__ = ["generator_for"]


def generator_for(seed: int, *purpose: str | int) -> np.random.Generator:
    """Return a generator keyed by ``seed`` and by ``purpose``, such as the name of a module.

    Numbers do not depend on the order in which modules are computed, nor on the device: they
    are always drawn on the processor.
    """
    words = ":".join(map(str, (seed, *purpose))).encode()
    return np.random.Generator(np.random.PCG64(int.from_bytes(hashlib.sha256(words).digest())))
