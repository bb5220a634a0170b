"""Coded weights in a model's file, read back, and written again in memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from loratool.base.model import open_model
from loratool.codecs.codec import CodedTensor
from loratool.codecs.numbers import number
from loratool.codecs.weights import read_matrix
from loratool.files.inputs import InputFiles


def weight_in(
    folder: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], name: str
) -> CodedTensor:
    """Return a weight of a model with these tensors, which have to be coded."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    weight = open_model(folder).tensors[name]
    assert isinstance(weight, CodedTensor)
    return weight


def matrix_of(weight: CodedTensor) -> np.ndarray:
    """Return the numbers of a weight in float64."""
    files = InputFiles({})
    found = read_matrix(weight, files)
    files.close()
    return found


def written_again(weight: CodedTensor, values: np.ndarray) -> dict[str, np.ndarray]:
    """Return the parts of a weight that are written for other values, by their roles."""
    encoder = weight.codec.encoder(weight)
    flat = values.reshape(weight.rows, weight.width)
    made = encoder.encode(0, weight.rows, flat, float(np.abs(values).max()))
    shapes = {role: part.spec.shape for role, part in weight.parts.items()}
    kinds = {role: number(part.spec.dtype).code for role, part in weight.parts.items()}
    return {r: np.asarray(a, kinds[r]).reshape(shapes[r]) for r, (_, a) in made.items()}
