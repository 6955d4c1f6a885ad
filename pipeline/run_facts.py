"""What a run's folder says of its data: written when training starts, read by the model card and the report."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from manifests.config import ModelConfig
from manifests.family import find_family
from manifests.snapshot import Snapshot

DATASET_NAME = "dataset.json"


def write_dataset_facts(snapshot: Snapshot, model: ModelConfig, output: Path) -> None:
    """Write `dataset.json` beside a run's other outputs, whole or not at all."""
    output.mkdir(parents=True, exist_ok=True)
    temporary = output / f".{DATASET_NAME}.part"
    temporary.write_text(json.dumps(dataset_facts(snapshot, model), indent=2) + "\n", encoding="utf-8")
    temporary.replace(output / DATASET_NAME)


def read_dataset_facts(output: Path) -> dict[str, Any] | None:
    path = output / DATASET_NAME
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def dataset_facts(snapshot: Snapshot, model: ModelConfig) -> dict[str, Any]:
    """Count what a snapshot holds.

    snapshot: its hash. samples, videos, captions: counts, videos by content. datasets: samples of each. sizes: one
    entry a shape and rate: height and width in pixels, frames, fps (None where the cache does not say), samples.
    """
    table = snapshot.table
    stride = find_family("encode", model).SPATIAL_STRIDE
    rows = zip(*(table[name].to_pylist() for name in ("latents_shape", "num_frames", "fps")), strict=True)
    sizes = Counter((shape[-2] * stride, shape[-1] * stride, frames, fps) for shape, frames, fps in rows)
    return {
        "snapshot": snapshot.hash,
        "samples": snapshot.num_samples,
        "videos": len(set(table["source"].to_pylist())),
        "captions": len(set(table["caption"].to_pylist())),
        "datasets": dict(sorted(Counter(table["dataset"].to_pylist()).items())),
        "sizes": [
            {"height": height, "width": width, "frames": frames, "fps": fps, "samples": samples}
            for (height, width, frames, fps), samples in sizes.most_common()
        ],
    }


def size_line(size: dict[str, Any]) -> str:
    """`432x768, 93 frames at 16 fps: 92 samples`."""
    frames = f", {size['frames']} frames" if size["frames"] else ""
    fps = f" at {size['fps']:g} fps" if size["fps"] else ""
    return f"{size['height']}x{size['width']}{frames}{fps}: {size['samples']} samples"
