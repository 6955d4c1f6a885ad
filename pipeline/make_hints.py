"""`latentline encode --make depth|seg`: control videos for a dataset's videos, where `encode` looks for them."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import torch

from encode.decode import DecodeJob
from encode.extract import load_extractor
from encode.pool import DecodePool
from encode.probe import DecodeError
from encode.sources import SourceItem, hints_folder
from encode.survey import kept_videos
from infer.video import Frames, video_writer
from manifests.errors import EXIT_DONE, EXIT_QUARANTINED, LatentlineError
from manifests.sources import SourceFacts
from pipeline.recipe import Recipe
from pipeline.report import log, quiet_libraries, track

_PIECE = 16
"""Frames decoded at a time."""


def make_stage(recipe: Recipe, kind: Literal["depth", "seg"]) -> tuple[dict[str, Any], int]:
    """Write `<hints folder>/<kind>/<name>.mp4` for each video the recipe encodes that has none yet.

    As many frames as the video has, at its own rate and size (even numbers). Returns the result and the exit code: 3 if
    some videos could not be read. Raises UsageError if the model's weights are not there.
    """
    quiet_libraries()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    extractor = load_extractor(kind, recipe.encode.extract, device)
    wanted: dict[Path, tuple[SourceItem, SourceFacts]] = {}
    for item, facts in kept_videos(recipe.model, recipe.data, recipe.encode, track=track("reading videos")):
        folder = hints_folder(recipe.data.datasets[item.dataset]) / kind
        wanted.setdefault(folder / f"{PurePosixPath(item.name).name}.mp4", (item, facts))
    missing = {path: found for path, found in wanted.items() if not path.is_file()}
    failed = []
    with DecodePool(recipe.encode.num_decoders, recipe.encode.decode_timeout) as decoders:
        for path, (item, facts) in track(f"making {kind}")(list(missing.items()), len(missing)):
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with closing(_pieces(item, facts, decoders)) as pieces, video_writer(path, _rate(facts)) as write:
                    for frames in extractor.video(pieces):
                        write(frames)
            except LatentlineError as error:
                failed.append(f"{item.video}: {error}")
                log(f"no {kind} video: {failed[-1]}")
    made = len(missing) - len(failed)
    result = {"kind": kind, "made": made, "kept": len(wanted) - len(missing), "failed": failed}
    return result, EXIT_QUARANTINED if failed else EXIT_DONE


def _rate(facts: SourceFacts) -> float:
    return facts.source_fps or 1.0


def _pieces(item: SourceItem, facts: SourceFacts, decoders: DecodePool) -> Generator[Frames, None, None]:
    """The whole video, by time where its rate varies."""
    if facts.error is not None:
        raise LatentlineError(facts.error)
    assert facts.source_frames is not None
    assert facts.height is not None
    assert facts.width is not None
    fps = None if facts.frame_times is None else facts.source_fps
    jobs = [
        DecodeJob(
            path=item.video,
            first=first,
            num_frames=min(_PIECE, facts.source_frames - first),
            fps=fps,
            height=max(2, facts.height // 2 * 2),
            width=max(2, facts.width // 2 * 2),
        )
        for first in range(0, facts.source_frames, _PIECE)
    ]
    with closing(decoders.imap(jobs)) as decoded:
        for _, frames in decoded:
            if isinstance(frames, DecodeError):
                raise frames
            yield frames
