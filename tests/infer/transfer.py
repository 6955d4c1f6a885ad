"""Requests to the tiny Transfer checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from infer import cosmos_transfer25 as family
from infer.config import InferConfig
from infer.inputs import read_requests
from infer.request import Request
from manifests.config import ModelConfig


def transfer_model(path: Path) -> ModelConfig:
    return ModelConfig(path=str(path), family="cosmos-transfer2.5")


def small_config(output: Path, **settings: Any) -> InferConfig:
    size = {"height": 32, "width": 48, "num_steps": 2, "dtype": "float32", "guidance": 3.0, "chunk_frames": 9}
    return InferConfig(output=str(output), **(size | settings))


def requests_of(tmp_path: Path, config: InferConfig, *entries: dict[str, Any]) -> list[Request]:
    path = tmp_path / "inputs.json"
    path.write_text(json.dumps([{"name": "a", "prompt": "a square"} | entry for entry in entries]))
    return read_requests(str(path), config, family.parse_entry)
