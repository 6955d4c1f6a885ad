"""`latentline demo`: data, a tiny checkpoint, then the same three stages every user runs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from manifests.errors import EXIT_DONE, LatentlineError
from pipeline.demo.checkpoint import build_tiny_checkpoint
from pipeline.demo.videos import make_videos
from pipeline.encode_stage import encode_stage
from pipeline.recipe import load_recipe, resolved, to_toml
from pipeline.report import log, quiet_libraries
from pipeline.stages import infer_stage, train_stage

NUM_VIDEOS = 12
PROMPTS = 2


def run_demo(output: Path, *, executor: str = "ray") -> dict[str, Any]:
    """Make videos, encode them, train a LoRA on the cache, generate with it; return where everything lies.

    Everything is under `output`, and a second run reuses what is there: nothing is encoded again and the
    finished training run is found. The model has random weights: it shows the plumbing, not pictures.
    """
    begin = time.monotonic()
    quiet_libraries()
    checkpoint, data = output / "checkpoint", output / "data"
    log("1/5 a tiny Cosmos-Predict2.5 checkpoint with random weights")
    build_tiny_checkpoint(checkpoint)
    log(f"2/5 {NUM_VIDEOS} short videos with captions")
    make_videos(data, num_videos=NUM_VIDEOS, height=96, width=160, num_frames=33)
    recipe_file = output / "demo.toml"
    recipe = load_recipe(
        "demo",
        [
            f"model.path={checkpoint}",
            f"data.datasets.shapes.path={data}",
            f"encode.cache={output / 'cache'}",
            f"encode.executor={executor}",
            f"train.output={output / 'train'}",
            f"infer.output={output / 'videos'}",
            f"infer.adapters.shapes.path={output / 'train' / 'adapter'}",
        ],
    )
    recipe_file.write_text(to_toml(resolved(recipe)))
    log("3/5 encode: videos and captions to latents and contexts, once")
    encoded, _ = encode_stage(recipe)
    log("4/5 train: a LoRA from the cache alone")
    trained = train_stage(recipe)
    log("5/5 infer: videos with the adapter")
    prompts = output / "prompts"
    _pick_prompts(data, prompts)
    generated, code = infer_stage(recipe, str(prompts), guardrail=False)
    if code != EXIT_DONE:
        raise LatentlineError(f"infer: {generated['failed'][0]}")
    return {
        "recipe": str(recipe_file),
        "checkpoint": str(checkpoint),
        "data": str(data),
        "cache": encoded["cache"],
        "samples": encoded["samples"],
        "encoded": encoded["encoded"],
        "adapter": trained["adapter"],
        "loss": trained["loss"],
        "videos": generated["videos"],
        "contact_sheet": str(output / "videos" / "contact_sheet.png"),
        "seconds": round(time.monotonic() - begin, 1),
    }


def _pick_prompts(data: Path, folder: Path) -> None:
    """Turn the first frames of a few training videos into image2world inputs, `<stem>.png` and `<stem>.txt`."""
    from PIL import Image

    from infer.video import read_frames

    folder.mkdir(parents=True, exist_ok=True)
    for video in sorted((data / "videos").glob("*.mp4"))[:PROMPTS]:
        Image.fromarray(read_frames(video)[0]).save(folder / f"{video.stem}.png")
        caption = (data / "metas" / f"{video.stem}.txt").read_text(encoding="utf-8")
        (folder / f"{video.stem}.txt").write_text(caption, encoding="utf-8")
