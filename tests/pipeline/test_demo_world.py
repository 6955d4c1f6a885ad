"""The world's clips show what their captions say, exactly where the ground truth says, the same for the same seed."""

import itertools
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from infer.video import read_frames
from manifests.errors import UsageError
from pipeline.demo.draw import draw_clip, layers_of, paint
from pipeline.demo.videos import different_scenes, make_videos
from pipeline.demo.world import (
    BACKGROUNDS,
    COLOURS,
    MOTIONS,
    SHAPES,
    SKS,
    SKS_SIZES,
    Scene,
    Thing,
    exactly,
    scenes,
    sks_scene,
)


def scene(**thing: str) -> Scene:
    values = {"shape": "circle", "size": "small", "motion": "stays still", "colour": "red", "start": "centre"} | thing
    return Scene(background="black", things=(Thing(**values),))


def of_colour(frames_THWC: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    return (np.abs(frames_THWC.astype(int) - colour).sum(-1) < 10).sum((1, 2))


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
        assert " ".join(stem.split("_")[1:]) in caption
        assert any(f"background is {background}." in caption for background in BACKGROUNDS)


def test_same_seed_gives_the_same_bytes_and_another_seed_does_not(tmp_path: Path) -> None:
    def make(name: str, seed: int) -> list[bytes]:
        paths = make_videos(tmp_path / name, num_videos=2, seed=seed, height=32, width=32, num_frames=5)
        return [p.read_bytes() for p in paths]

    assert make("a", 0) == make("b", 0)
    assert make("a", 0) != make("c", 1)


def test_a_scene_is_a_function_of_seed_domain_and_number() -> None:
    ten = list(itertools.islice(scenes(5), 10))
    assert list(itertools.islice(scenes(5), 6, 10)) == ten[6:]
    assert list(itertools.islice(scenes(6), 10)) != ten


def test_the_base_domain_shows_every_word_of_its_grammar_and_never_the_held_out_one() -> None:
    text = " ".join(scene.caption for scene in itertools.islice(scenes(0), 2000))
    for word in (*COLOURS, *SHAPES, *MOTIONS, *BACKGROUNDS, "pillar"):
        assert word in text
    assert SKS not in text
    assert "hops" not in text


def test_the_held_out_domain_has_24_captions_and_then_begins_again() -> None:
    found = list(itertools.islice(scenes(0, SKS), 48))
    assert len({scene.caption for scene in found[:24]}) == 24
    assert [scene.caption for scene in found[24:]] == [scene.caption for scene in found[:24]]
    assert len(set(found)) == 48  # each starts elsewhere


def test_different_scenes_have_different_captions() -> None:
    assert len({scene.caption for scene in different_scenes(30, 0)}) == 30


@pytest.mark.parametrize(("motion", "axis", "sign"), [("moves left fast", 0, -1), ("moves down slowly", 1, 1)])
def test_the_caption_is_true_of_the_frames(motion: str, axis: int, sign: int) -> None:
    clip = draw_clip(scene(motion=motion), height=48, width=96, num_frames=9)
    middles = []
    for frame in clip.frames:
        rows, columns = np.nonzero(np.abs(frame.astype(int) - COLOURS["red"]).sum(-1) < 10)
        middles.append((columns.mean(), rows.mean())[axis])
    steps = sign * np.diff(middles)
    assert (steps > 0).all()
    np.testing.assert_array_equal(clip.frames[:, 0, 0], np.broadcast_to(BACKGROUNDS["black"], (9, 3)))


def test_the_truth_is_where_the_pixels_are() -> None:
    for found in itertools.islice(scenes(1), 20):
        clip = draw_clip(replace(found, pillar=None, things=found.things[:1]))
        if found.things[0].shape == "triangle":  # its middle is not that of its pixels
            continue
        for time, mask_HW in enumerate(clip.masks[0]):
            rows, columns = np.nonzero(mask_HW)
            np.testing.assert_allclose((columns.mean(), rows.mean()), clip.centre()[time], atol=0.6)


def test_walls_turn_a_shape_back_and_keep_it_whole() -> None:
    thing = scene(motion="moves right fast", start="right", size="large").things[0]
    path_T2 = thing.path(17, 1.0)
    assert path_T2[:, 0].max() <= 1 - thing.radius + 1e-9
    assert np.diff(path_T2[:, 0])[0] > 0 > np.diff(path_T2[:, 0])[-1]
    area_T = draw_clip(scene(motion="moves right fast", start="right", size="large")).area[0]
    assert area_T.min() > 0.95 * area_T.max()


def test_what_is_before_hides_what_is_behind() -> None:
    alone = scene(motion="moves right fast", start="left")
    hidden = replace(alone, pillar="white")
    clips = [draw_clip(found) for found in (alone, hidden)]
    assert clips[0].area[0].min() == clips[0].area[0].max() or clips[0].area[0].min() > 0.9 * clips[0].area[0].max()
    assert clips[1].area[0].min() < 0.6 * clips[1].area[0].max()
    front, behind = (
        Thing(shape="square", size="large", motion="stays still", colour="blue", start="centre"),
        alone.things[0],
    )
    both = draw_clip(Scene(background="black", things=(front, replace(behind, motion="stays still", start="centre"))))
    assert both.area[1].max() == 0
    assert (of_colour(both.frames, COLOURS["red"]) == 0).all()


def test_the_new_object_hops_and_shows_both_its_colours() -> None:
    found = sks_scene(size="small", motion="hops from left to right", background="grey")
    clip = draw_clip(found)
    x, y = clip.centre().T
    assert (np.diff(x) > 0).all()
    assert ((y[1:-1] < y[:-2]) & (y[1:-1] <= y[2:])).sum() == 1  # one top
    for colour in found.things[0].colours:
        assert (of_colour(clip.frames, colour) > 20).all()
    assert found.caption == "A small sks hops from left to right. The background is grey."


def test_exactly_starts_where_the_words_say() -> None:
    found = next(scenes(3))
    assert found.things[0].offset != (0.0, 0.0)
    assert exactly(found).things[0].offset == (0.0, 0.0)
    assert exactly(found).caption == found.caption


def test_many_scenes_are_drawn_as_each_alone() -> None:
    found = list(itertools.islice(scenes(2), 6)) + list(itertools.islice(scenes(2, SKS), 2))
    together = paint(layers_of(found, num_frames=5, aspect=1.5), height=32, width=48)
    for frames_THWC, each in zip(together, found, strict=True):
        alone = draw_clip(each, height=32, width=48, num_frames=5)
        torch.testing.assert_close(frames_THWC, torch.from_numpy(alone.frames), rtol=0, atol=0)


def test_an_unknown_word_is_refused() -> None:
    with pytest.raises(UsageError, match=f"size: 'tiny' is none of {', '.join(SKS_SIZES)}"):
        sks_scene(size="tiny", motion="hops from left to right", background="grey")
