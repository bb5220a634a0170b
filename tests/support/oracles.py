"""The real libraries as oracles: load fixtures with transformers and peft, and run them."""

from __future__ import annotations

import json
import sys
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch
from samples import FIXTURES
from torch import nn

sys.path.insert(0, str(FIXTURES))

Case = dict[str, Any]


@cache
def manifest() -> tuple[Case, ...]:
    """Return every case of the manifest."""
    return tuple(json.loads((FIXTURES / "cases.json").read_text()))


def adapters_of(case: Case) -> list[Path]:
    """Return the adapter folders of a case."""
    return [FIXTURES / adapter for adapter in case["adapters"]]


def load_model(case: Case, folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Load a model of the kind that ``case`` names from ``folder``, strictly."""
    name = case["auto_class"]
    if name.startswith("toys."):
        from safetensors.torch import load_file

        import toys

        model: nn.Module = getattr(toys, name.removeprefix("toys."))()
        weights = folder if folder.is_file() else folder / "model.safetensors"
        model.load_state_dict(load_file(weights))
        return model.eval().to(dtype)
    import transformers

    loader = getattr(transformers, name)
    kwargs = case.get("auto_kwargs", {})
    if (folder / "config.json").exists() and kwargs:
        config = json.loads((folder / "config.json").read_text())
        if "num_labels" in kwargs and len(config.get("id2label") or {}) == kwargs["num_labels"]:
            kwargs = {k: v for k, v in kwargs.items() if k != "num_labels"}
    torch.manual_seed(0)  # heads that are in neither file
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = loader.from_pretrained(folder, dtype=dtype, **kwargs)
    return model.eval()


def load_peft(case: Case, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Load base and adapters of ``case`` with PEFT; every adapter is active."""
    from peft import PeftModel

    model = load_model(case, FIXTURES / case["base"], dtype)
    if "resize_to" in case:
        model.resize_token_embeddings(case["resize_to"], mean_resizing=False)
    first, *others = adapters_of(case)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = PeftModel.from_pretrained(model, str(first), **case.get("peft_kwargs", {}))
        for index, other in enumerate(others):
            peft.load_adapter(str(other), adapter_name=f"other{index}")
    return peft.eval()


def outputs_of(case: Case, model: nn.Module) -> torch.Tensor:
    """Run ``model`` on a fixed input and return its main output as float64."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        if case["auto_class"] == "toys.ToyConv":
            ids = torch.randint(0, 24, (2, 9), generator=generator)
            volume = torch.randn(2, 3, 4, 4, 4, generator=generator)
            return model(ids, volume).double()
        if case["auto_class"].startswith("toys."):
            return model(torch.randint(0, 24, (2, 9), generator=generator)).double()
        vocabulary = 30
        ids = torch.randint(4, vocabulary, (2, 9), generator=generator)
        result = model(input_ids=ids)
        value = result.logits if hasattr(result, "logits") else result.last_hidden_state
        return value.double()


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    """Read every tensor of a checkpoint with the format's own library."""
    from safetensors.torch import load_file

    files = [folder] if folder.is_file() else sorted(folder.glob("*.safetensors"))
    return {key: value for file in files for key, value in load_file(file).items()}
