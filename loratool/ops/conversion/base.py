"""The base of an adapter that is converted: shapes, names, and weights where one is needed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from loratool.errors import BaseModelError
from loratool.files.checkpoint import open_checkpoint
from loratool.files.json import read_json_object
from loratool.files.spec import StoredTensor
from loratool.names.conv1d import CONV1D_LEAVES, CONV1D_MODEL_TYPES
from loratool.names.diffusion import FAMILIES
from loratool.ops.merging.modules import ModuleIndex
from loratool.ops.naming.paths import other_names

__all__ = ["Base", "open_base"]

COMPONENTS: Final = (
    "unet",
    "transformer",
    "transformer_2",
    "prior",
    "text_encoder",
    "text_encoder_2",
    "text_encoder_3",
)
ORIGINAL: Final = "model.diffusion_model."
ORIGINAL_ENCODER: Final = "cond_stage_model.transformer."


class Base:
    """The weights of a model, or of the components of a pipeline, by module path.

    Args:
        path: Where it is.
        weights: Module path to its weight.
    """

    def __init__(self, path: Path, weights: Mapping[str, StoredTensor]) -> None:
        self.path = path
        self.weights = weights

    @cached_property
    def _index(self) -> ModuleIndex:
        return ModuleIndex(f"{module}.weight" for module in self.weights)

    @cached_property
    def _config(self) -> Mapping[str, Any]:
        path = (self.path if self.path.is_dir() else self.path.parent) / "config.json"
        return read_json_object(path) if path.is_file() else {}

    def is_conv1d(self, module: str) -> bool:
        """Whether a module is a Conv1D of GPT-2's kind, whose weight is ``(in, out)``.

        The model type tells it, or else the layers of that name that widen along an axis.
        """
        if module.rpartition(".")[2] not in CONV1D_LEAVES:
            return False
        if self._config.get("model_type") is not None:
            return self._config["model_type"] in CONV1D_MODEL_TYPES
        for name, stored in self.weights.items():
            shape = stored.spec.shape
            if name.endswith((".c_attn", ".c_fc")) and len(shape) == 2 and shape[0] != shape[1]:
                return shape[0] < shape[1]
        return False

    def path_of(self, module: str) -> str | None:
        """Return what the base calls ``module``, or ``None``.

        Raises:
            BaseModelError: Several could be meant.
        """
        if module in self.weights:
            return module
        component, _, local = module.partition(".")
        if component in COMPONENTS and local in self.weights:
            return local
        for name in other_names(module, None):
            for path in (f"{component}.{name}", name):
                if path in self.weights:
                    return path
        for path in (module, local) if component in COMPONENTS else (module,):
            found = self._index.find(path, parameter="weight")
            if found is not None:
                return found
        return None

    def find(self, module: str) -> StoredTensor | None:
        """Return the weight that ``module`` means, or ``None``.

        Raises:
            BaseModelError: Several could be meant.
        """
        path = self.path_of(module)
        return self.weights[path] if path is not None else None

    def weight(self, module: str) -> StoredTensor:
        """Return the weight that ``module`` means.

        Raises:
            BaseModelError: There is none.
        """
        found = self.find(module)
        if found is None:
            nearest = self._index.nearest(module)
            raise BaseModelError(
                f"{self.path}: {module}",
                "the base has no such module",
                hint=f"nearest: {', '.join(nearest)}" if nearest else None,
            )
        return found


def open_base(path: Path) -> Base:
    """Open a model, or a pipeline's folder with a sub-folder for each component.

    Raises:
        BaseModelError: There is neither.
    """
    parts = [path / name for name in COMPONENTS if (path / name).is_dir()]
    if parts:
        weights = {
            f"{part.name}.{name}": stored for part in parts for name, stored in _weights(part)
        }
        return Base(path, weights)
    return Base(path, _renamed(dict(_weights(path))))


def _weights(path: Path) -> Iterator[tuple[str, StoredTensor]]:
    for name, stored in open_checkpoint(path).tensors.items():
        module, _, leaf = name.rpartition(".")
        if (leaf == "weight" and module) or (leaf == "in_proj_weight" and module):
            yield module, stored
    if not path.exists():
        raise BaseModelError(path, "no such file or folder")


def _renamed(weights: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Return a checkpoint of a whole pipeline, in the original naming, with components."""
    locals_ = [m.removeprefix(ORIGINAL) for m in weights if m.startswith(ORIGINAL)]
    if not locals_:
        return weights
    family = next((f for f in FAMILIES if sum(map(f.has, locals_)) > len(locals_) // 2), None)
    found = {}
    for module, stored in weights.items():
        if module.startswith(ORIGINAL):
            local = module.removeprefix(ORIGINAL)
            component = family.backbone if family else "unet"
            fusion = family.from_native(local) if family else None
            is_one = fusion is not None and len(fusion.modules) == 1 and not fusion.swapped
            name = fusion.modules[0] if fusion is not None and is_one else local
            found[f"{component}.{name}"] = stored
        elif module.startswith(ORIGINAL_ENCODER):
            found[f"text_encoder.{module.removeprefix(ORIGINAL_ENCODER)}"] = stored
        else:
            found[module] = stored
    return found
