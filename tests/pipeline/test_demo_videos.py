from pathlib import Path

import av
import numpy as np
import pytest

from infer.video import read_frames
from manifests.errors import UsageError
from pipeline.demo.videos import BACKGROUNDS, COLOURS, Clip, choose_clips, make_videos, render_clip


def test_writes_h264_videos_with_the_asked_shape(tmp_path: Path) -> None:
    paths = make_videos(tmp_path, num_videos=3, height=64, width=96, num_frames=13, fps=8.0)
    assert sorted(tmp_path.glob("videos/*")) == paths
    assert len(paths) == 3
    for path in paths:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            assert stream.codec_context.name == "h264"
            assert stream.average_rate == 8
        assert read_frames(path).shape == (13, 64, 96, 3)


def test_every_video_has_its_own_caption_naming_what_is_shown(demo_dataset: Path) -> None:
    captions = {p.stem: p.read_text().strip() for p in (demo_dataset / "metas").glob("*.txt")}
    assert sorted(captions) == sorted(p.stem for p in (demo_dataset / "videos").glob("*.mp4"))
    assert len(set(captions.values())) == len(captions) == 4
    for stem, caption in captions.items():
        colour, shape = stem.split("_")[1:]
        assert f"{colour} {shape}" in caption
        assert any(background in caption for background in BACKGROUNDS)


def test_same_seed_gives_the_same_bytes_and_another_seed_does_not(tmp_path: Path) -> None:
    def make(name: str, seed: int) -> list[bytes]:
        paths = make_videos(tmp_path / name, num_videos=2, seed=seed, height=32, width=32, num_frames=5)
        return [p.read_bytes() for p in paths]

    assert make("a", 0) == make("b", 0)
    assert make("a", 0) != make("c", 1)


def test_the_caption_is_true_of_the_frames() -> None:
    clip = Clip(colour="red", shape="square", motion="slides from left to right", background="black")
    frames = render_clip(clip, height=48, width=96, num_frames=9).astype(int)
    is_red = np.abs(frames - COLOURS["red"]).sum(-1) < 10
    centre_x = [np.nonzero(mask)[1].mean() for mask in is_red]
    assert centre_x == sorted(centre_x)
    assert centre_x[-1] - centre_x[0] > 48
    np.testing.assert_array_equal(frames[:, 0, 0], np.broadcast_to(BACKGROUNDS["black"], (9, 3)))


def test_more_videos_than_different_clips_is_refused() -> None:
    with pytest.raises(UsageError, match="577 is more than the 576 different clips"):
        choose_clips(577, 0)
