"""Weights that were trained with an adapter and lie beside it in files of their own.

LLaVA's trainers keep the projector in ``non_lora_trainables.bin`` or ``mm_projector.bin``, trl the
value head in ``value_head.safetensors``. What only resuming the training needs is none of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from loratool.adapter.model import Adapter
from loratool.adapter.selectors import selector
from loratool.errors import FileFormatError
from loratool.files.containers import is_weights, open_weights
from loratool.files.inputs import Stamp
from loratool.files.links import STRAY_LINK, link_roots, stays_inside
from loratool.files.spec import StoredTensor
from loratool.schemes import claimed, claims, weights_names

__all__ = ["Companion", "companions", "is_training_state"]

USUAL: Final = "peft"
"""Whose file names others use too."""
STATE: Final = re.compile(
    r"optimizer([_.-].*)?|scheduler([_.-].*)?|lr_scheduler.*|scaler\.pt|sampler.*\.bin"
    r"|(rng_state|random_states|custom_checkpoint).*|training_args\.bin|trainer_state\.json"
    r"|dl_state_dict\.bin|.*_(optim|model)_states\.pt|bf16_zero_.*|zero_pp_rank_.*"
)
"""Files of training runs: transformers', accelerate's and DeepSpeed's."""
MODEL: Final = re.compile(
    r"(model|pytorch_model|diffusion_pytorch_model|consolidated)([.-].*)?", re.IGNORECASE
)
"""Files of a whole model."""


@dataclass(frozen=True, slots=True)
class Companion:
    """A file of weights beside an adapter.

    Attributes:
        path: The file.
        problem: Why it is not read; empty where it is.
        tensors: What it holds, by key.
        skipped: Keys that were left out on request.
        stamp: What it was when its header was read.
    """

    path: Path
    problem: str = ""
    tensors: Mapping[str, StoredTensor] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()
    stamp: Stamp | None = None


def is_training_state(path: Path) -> bool:
    """Whether a file is what only resuming a training needs."""
    return STATE.fullmatch(path.name) is not None


def _has_own_folder(adapter: Adapter) -> bool:
    """Whether its file is called as those are that have a folder to themselves.

    A name that only the files of one other scheme have is a name like any other.
    """
    name = adapter.weights.name
    owners = [claim.name for claim in claims() if name in claim.weights]
    return len(owners) > 1 or bool({adapter.scheme, USUAL}.intersection(owners))


def companions(adapter: Adapter, skip: Sequence[str] = ()) -> Iterator[Companion]:
    """Yield what lies beside an adapter that has a folder of its own.

    Files of other adapters are none, and training state is neither opened nor named.

    Args:
        adapter: The adapter.
        skip: Regular expressions; keys that match anywhere are left out.

    Raises:
        OptionError: One is no regular expression.
    """
    if not _has_own_folder(adapter):
        return
    patterns = [selector(text, "--skip", bare_is_expression=True) for text in skip]
    roots = link_roots(adapter.folder, [adapter.weights])
    for path in sorted(adapter.folder.iterdir()):
        is_other = path.name not in weights_names() and is_weights(path) and path.is_file()
        if not is_other or is_training_state(path):
            continue
        if not stays_inside(path, roots):
            yield Companion(path, STRAY_LINK)
            continue
        if MODEL.fullmatch(path.name):
            yield Companion(path, "a whole model")
            continue
        try:
            file = open_weights(path)
        except FileFormatError as error:
            yield Companion(path, f"cannot be read: {error.what}")
            continue
        if any(scheme.keys.factor_keys(file.tensors) for scheme in claimed(file.tensors)):
            continue
        skipped = [key for key in file.tensors if any(each.matches(key) for each in patterns)]
        tensors = {key: tensor for key, tensor in file.tensors.items() if key not in set(skipped)}
        yield Companion(path, "", tensors, tuple(skipped), file.stamp)
