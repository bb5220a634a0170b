"""Fixtures that tests share: small files written by the real libraries, and their folder."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from safetensors.torch import save_file
from samples import FIXTURES

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
if "PYTEST_XDIST_WORKER" in os.environ:  # several processes, each with threads for all processors
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def fuzz_seconds(request: pytest.FixtureRequest) -> float:
    """How long to try damaged inputs."""
    return float(request.config.getoption("--fuzz"))


@pytest.fixture
def fixtures() -> Path:
    """The folder with tiny bases and adapters."""
    return FIXTURES


@pytest.fixture
def make_base(tmp_path: Path) -> Callable[..., Path]:
    """Write a base: tensors, and a config where one is given."""

    def make(
        tensors: dict[str, torch.Tensor], config: dict[str, Any] | None = None, name: str = "base"
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        save_file(
            {key: value.contiguous() for key, value in tensors.items()},
            folder / "model.safetensors",
            metadata={"format": "pt"},
        )
        if config is not None:
            (folder / "config.json").write_text(json.dumps(config, indent=2))
        return folder

    return make


@pytest.fixture
def make_adapter(tmp_path: Path) -> Callable[..., Path]:
    """Write a PEFT adapter: tensors without the prefix, and a configuration."""

    def make(
        tensors: dict[str, torch.Tensor],
        name: str = "adapter",
        prefix: str = "base_model.model.",
        **config: Any,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        save_file(
            {prefix + key: value.contiguous() for key, value in tensors.items()},
            folder / "adapter_model.safetensors",
            metadata={"format": "pt"},
        )
        settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8} | config
        (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2))
        return folder

    return make


def _is_short(config: pytest.Config) -> bool:
    return bool(config.getoption("markexpr") == "not slow")


def pytest_configure(config: pytest.Config) -> None:
    """Try a quarter of the examples of each law where nothing slow is wanted."""
    settings.register_profile("short", max_examples=25)
    if _is_short(config):
        settings.load_profile("short")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave the oracles alone where nothing slow is wanted: their libraries load for seconds."""
    return True if _is_short(config) and collection_path.name == "oracles" else None


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fuzz", type=float, default=3.0, metavar="SECONDS", help="how long each parser is fuzzed"
    )
    parser.addoption(
        "--kills", type=int, default=3, metavar="N", help="how often each writing verb is killed"
    )
    parser.addoption(
        "--write-docs", action="store_true", help="write generated parts of the pages anew"
    )
