"""What a model says of itself, and who may ask."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import loratool
from loratool.base.config import ModelConfig
from loratool.base.config_edits import ConfigChanges, edit_config

PACKAGE = Path(loratool.__file__).parent
ROOMS = {path: path.relative_to(PACKAGE).parts[0] for path in PACKAGE.rglob("*.py")}
BASE_ONLY = {"config.json", "tie_word_embeddings", "text_config"}
ASKING = {"files/hub/cache.py", "files/objects/store.py", "schemes/folders.py"}
"""Who asks whether there is a configuration, and does not open it."""


def constants(path: Path) -> Iterator[str]:
    """Yield the texts of a module that are no documentation."""
    tree = ast.parse(path.read_text("utf-8"))
    prose = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield node.value


def test_only_the_base_reads_a_models_configuration() -> None:
    """A codec is handed the parsed file, and knows its keys."""
    found = {
        (str(path.relative_to(PACKAGE)), text)
        for path, room in ROOMS.items()
        if room not in ("base", "codecs")
        for text in constants(path)
        if text in BASE_ONLY
    }
    assert found == {("files/checkpoint.py", "config.json")}


def test_who_knows_the_name_of_the_configuration_does_not_open_it() -> None:
    knowing = {
        path.relative_to(PACKAGE).as_posix(): path.read_text("utf-8")
        for path, room in ROOMS.items()
        if room not in ("base", "codecs") and "MODEL_CONFIG" in path.read_text("utf-8")
    }
    others = {"files/checkpoint.py", "verbs/merging/sidecars.py"}  # its home; who edits by `base`
    assert knowing.keys() == ASKING | others
    reading = re.compile(r"(read_|parse_)\w+\([^()]*MODEL_CONFIG|MODEL_CONFIG\)?\.(open|read_)")
    assert not [name for name, text in knowing.items() if reading.search(text)]


def test_conv1d_is_decided_in_one_place() -> None:
    deciding = [
        path.relative_to(PACKAGE).as_posix()
        for path in ROOMS
        if "CONV1D_MODEL_TYPES" in path.read_text("utf-8")
    ]
    assert sorted(deciding) == ["base/model.py", "names/conv1d.py"]


@pytest.mark.parametrize(
    ("raw", "is_tied"),
    [
        ({}, None),
        ({"tie_word_embeddings": True}, True),
        ({"tie_word_embeddings": "yes"}, None),
        ({"text_config": {"tie_word_embeddings": False}}, False),
        ({"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": False}}, True),
        ({"llm_config": {"tie_word_embeddings": False}}, False),
    ],
)
def test_the_tie_is_that_of_the_model_then_of_its_text(
    raw: dict[str, Any], is_tied: bool | None
) -> None:
    assert ModelConfig(raw).is_tied is is_tied


@pytest.mark.parametrize(
    ("raw", "rows"),
    [
        ({"num_attention_heads": 4, "hidden_size": 32}, (32, 32, 32)),
        ({"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32}, (32, 16, 16)),
        ({"num_attention_heads": 4, "head_dim": 3, "hidden_size": 32}, (12, 12, 12)),
        ({"text_config": {"num_attention_heads": 2, "hidden_size": 8}}, (8, 8, 8)),
        ({"num_attention_heads": 0, "hidden_size": 8}, None),
        ({"num_attention_heads": "4", "hidden_size": 8}, None),
        ({"num_attention_heads": 4}, None),
    ],
)
def test_the_rows_of_projections(raw: dict[str, Any], rows: tuple[int, ...] | None) -> None:
    assert ModelConfig(raw).projection_rows == rows


def test_the_facts_of_a_configuration() -> None:
    raw = {
        "model_type": "llava",
        "architectures": ["A", 3],
        "text_config": {"model_type": "llama", "torch_dtype": "torch.float16"},
        "quantization_config": {"quant_method": "fp8"},
    }
    config = ModelConfig(raw)
    assert config.model_types == {"llava", "llama"}
    assert (config.architectures, config.dtype) == (("A",), "F16")
    assert config.quantization == {"quant_method": "fp8"}
    assert not ModelConfig() and ModelConfig().quantization is None


def test_what_decoding_changes() -> None:
    raw = {
        "text_config": {"quantization_config": {"quant_method": "fp8"}, "hidden_size": 4},
        "quantization_config": {"quant_method": "fp8"},
    }
    edited = edit_config(raw, ConfigChanges(decoded="bfloat16"))
    assert edited == {"text_config": {"hidden_size": 4}, "dtype": "bfloat16"}
    assert "quantization_config" in raw
    told = edit_config(raw | {"torch_dtype": "float16"}, ConfigChanges(decoded="float16"))
    assert told["torch_dtype"] == "float16" and "dtype" not in told


def test_opening_and_finding_import_no_numpy(make_base: Callable[..., Path]) -> None:
    base = make_base({"model.layers.0.q_proj.weight": torch.zeros(2, 2)}, {"model_type": "llama"})
    code = (
        "import sys; from pathlib import Path; from loratool.base.model import open_model;"
        f"assert open_model(Path({str(base)!r})).find('layers.0.q_proj');"
        "assert not {'numpy', 'torch'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
