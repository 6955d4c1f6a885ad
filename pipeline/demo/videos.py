"""Scenes as a dataset: short H.264 videos, each with a caption, in the `folder` layout."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from infer.video import write_mp4
from pipeline.demo.draw import draw_clip
from pipeline.demo.world import Scene, scenes


def make_videos(
    folder: Path,
    found: Iterable[Scene] | None = None,
    *,
    num_videos: int = 12,
    seed: int = 0,
    height: int = 64,
    width: int = 64,
    num_frames: int = 17,
    fps: float = 16.0,
) -> list[Path]:
    """Write `folder/videos/<number>_<name>.mp4` and `folder/metas/<the same>.txt`; return the videos, sorted.

    found: the scenes; None takes the first `num_videos` of the base domain with captions of their own. Files are the
    same bytes for the same arguments and library versions. height, width: pixels, even.
    """
    videos, metas = folder / "videos", folder / "metas"
    videos.mkdir(parents=True, exist_ok=True)
    metas.mkdir(parents=True, exist_ok=True)
    paths = []
    for index, scene in enumerate(different_scenes(num_videos, seed) if found is None else found):
        path = videos / f"{index:02d}_{scene.name}.mp4"
        write_mp4(path, draw_clip(scene, height=height, width=width, num_frames=num_frames).frames, fps)
        (metas / f"{path.stem}.txt").write_text(scene.caption + "\n", encoding="utf-8")
        paths.append(path)
    return paths


def different_scenes(count: int, seed: int) -> list[Scene]:
    """The first `count` scenes of the base domain whose captions differ."""
    by_caption: dict[str, Scene] = {}
    for scene in scenes(seed):
        by_caption.setdefault(scene.caption, scene)
        if len(by_caption) == count:
            break
    return list(by_caption.values())
