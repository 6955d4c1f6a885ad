"""Videos longer than the model's window: made piece by piece, each beginning with the last frames of the one before.

The first piece is the request's own; the next is conditioned on the `chunk_overlap` last frames so far, with the seed
one higher. Its first frames, the VAE's copies of those, are dropped, so the pieces join without a repeated frame. All
pieces are as long as the window, what is too much of the last is cut. One piece is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import replace

import numpy as np

from infer.request import Request
from infer.team import Team
from infer.video import Frames

Make = Callable[[Request, Frames | None], Frames | None]
"""(request, frames to begin with) -> frames, None on ranks that do not decode."""


def split_request(request: Request, latent_frames_of: Callable[[int], int]) -> list[Request]:
    """The pieces a request is made in, one if it fits the window. latent_frames_of: of a number of frames."""
    if request.chunk_frames is None or request.num_frames <= request.chunk_frames:
        return [request]
    step = request.chunk_frames - request.chunk_overlap
    count = 1 + -(-(request.num_frames - request.chunk_frames) // step)
    first = replace(request, num_frames=request.chunk_frames)
    clean = latent_frames_of(request.chunk_overlap)
    following = replace(first, image=None, video=None, num_latent_conditional_frames=clean)
    return [first] + [
        replace(following, seed=request.seed + index, first_frame=index * step) for index in range(1, count)
    ]


def generate_pieces(
    make: Make, request: Request, pieces: list[Request], team: Team, turn: int
) -> Generator[Frames, None, None]:
    """Frames of the whole video, a piece at a time; none on ranks that do not decode. turn: a number used once.

    Close it (contextlib.closing) where its frames are not all taken: the team is told then that there is no more.
    """
    previous: Frames | None = None
    left = request.num_frames
    for index, piece in enumerate(pieces):
        name, is_last = f"frames/{turn}/{index}", index == len(pieces) - 1
        try:
            frames = make(piece, previous)
            if frames is not None:
                yield (frames if index == 0 else frames[request.chunk_overlap :])[:left]
                left -= len(frames) - (0 if index == 0 else request.chunk_overlap)
        except BaseException:
            if team.is_leader and not is_last:
                team.share(name, b"")
            raise
        if is_last:
            return
        tail = team.share(name, None if frames is None else frames[-request.chunk_overlap :].tobytes())
        if not tail:
            return  # the leader could not go on, and says why
        shape = (request.chunk_overlap, request.height, request.width, 3)
        previous = np.frombuffer(tail, np.uint8).reshape(shape)
