"""What was made, and by what: the fingerprint of a video, kept inside it, and `results.json`.

A video's fingerprint covers all that determines its frames: the request with the bytes of its inputs, weights of the
model and the adapters, and the settings. It is in the MP4's comment, so a video and its fingerprint appear together:
whoever finds the fingerprint it wants need not make the video again, whatever ended the run before.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import av

from infer.adapters import find_adapter
from infer.config import AdapterConfig, ControlnetConfig, InferConfig
from infer.request import Request
from infer.trained import is_trained_only, trained_file
from manifests.config import ModelConfig
from manifests.fingerprint import component_folder, files_digest, weights_digest
from manifests.keys import digest, file_digest

VERSION = 1
"""Goes up when the same request would give another video."""

_PREFIX = "latentline:"
_COMPONENTS = ("text_encoder", "transformer", "vae")
_CONFIGS = ("scheduler", "tokenizer", "transformer")


@dataclass(frozen=True, kw_only=True)
class Result:
    """What became of a request.

    status: made, kept (the video was there already) or failed. video: the MP4, None if failed. seconds: wall time of
    making it, None where unknown. error: why there is no video, or no score. psnr (dB; None too if the videos are
    equal), ssim: against the ground truth.
    """

    request: Request
    fingerprint: str
    status: str
    video: Path | None
    seconds: float | None = None
    error: str | None = None
    psnr: float | None = None
    ssim: float | None = None

    def facts(self) -> dict[str, Any]:
        """What another rank needs to know of it, plain JSON."""
        names = ("status", "seconds", "error", "psnr", "ssim")
        return {name: getattr(self, name) for name in names}

    def record(self) -> dict[str, Any]:
        """Its entry in results.json."""
        record: dict[str, Any] = {} if self.video is None else {"file": self.video.name}
        record |= {"status": self.status, **asdict(self.request), "fingerprint": self.fingerprint}
        record["seconds"] = None if self.seconds is None else round(self.seconds, 3)
        if self.error is not None:
            record["error"] = self.error
        if self.request.ground_truth is not None:
            record |= {"psnr": self.psnr, "ssim": self.ssim}
        return record


def _weights(path: Path) -> str:
    """The digest of a file of weights. safetensors writes the same metadata in any order: that makes no difference."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(length)) if length < path.stat().st_size else None
        except ValueError:  # another format
            header = None
    return file_digest(path) if header is None else digest([header, file_digest(path, 8 + length)])


def fingerprints(
    model: ModelConfig, config: InferConfig, requests: Sequence[Request], *, guardrail: bool
) -> dict[str, str]:
    """The fingerprint of each request's video, by name. Weights are read once, then remembered by file."""
    adapters = [
        [[_weights(path) for path in weight_files(adapter)], adapter.weight, adapter.sigma_min, adapter.sigma_max]
        for _, adapter in sorted(config.adapters.items())
    ]
    shared = [
        VERSION,
        model.family,
        [weights_digest(component_folder(model, name)) for name in _COMPONENTS],
        [files_digest(component_folder(model, name), ("*.json",)) for name in _CONFIGS],
        [adapters, config.fuse, config.dtype, config.fps, config.conditioning_timestep, guardrail],
    ]
    if config.base_linears != "dtype":
        shared.append(config.base_linears)
    if any(request.controls for request in requests):
        named = [replace(model, controlnet=net.path, controlnet_revision=net.revision) for net in _nets(config)]
        shared.append([weights_digest(component_folder(one, "controlnet")) for one in (model, *named)])
        shared.append(sorted(config.controlnets))
    return {request.name: digest([shared, _facts(request)]) for request in requests}


def _nets(config: InferConfig) -> list[ControlnetConfig]:
    return [config.controlnets[kind] for kind in sorted(config.controlnets)]


def read_fingerprint(video: Path) -> str | None:
    """The fingerprint inside a video, None where there is no video or it has none."""
    try:
        with av.open(str(video)) as container:
            comment = container.metadata.get("comment", "")
    except (OSError, av.FFmpegError):
        return None
    return comment.removeprefix(_PREFIX) if comment.startswith(_PREFIX) else None


def comment_of(fingerprint: str) -> str:
    """What to write into a video for `read_fingerprint`."""
    return _PREFIX + fingerprint


def write_results(path: Path, report: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> None:
    """Write results.json as a whole, or not at all."""
    temporary = path.with_name(f".{path.name}.part")
    text = json.dumps({**report, "videos": list(records)}, indent=2, allow_nan=False, default=str)
    temporary.write_text(text + "\n", "utf-8")
    temporary.replace(path)


def read_records(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """The videos of an earlier results.json by name and fingerprint, for what the videos themselves do not say."""
    try:
        videos = json.loads(path.read_text("utf-8"))["videos"]
        return {(video["name"], video["fingerprint"]): video for video in videos if video["status"] != "failed"}
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # none yet, or another program's: seconds and scores of videos that are kept stay unknown


def weight_files(adapter: AdapterConfig) -> list[Path]:
    """All the weights an adapter brings."""
    trained = trained_file(adapter)
    own = [] if is_trained_only(adapter) else [find_adapter(Path(adapter.path))]
    return own + ([trained] if trained else [])


def _facts(request: Request) -> dict[str, Any]:
    facts = asdict(request) | {
        name: path and file_digest(path) for name, path in (("image", request.image), ("video", request.video))
    }
    for name in ("name", "ground_truth", "controls", "source", "image_context", "first_frame"):
        del facts[name]
    if request.controls:
        files = ("path", "mask")
        facts["controls"] = [
            asdict(control) | {name: (path := getattr(control, name)) and file_digest(path) for name in files}
            for control in request.controls
        ]
        facts["source"] = request.source and file_digest(request.source)
    if request.image_context:
        facts["image_context"] = file_digest(request.image_context)
    return facts
