"""Videos longer than the window: how they are split, joined and counted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import Cosmos2_5_PredictBasePipeline

from infer import cosmos25
from infer.chunks import generate_pieces, split_request
from infer.config import InferConfig
from infer.inputs import read_requests
from infer.request import Request
from infer.team import Layout, Team
from infer.video import Frames
from manifests.errors import UsageError
from train.parallel import Ranks

CONFIG = InferConfig(num_steps=2, num_frames=21, height=32, width=48, guidance=1.0, chunk_frames=9, seed=3)
ALONE = Team(Ranks(0, 1, 0, 1, torch.device("cpu")), Layout(1, 1, 1), None)


def request(**changes: object) -> Request:
    (text,) = read_requests("a red circle", CONFIG)
    return replace(text, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("num_frames", "overlap", "pieces"), [(9, 1, 1), (10, 1, 2), (17, 1, 2), (18, 1, 3), (13, 5, 2), (14, 5, 3)]
)
def test_there_are_as_many_pieces_as_it_takes_and_frames_as_were_asked_for(
    num_frames: int, overlap: int, pieces: int
) -> None:
    wanted = request(num_frames=num_frames, chunk_overlap=overlap)
    cosmos25.check_request(wanted)
    parts = split_request(wanted, cosmos25.latent_frames_of)
    assert [part.num_frames for part in parts] == [9] * pieces
    assert [part.seed for part in parts] == list(range(3, 3 + pieces))
    begun_with: list[Frames | None] = []

    def count_up(piece: Request, previous: Frames | None) -> Frames:
        """Frames whose value is their number in the whole video."""
        begun_with.append(previous)
        first = 0 if previous is None else int(previous[0, 0, 0, 0])
        return np.broadcast_to(np.arange(first, first + 9, dtype=np.uint8)[:, None, None, None], (9, 32, 48, 3))

    made = np.concatenate(list(generate_pieces(count_up, wanted, parts, ALONE, 0)))
    assert made[:, 0, 0, 0].tolist() == list(range(num_frames))
    assert begun_with[0] is None
    assert all(previous is not None and len(previous) == overlap for previous in begun_with[1:])


@pytest.mark.parametrize("overlap", [1, 5])
def test_each_piece_begins_with_the_last_frames_of_the_one_before(
    pipe: Cosmos2_5_PredictBasePipeline, overlap: int
) -> None:
    wanted = request(chunk_overlap=overlap, num_frames=14)
    context = cosmos25.encode_prompt(pipe, wanted.prompt)

    def make(piece: Request, previous: Frames | None) -> Frames | None:
        return cosmos25.generate_frames(
            pipe,
            piece,
            context,
            None,
            conditioning_timestep=0.0001,
            on_step=lambda: None,
            previous_THWC=previous,
            team=ALONE,
        )

    parts = split_request(wanted, cosmos25.latent_frames_of)
    first, second, *_ = generate_pieces(make, wanted, parts, ALONE, 0)
    alone = make(request(num_frames=9), None)
    np.testing.assert_array_equal(first, alone)
    following = make(parts[1], first[-overlap:])
    assert following is not None
    np.testing.assert_array_equal(second, following[overlap : overlap + len(second)])
    assert len(first) + len(second) == min(14, 9 + 9 - overlap)
    other = make(parts[1], np.zeros_like(first[-overlap:]))
    assert other is not None
    assert np.abs(following.astype(int) - other).mean() > 1  # what it begins with matters


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chunk_frames": 8}, r"chunk_frames = 8 is not 4k\+1; near: 5 or 9"),
        ({"chunk_overlap": 2}, "chunk_overlap = 2; it is 1 or 5"),
        ({"chunk_frames": 5, "chunk_overlap": 5}, "less than chunk_frames = 5"),
        ({"chunk_frames": None, "num_frames": 22}, r"num_frames = 22 is not 4k\+1"),
        ({"num_frames": 8}, r"num_frames = 8 is not 4k\+1"),
        (
            {"chunk_frames": 5, "video": Path("x.mp4"), "num_latent_conditional_frames": 2},
            "chunk_frames = 5 is 2 latent frames, all of them conditioning",
        ),
    ],
)
def test_windows_that_cannot_be_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        cosmos25.check_request(request(**changes))


def test_a_piece_that_fails_ends_the_video(tmp_path: Path) -> None:
    made: list[Request] = []

    def fails_later(piece: Request, previous: Frames | None) -> Frames:
        made.append(piece)
        if previous is not None:
            raise UsageError("no more")
        return np.zeros((9, 32, 48, 3), np.uint8)

    wanted = request()
    pieces: Callable[[], object] = lambda: list(  # noqa: E731
        generate_pieces(fails_later, wanted, split_request(wanted, cosmos25.latent_frames_of), ALONE, 0)
    )
    with pytest.raises(UsageError, match="no more"):
        pieces()
    assert len(made) == 2
