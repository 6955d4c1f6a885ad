"""What hints cost to compute: CPU seconds of one core for a window of 93 frames, by kind, and of decoding the window.

    python -m benchmarks.hints [--draws N]

The parameters of vis are drawn as training draws them; a frame stands for all of its window, since the cost of a filter
does not depend on the picture. `with IPP` is OpenCV's bilateral filter as its packages run it by default.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

from encode.decode import DecodeJob, decode_window
from infer.video import write_mp4
from manifests.hints import Frames, make_hint, training_parameters

NUM_FRAMES = 93
SIZES = ((432, 768), (704, 1280))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=200, help="parameters of vis to average over")
    draws = parser.parse_args().draws
    cv2.setNumThreads(1)
    print(f"{platform.processor() or platform.machine()}, OpenCV {cv2.__version__}; seconds of a core a window")
    source = picture(1080, 1920)
    with tempfile.TemporaryDirectory() as folder:
        video = Path(folder) / "source.mp4"
        write_mp4(video, np.stack([np.roll(source, 3 * index, 1) for index in range(NUM_FRAMES)]), 16.0)
        for height, width in SIZES:
            job = DecodeJob(path=video, first=0, num_frames=NUM_FRAMES, fps=16.0, height=height, width=width)
            report(height, width, decode_window(job)[0], seconds(lambda job=job: decode_window(job)), draws)


def report(height: int, width: int, frame: Frames, decoding: float, draws: int) -> None:
    print(f"{height}x{width}: decode from 1080p {decoding:.1f}")
    edge = training_parameters("edge", "0")
    print(f"{height}x{width}: edge {NUM_FRAMES * seconds(lambda: make_hint('edge', edge, frame)):.1f}")
    found: dict[str, list[float]] = {"bilateral": [], "gaussian": [], "both": []}
    for index in range(draws):
        drawn = training_parameters("vis", str(index))
        name = (
            "both" if {"bilateral", "gaussian"} <= drawn.keys() else "bilateral" if "bilateral" in drawn else "gaussian"
        )
        found[name].append(NUM_FRAMES * seconds(lambda drawn=drawn: make_hint("vis", drawn, frame)))
    for name, costs in found.items():
        spread = f"{min(costs):.1f} to {max(costs):.1f}, {len(costs)} draws"
        print(f"{height}x{width}: vis, {name}: mean {np.mean(costs):.1f}, {spread}")
    everything = [cost for costs in found.values() for cost in costs]
    print(f"{height}x{width}: vis as drawn: mean {np.mean(everything):.1f} over {draws} draws")
    for ipp in (True, False):
        cv2.ipp.setUseIPP(ipp)
        cost = NUM_FRAMES * seconds(lambda: cv2.bilateralFilter(frame, 30, 150, 100))
        print(f"{height}x{width}: the bilateral filter of the presets, {'with' if ipp else 'without'} IPP {cost:.1f}")


def picture(height: int, width: int) -> Frames:
    """Colour noise with the spectrum of photographs, amplitude 1 / frequency."""
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.rfftfreq(width)[None], np.fft.fftfreq(height)[:, None])
    frequency[0, 0] = 1
    channels = []
    for _ in range(3):
        spectrum = (rng.normal(size=frequency.shape) + 1j * rng.normal(size=frequency.shape)) / frequency
        channel = np.fft.irfft2(spectrum, (height, width))
        channels.append(128 + 50 * (channel - channel.mean()) / channel.std())
    return np.ascontiguousarray(np.clip(np.stack(channels, -1), 0, 255).astype(np.uint8))


def seconds(run: Callable[[], object]) -> float:
    """CPU seconds of a call; the smaller of two."""
    costs = []
    for _ in range(2):
        begin = time.process_time()
        run()
        costs.append(time.process_time() - begin)
    return min(costs)


if __name__ == "__main__":
    main()
