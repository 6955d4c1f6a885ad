"""A small encode job in a folder of its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from encode.config import DataConfig, DatasetConfig, EncodeConfig
from encode.job import EncodePlan, EncodeResult, finish_encode, plan_encode, run_encode
from manifests.config import ModelConfig
from tests.encode.video_files import write_video

CAPTIONS = {"a": "a circle", "b": "a square", "c": "a circle"}
# Contexts: two captions, the null context, the default negative prompt.
NOTHING = {"latents": 0, "context": 0}


class Job:
    """A folder of three videos of 20 frames at 10 fps, and the settings that encode it."""

    def __init__(self, root: Path, checkpoint: Path) -> None:
        self.root = root
        self.model = ModelConfig(path=str(checkpoint))
        self.cache = root / "cache"
        self.data = DataConfig(datasets={"d": DatasetConfig(layout="folder", path=str(root / "data"))})
        self.config = EncodeConfig(
            cache=str(self.cache),
            height=32,
            width=48,
            num_frames=9,
            fps=10.0,
            dtype="float32",
            decode_workers=1,
            executor="local",
            max_failed=0.5,
        )
        (root / "data" / "metas").mkdir(parents=True)
        (root / "data" / "videos").mkdir()
        for number, (stem, caption) in enumerate(CAPTIONS.items()):
            write_video(self.video(stem), 20 + number, fps=10)
            self.caption(stem, caption)

    def video(self, stem: str) -> Path:
        return self.root / "data" / "videos" / f"{stem}.mp4"

    def caption(self, stem: str, text: str) -> None:
        (self.root / "data" / "metas" / f"{stem}.txt").write_text(text)

    def plan(self, *, create: bool = True, retry: bool = False, **changes: Any) -> tuple[EncodeConfig, EncodePlan]:
        config = replace(self.config, **changes)
        planned = plan_encode(self.model, self.data, config, {"test": 1}, create=create, retry_quarantined=retry)
        return config, planned

    def encode(self, *, retry: bool = False, **changes: Any) -> EncodeResult:
        config, planned = self.plan(retry=retry, **changes)
        return finish_encode(config, planned, run_encode(self.model, config, planned))

    def manifests(self, kind: str) -> list[dict[str, Any]]:
        files = sorted((self.cache / "entries" / kind).glob("*.parquet"))
        return [row for file in files for row in pq.read_table(file).to_pylist()]

    def tars(self, kind: str) -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in (self.cache / "entries" / kind).glob("*.tar")}
