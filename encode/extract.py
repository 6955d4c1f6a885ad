"""Depth and segments of a video, by models of transformers: what `latentline encode --make` writes as control videos.

Depth: a `DepthAnythingForDepthEstimation`, frame by frame; grey from the least to the greatest depth of the video.
Segments: a `Sam2VideoModel` that follows what lies at a grid of points in the first frame; each object keeps one
colour, what no object covers is black. Objects that appear later are not followed.
"""

from __future__ import annotations

import colorsys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from numpy.typing import NDArray
from transformers import (
    AutoImageProcessor,
    DepthAnythingForDepthEstimation,
    Sam2VideoModel,
    Sam2VideoProcessor,
)

from encode.config import ExtractConfig
from manifests.errors import UsageError

Frames: TypeAlias = NDArray[np.uint8]


def load_extractor(kind: Literal["depth", "seg"], config: ExtractConfig, device: torch.device) -> Any:
    """A `DepthExtractor` or `SegmentExtractor` with the weights `encode.extract` names; UsageError without them."""
    path = config.depth if kind == "depth" else config.seg
    folder = Path(path).expanduser()
    if not folder.is_dir():
        if folder.is_absolute() or path.startswith((".", "~")):
            raise UsageError(f"encode.extract.{kind} {path!r}: no such folder")
        try:
            folder = Path(snapshot_download(path, allow_patterns=["*.json", "*.safetensors"]))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UsageError(
                f"encode.extract.{kind} {path!r}: neither a local folder nor a model the hub gives: {reason}; put "
                f"{kind} videos beside the dataset instead, or name a folder with the weights"
            ) from error
    try:
        return (DepthExtractor if kind == "depth" else SegmentExtractor)(folder, config, device)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"encode.extract.{kind} {path!r}: cannot be loaded: {reason}") from error


def _load(kind: Any, folder: Path, device: torch.device) -> Any:
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    if problem := next((name for name in ("missing_keys", "mismatched_keys", "unexpected_keys") if info[name]), None):
        raise ValueError(f"{len(info[problem])} {problem.replace('_', ' ')} (first: {min(map(str, info[problem]))})")
    return model.to(device).eval()


class DepthExtractor:
    """Holds a video's depth at the model's size, in float16, until the last frame has told the range."""

    def __init__(self, folder: Path, config: ExtractConfig, device: torch.device) -> None:
        self._processor = AutoImageProcessor.from_pretrained(folder)
        self._model = _load(DepthAnythingForDepthEstimation, folder, device)
        self._device = device

    @torch.no_grad()
    def video(self, pieces: Iterable[Frames]) -> Iterator[Frames]:
        """Grey frames for pieces of a video, [n, H, W, 3] each: near is bright, as the model's inverse depth is."""
        found: list[torch.Tensor] = []
        size = (0, 0)
        for piece_THWC in pieces:
            size = piece_THWC.shape[1:3]
            for frame in piece_THWC:
                inputs = self._processor(images=frame, return_tensors="pt").to(self._device)
                found.append(self._model(**inputs).predicted_depth[0].half().cpu())
        low = min(float(depth.min()) for depth in found)
        high = max(float(depth.max()) for depth in found)
        for depth_HW in found:
            scaled = (depth_HW.float() - low) / max(high - low, 1e-6)
            resized = F.interpolate(scaled[None, None], size, mode="bicubic", align_corners=False)[0, 0]
            grey = (resized.clamp(0, 1) * 255).round().to(torch.uint8).numpy()
            yield np.repeat(grey[None, :, :, None], 3, axis=3)


class SegmentExtractor:
    """Follows the objects of the first frame."""

    def __init__(self, folder: Path, config: ExtractConfig, device: torch.device) -> None:
        self._processor = Sam2VideoProcessor.from_pretrained(folder)
        self._model = _load(Sam2VideoModel, folder, device)
        self._device = device
        self._side = config.seg_points

    @torch.no_grad()
    def video(self, pieces: Iterable[Frames]) -> Iterator[Frames]:
        """Coloured frames for pieces of a video, [n, H, W, 3] each."""
        session = self._processor.init_video_session(inference_device=self._device)
        colours = palette(self._side**2)
        started = False
        for piece_THWC in pieces:
            height, width = piece_THWC.shape[1:3]
            for frame in piece_THWC:
                inputs = self._processor(images=frame, device=self._device, return_tensors="pt")
                if not started:
                    places = [(i + 0.5) / self._side for i in range(self._side)]
                    points = [[[[x * width, y * height]] for y in places for x in places]]
                    self._processor.add_inputs_to_inference_session(
                        session,
                        frame_idx=0,
                        obj_ids=list(range(1, self._side**2 + 1)),
                        input_points=points,
                        input_labels=[[[1]] * self._side**2],
                        original_size=(height, width),
                    )
                    started = True
                output = self._model(inference_session=session, frame=inputs.pixel_values[0])
                [masks] = self._processor.post_process_masks([output.pred_masks], [(height, width)], binarize=False)
                scores_KHW = masks[:, 0].float().cpu()
                best = scores_KHW.argmax(0) + 1
                best[scores_KHW.amax(0) <= 0] = 0
                yield colours[best.numpy()][None]


def palette(count: int) -> Frames:
    """[count + 1, 3]: black, and colours that differ in hue, then in brightness."""
    colours = [(0.0, 0.0, 0.0)]
    for index in range(count):
        colours.append(colorsys.hsv_to_rgb(index * 0.618034 % 1, 0.9, 1.0 - 0.5 * (index % 2)))
    return (np.asarray(colours) * 255).round().astype(np.uint8)
