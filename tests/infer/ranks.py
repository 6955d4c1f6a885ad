"""Runs jobs one after another, each as ranks of a process group that are forked once everything is imported.

    python -m tests.infer.ranks JOBS.json

What is imported by name is imported here, once for all ranks.

A job is {"world", "port", "model", "inputs", "config"}. Prints [job, rank, name] as JSON for each video written.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKLWan, CosmosTransformer3DModel, UniPCMultistepScheduler
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

import infer.cosmos25
from infer.config import InferConfig
from infer.generate import generate
from infer.inputs import read_requests
from manifests.config import ModelConfig

SECONDS = 240
IMPORTED_ONCE = (
    AutoencoderKLWan,
    CosmosTransformer3DModel,
    Qwen2Tokenizer,
    Qwen2_5_VLForConditionalGeneration,
    UniPCMultistepScheduler,
    infer.cosmos25,
)


def run_rank(job: dict[str, Any], index: int, rank: int) -> None:
    signal.alarm(SECONDS)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(job["port"]), "WORLD_SIZE": str(job["world"])}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    config = InferConfig(**job["config"])
    generate(
        ModelConfig(path=job["model"]),
        config,
        read_requests(job["inputs"], config),
        guardrail=False,
        on_video=lambda result: print(json.dumps([index, rank, result.request.name]), flush=True),
    )


def fork_rank(job: dict[str, Any], index: int, rank: int) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        run_rank(job, index, rank)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def main() -> None:
    for index, job in enumerate(json.loads(Path(sys.argv[1]).read_text())):
        children = {fork_rank(job, index, rank) for rank in range(job["world"])}
        while children:
            child, status = os.wait()
            children.discard(child)
            if status:
                for other in children:
                    os.kill(other, signal.SIGKILL)
                sys.exit(f"job {index}: a rank ended with {status}")


if __name__ == "__main__":
    main()
