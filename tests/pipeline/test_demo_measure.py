"""What is measured from pixels is what was done to them."""

import math
from dataclasses import replace

import numpy as np
import pytest

from pipeline.demo.draw import draw_clip
from pipeline.demo.measure import edge_agreement, measure
from pipeline.demo.world import COLOURS, Scene, Thing, scenes, sks_scene

SQUARE = Scene(
    background="black",
    things=(Thing(shape="square", size="large", motion="moves right slowly", colour="red", start="left"),),
)
NEW = sks_scene(size="large", motion="hops from left to right", background="grey")


@pytest.mark.parametrize("scene", [SQUARE, NEW])
def test_the_truth_itself_is_perfect(scene: Scene) -> None:
    truth = draw_clip(scene)
    found = measure(truth.frames, truth)
    assert (found.appears, found.colour, found.place, found.psnr) == (1.0, 0.0, 0.0, math.inf)


@pytest.mark.parametrize("scene", [SQUARE, NEW])
def test_an_empty_video_shows_nothing(scene: Scene) -> None:
    truth = draw_clip(scene)
    empty = np.broadcast_to(truth.frames[:, :1, :1], truth.frames.shape)
    found = measure(empty, truth)
    assert found.appears == 0
    assert math.isnan(found.colour)
    assert found.place == pytest.approx(math.hypot(64, 64) / 2)


def test_a_shift_of_five_pixels_is_a_place_error_of_five() -> None:
    truth = draw_clip(SQUARE)
    found = measure(np.roll(truth.frames, 5, axis=1), truth)
    assert found.place == pytest.approx(5)
    assert found.appears == 1


def test_a_paler_colour_is_a_colour_error_of_its_distance() -> None:
    truth = draw_clip(SQUARE)
    paler = truth.frames.copy()
    paler[truth.masks[0]] = np.add(COLOURS["red"], [0, 30, 40])
    assert measure(paler, truth).colour == pytest.approx(50, abs=6)


def test_another_colour_or_shape_or_size_is_not_the_object() -> None:
    thing = SQUARE.things[0]
    truth = draw_clip(SQUARE)
    for other in (replace(thing, colour="blue"), replace(thing, size="small")):
        assert measure(draw_clip(replace(SQUARE, things=(other,))).frames, truth).appears == 0
    assert measure(truth.frames, draw_clip(NEW)).appears == 0


def test_half_of_the_new_object_is_not_the_object() -> None:
    truth = draw_clip(NEW)
    frames = truth.frames.copy()
    frames[(np.abs(frames.astype(int) - COLOURS["orange"]).sum(-1)) < 30] = COLOURS["green"]
    assert measure(frames, truth).appears == 0


def test_noise_of_a_known_size_is_its_psnr_and_does_not_hide_the_object() -> None:
    truth = draw_clip(NEW)
    noise = np.random.default_rng(0).choice([-20, 20], truth.frames.shape)
    found = measure(np.clip(truth.frames.astype(int) + noise, 0, 255).astype(np.uint8), truth)
    assert found.psnr == pytest.approx(20 * math.log10(255 / 20), abs=0.4)
    assert found.appears == 1
    assert found.place < 0.5


def test_frames_that_were_given_do_not_count() -> None:
    truth = draw_clip(SQUARE)
    frames = truth.frames.copy()
    frames[:5] = 0
    assert measure(frames, truth, first=5).psnr == math.inf
    assert measure(frames, truth).psnr < 30


def test_what_the_truth_hides_need_not_be_there() -> None:
    hidden = replace(SQUARE, things=(replace(SQUARE.things[0], motion="moves right fast"),), pillar="white")
    truth = draw_clip(hidden)
    assert measure(truth.frames, truth).appears == 1


def test_every_base_scene_is_found_in_its_own_frames() -> None:
    for scene, _ in zip(scenes(11), range(20), strict=False):
        truth = draw_clip(scene)
        assert measure(truth.frames, truth).appears == 1


def test_another_size_is_an_error() -> None:
    with pytest.raises(ValueError, match="cannot be compared"):
        measure(draw_clip(SQUARE, height=32, width=32).frames, draw_clip(SQUARE))


def test_edges_agree_as_far_as_the_tolerance() -> None:
    frames = draw_clip(SQUARE).frames
    assert edge_agreement(frames, frames) == 1
    moved = np.roll(frames, 3, axis=2)
    assert edge_agreement(moved, frames, tolerance=3) == 1
    assert edge_agreement(moved, frames) < 0.6  # what runs along the move still lies on itself
    assert edge_agreement(np.roll(frames, (9, 9), axis=(1, 2)), frames) < 0.2
    both = np.concatenate([frames[:, :, :32], np.roll(frames, 9, axis=1)[:, :, 32:]], 2)
    assert edge_agreement(frames, both) == pytest.approx(edge_agreement(both, frames))


@pytest.mark.parametrize("nothing", [0, 1])
def test_nothing_agrees_with_a_video_without_edges(nothing: int) -> None:
    videos = [draw_clip(SQUARE).frames] * 2
    videos[nothing] = np.zeros_like(videos[0])
    assert edge_agreement(*videos) == 0
