"""A rank that makes videos, for `tests.ranks`. What the pipeline imports by name is imported here, before ranks fork.

A job is {"world", "model", "inputs", "config"}. Prints [job, rank, name] as JSON for each video written.
"""

from __future__ import annotations

import json
from typing import Any

from diffusers import AutoencoderKLWan, CosmosTransformer3DModel, UniPCMultistepScheduler
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

import infer.cosmos25
from infer.config import InferConfig
from infer.generate import generate
from infer.inputs import read_requests
from manifests.config import ModelConfig

IMPORTED_ONCE = (
    AutoencoderKLWan,
    CosmosTransformer3DModel,
    Qwen2Tokenizer,
    Qwen2_5_VLForConditionalGeneration,
    UniPCMultistepScheduler,
    infer.cosmos25,
)


def run_rank(job: dict[str, Any], index: int, rank: int) -> None:
    config = InferConfig(**job["config"])
    generate(
        ModelConfig(path=job["model"]),
        config,
        read_requests(job["inputs"], config),
        guardrail=False,
        on_video=lambda result: print(json.dumps([index, rank, result.request.name]), flush=True),
    )
