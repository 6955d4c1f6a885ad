"""Requests in, videos out: load the model once, make each video, write what was made and how.

    OUTPUT/<name>.mp4           one a request; an older one of that name is replaced
    OUTPUT/contact_sheet.png    a row of frames for each
    OUTPUT/results.json         prompts, seeds, sizes, seconds, model, adapters; rewritten after each video

The noise of a video depends on its seed and size alone: not on the device, the other requests or their order.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from infer.adapters import check_adapters, load_adapters
from infer.config import InferConfig
from infer.inputs import Request
from infer.progress import VideoProgress
from infer.trained import load_trained_weights
from infer.video import Frames, contact_sheet, spread_frames, write_mp4
from manifests.config import ModelConfig
from manifests.errors import UsageError
from manifests.family import find_family

SHEET_COLUMNS = 6


@dataclass(frozen=True, kw_only=True)
class Result:
    """One video made. video: the MP4. seconds: wall time of denoising and decoding."""

    video: Path
    request: Request
    seconds: float


def check_requests(model: ModelConfig, requests: Sequence[Request]) -> None:
    """Raise UsageError unless the model's family can make all of these; loads nothing."""
    if not requests:
        raise UsageError("infer.inputs: nothing to generate; give a prompt, a folder, or a .json or .jsonl file")
    for name, times in Counter(request.name for request in requests).items():
        if times > 1:
            raise UsageError(f"infer.inputs: name {name!r} is used {times} times; each video needs its own")
    family = find_family("infer", model)
    for request in requests:
        family.check_request(request)


def generate(
    model: ModelConfig,
    config: InferConfig,
    requests: Sequence[Request],
    *,
    guardrail: bool,
    on_ready: Callable[[], None] | None = None,
    on_video: Callable[[Result], None] | None = None,
) -> list[Result]:
    """Make every request's video in `config.output`, in order, on the GPU if there is one.

    guardrail: False lets prompts and videos pass unchecked. on_ready: called when the first video is about to be
    made. on_video: called after each video is written.
    Requests, output folder, model, adapters and prompts are checked before the first video and before anything is
    written: UsageError. A failure while making a video raises LatentlineError and keeps the videos made before it.
    """
    check_requests(model, requests)
    check_adapters(config.adapters)
    family = find_family("infer", model)
    requests = [
        replace(request, negative_prompt=family.DEFAULT_NEGATIVE_PROMPT) if request.negative_prompt is None else request
        for request in requests
    ]
    if guardrail:
        family.require_guardrail()
    output = Path(config.output)
    _check_output(output)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}[config.dtype]
    pipe = family.load_pipeline(model, dtype=dtype, device=device, guardrail=guardrail)
    load_adapters(pipe, load_trained_weights(pipe, config.adapters), fuse=config.fuse)
    for prompt in {request.prompt for request in requests}:
        family.check_prompt(pipe, prompt)
    output.mkdir(parents=True, exist_ok=True)
    # Contexts are 1 MB each on a real model, and wait on the CPU.
    texts = dict.fromkeys(text for request in requests for text in _texts(request))
    contexts = {text: family.encode_prompt(pipe, text) for text in texts}
    family.release_text(pipe)
    if on_ready is not None:
        on_ready()

    report = {
        "model": asdict(model),
        "adapters": {name: asdict(adapter) for name, adapter in config.adapters.items()},
        "fused": config.fuse,
        "guardrail": guardrail,
        "fps": config.fps,
        "conditioning_timestep": config.conditioning_timestep,
        "dtype": config.dtype,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }
    results: list[Result] = []
    rows: list[tuple[str, Frames]] = []
    with VideoProgress(len(requests)) as progress:
        for request in requests:
            started = time.monotonic()
            progress.start(request.name, request.num_steps)
            prompt, *negative = (contexts[text] for text in _texts(request))
            frames = family.generate_frames(
                pipe,
                request,
                prompt,
                negative[0] if negative else None,
                conditioning_timestep=config.conditioning_timestep,
                on_step=progress.step,
            )
            seconds = time.monotonic() - started
            result = Result(video=output / f"{request.name}.mp4", request=request, seconds=seconds)
            write_mp4(result.video, frames, config.fps)
            results.append(result)
            rows.append((f"{request.name}: {request.prompt}", spread_frames(frames, SHEET_COLUMNS)))
            _write_results(output / "results.json", report, results)
            progress.done(result.video, seconds)
            if on_video is not None:
                on_video(result)
    contact_sheet(output / "contact_sheet.png", rows, columns=SHEET_COLUMNS)
    return results


def _check_output(output: Path) -> None:
    """Raise UsageError unless `output` is a folder that can be written to, or can be made."""
    existing = next(folder for folder in (output.absolute(), *output.absolute().parents) if folder.exists())
    if not existing.is_dir():
        raise UsageError(f"infer.output: {output}: {existing} is a file; choose another folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UsageError(f"infer.output: {output}: cannot write into {existing}")


def _write_results(path: Path, report: dict[str, Any], results: Sequence[Result]) -> None:
    videos = [
        {"file": result.video.name, **asdict(result.request), "seconds": round(result.seconds, 3)} for result in results
    ]
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(json.dumps({**report, "videos": videos}, indent=2, default=str) + "\n", "utf-8")
    temporary.replace(path)


def _texts(request: Request) -> list[str]:
    """The prompt, and the negative prompt where guidance uses it: above 1, as in diffusers."""
    assert request.negative_prompt is not None
    return [request.prompt, request.negative_prompt] if request.guidance > 1 else [request.prompt]
