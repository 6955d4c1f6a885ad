"""The loaded model with its adapters and the prompts' contexts: makes one video after another."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from infer.adapters import load_adapters
from infer.chunks import generate_pieces, split_request
from infer.config import InferConfig
from infer.controls import side_by_side_path
from infer.progress import VideoProgress
from infer.ranges import switched_by_sigma
from infer.request import Request
from infer.results import Result, comment_of
from infer.team import Team
from infer.trained import load_trained_weights
from infer.video import Frames, video_writer
from manifests.config import ModelConfig
from manifests.errors import LatentlineError, UsageError
from manifests.family import find_family
from train.fp8 import check_device, quantise_base

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Studio:
    """contexts: by text, on the CPU, 1 MB each on a real model. rejected: by text, what the guardrail says of it."""

    family: ModuleType
    pipe: Any
    config: InferConfig
    contexts: dict[str, Tensor]
    rejected: dict[str, str]
    team: Team

    @classmethod
    def open(
        cls,
        model: ModelConfig,
        config: InferConfig,
        requests: Sequence[Request],
        *,
        guardrail: bool,
        team: Team,
        accelerate_vae: Callable[[Any], None],
    ) -> Studio:
        """Load model and adapters on this rank's device and encode the requests' prompts."""
        family = find_family("infer", model)
        pipe = family.load_pipeline(
            model,
            dtype=_DTYPES[config.dtype],
            device=team.ranks.device,
            guardrail=guardrail,
            accelerate_vae=accelerate_vae,
        )
        if config.controlnets:
            family.add_controlnets(pipe, model, config.controlnets, dtype=_DTYPES[config.dtype])
        load_adapters(pipe, load_trained_weights(pipe, config.adapters), fuse=config.fuse)
        if config.base_linears == "fp8":  # after adapters: they find plain layers, and fused ones are in the weights
            blocks = pipe.transformer.transformer_blocks
            quantise_base(blocks, find_family("train", model).TOKEN_LINEARS, team.ranks.device)
        found = _rejected(family, pipe, requests) if team.is_leader else None
        rejected = json.loads(team.share("rejected", None if found is None else json.dumps(found).encode()))
        texts = dict.fromkeys(text for request in requests for text in _texts(request))
        contexts = {text: family.encode_prompt(pipe, text) for text in texts if text not in rejected}
        family.release_text(pipe)
        return cls(family, pipe, config, contexts, rejected, team)

    def make(
        self, request: Request, output: Path, fingerprint: str, *, turn: int, progress: VideoProgress
    ) -> Result | None:
        """Make one video and write it, or say why there is none; None on ranks that do not lead the team.

        Where ranks make a video together, an error that is not about the request ends the run: the others would wait
        in a collective. Alone, a rank records it too and goes on.
        """
        started = time.monotonic()
        path = output / f"{request.name}.mp4"

        def result(status: str, error: str | None = None) -> Result | None:
            if not self.team.is_leader:
                return None
            seconds = time.monotonic() - started
            video = path if error is None else None
            return Result(
                request=request, fingerprint=fingerprint, status=status, video=video, seconds=seconds, error=error
            )

        try:
            self._write(request, path, fingerprint, turn, progress)
        except LatentlineError as error:
            return result("failed", " ".join(str(error).split()))
        except Exception as error:
            if self.team.layout.team_size > 1:
                raise
            _log.exception("%s: could not be made", request.name)
            if isinstance(error, torch.OutOfMemoryError):
                torch.cuda.empty_cache()
            return result("failed", f"{type(error).__name__}: {' '.join(str(error).split())}")
        return result("made")

    def _write(self, request: Request, path: Path, fingerprint: str, turn: int, progress: VideoProgress) -> None:
        if request.prompt in self.rejected:
            raise LatentlineError(self.rejected[request.prompt])
        pieces = split_request(request, self.family.latent_frames_of)
        progress.start(request.name, request.num_steps * len(pieces))
        prompt, *negative = (self.contexts[text] for text in _texts(request))

        with switched_by_sigma(self.pipe, self.config.adapters) as on_sigma:

            def make(piece: Request, previous_THWC: Frames | None) -> Frames | None:
                return self.family.generate_frames(
                    self.pipe,
                    piece,
                    prompt,
                    negative[0] if negative else None,
                    conditioning_timestep=self.config.conditioning_timestep,
                    on_step=progress.step,
                    on_sigma=on_sigma,
                    previous_THWC=previous_THWC,
                    team=self.team,
                )

            frames = generate_pieces(make, request, pieces, self.team, turn)
            if not self.team.is_leader:
                for _ in frames:
                    raise AssertionError("a rank that does not lead has frames")
                return
            comment = comment_of(fingerprint)
            fps = self.family.fps_of(request) if request.controls else self.config.fps
            side_by_side_path(path).unlink(missing_ok=True)  # of an earlier video
            with closing(frames), video_writer(path, fps, comment=comment) as write:
                for piece_THWC in frames:
                    write(piece_THWC)
        if self.config.side_by_side:
            self.family.write_side_by_side(request, path)


def check_base_linears(config: InferConfig, device: torch.device) -> None:
    """Raise UsageError unless `infer.base_linears` goes with the dtype and the device."""
    if config.base_linears == "dtype":
        return
    if config.dtype != "bfloat16":
        raise UsageError(f"infer.base_linears = fp8 goes with infer.dtype = bfloat16, not {config.dtype}")
    check_device(device, "infer")


def _rejected(family: ModuleType, pipe: Any, requests: Sequence[Request]) -> dict[str, str]:
    rejected = {}
    for prompt in dict.fromkeys(request.prompt for request in requests):
        try:
            family.check_prompt(pipe, prompt)
        except LatentlineError as error:
            rejected[prompt] = str(error)
    return rejected


def _texts(request: Request) -> list[str]:
    """The prompt, and the negative prompt where guidance uses it: above 1, as in diffusers."""
    assert request.negative_prompt is not None
    return [request.prompt, request.negative_prompt] if request.guidance > 1 else [request.prompt]
