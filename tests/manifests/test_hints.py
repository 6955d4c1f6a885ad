from __future__ import annotations

import numpy as np
import pytest

from manifests.hints import (
    PRESETS,
    is_blank,
    make_hint,
    parameters_text,
    preset_parameters,
    training_parameters,
)
from manifests.padding import content_box, latent_mask, padding_of, reflect


def _picture() -> np.ndarray:
    picture = np.zeros((48, 64, 3), np.uint8)
    picture[12:36, 16:48] = (200, 60, 20)
    return picture


def test_edge_parameters_follow_the_training_distribution() -> None:
    drawn = [training_parameters("edge", str(number)) for number in range(2000)]
    lows = np.array([one["low"] for one in drawn])
    gaps = np.array([one["high"] - one["low"] for one in drawn])
    assert (lows.min(), lows.max()) == (20, 99)
    assert (gaps.min(), gaps.max()) == (50, 149)
    assert abs(lows.mean() - 59.5) < 2
    assert drawn[7] == training_parameters("edge", "7")


def test_vis_parameters_follow_the_training_distribution() -> None:
    drawn = [training_parameters("vis", str(number)) for number in range(3000)]
    assert {one["downscale"] for one in drawn} == {1, 2, 3, 4}
    assert {one["rescale"] for one in drawn} == set(range(4, 18))
    both = sum("bilateral" in one and "gaussian" in one for one in drawn)
    bilateral = sum("bilateral" in one for one in drawn) - both
    assert abs(both / 3000 - 0.2) < 0.03
    assert abs(bilateral / 3000 - 0.3) < 0.03
    assert all("bilateral" in one or "gaussian" in one for one in drawn)
    sizes = {one["gaussian"]["size"] for one in drawn if "gaussian" in one}
    assert sizes == {21, 23, 25, 27, 29}
    sigmas = [one["gaussian"]["sigma"] for one in drawn if "gaussian" in one]
    assert min(sigmas) >= 10.5
    assert max(sigmas) < 14.5 + 1e-4
    spans = {"d": (15, 49), "sigma_color": (100, 299), "sigma_space": (50, 149)}
    for name, (low, high) in spans.items():
        values = [one["bilateral"][name] for one in drawn if "bilateral" in one]
        assert (min(values), max(values)) == (low, high)


def test_presets_are_nvidias() -> None:
    edges = [preset_parameters("edge", name) for name in PRESETS]
    assert [(one["low"], one["high"]) for one in edges] == [(20, 50), (50, 100), (100, 200), (200, 300), (300, 400)]
    blurs = [preset_parameters("vis", name) for name in PRESETS]
    assert [one["downscale"] for one in blurs] == [1, 4, 2, 1, 4]
    assert [one["rescale"] for one in blurs] == [4, 4, 10, 16, 16]
    assert all(one["bilateral"] == {"d": 30, "sigma_color": 150, "sigma_space": 100} for one in blurs)
    assert not any("gaussian" in one for one in blurs)


def test_edges_lie_on_the_border_in_three_channels() -> None:
    edges = make_hint("edge", preset_parameters("edge", "medium"), _picture())
    assert edges.shape == (48, 64, 3)
    assert set(np.unique(edges)) == {0, 255}
    assert (edges[..., 0] == edges[..., 1]).all()
    ys, xs = np.nonzero(edges[..., 0])
    assert (ys.min(), xs.min()) >= (10, 14)
    assert not edges[20:28, 24:40].any()


def test_presets_go_from_many_edges_to_few_and_from_sharp_to_blurred() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    smooth = np.asarray(noise).astype(np.float32)
    for _ in range(3):
        smooth = (smooth + np.roll(smooth, 1, 0) + np.roll(smooth, 1, 1)) / 3
    picture = smooth.astype(np.uint8)
    counts = [int(make_hint("edge", preset_parameters("edge", name), picture).sum()) for name in PRESETS]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1]
    assert [preset_parameters("edge", name)["low"] for name in PRESETS] == [20, 50, 100, 200, 300]
    deviations = [make_hint("vis", preset_parameters("vis", name), picture).std() for name in PRESETS]
    assert deviations[-1] < deviations[0]
    assert [preset_parameters("vis", name)["rescale"] for name in PRESETS] == [4, 4, 10, 16, 16]


@pytest.mark.parametrize("key", ["a", "b", "c", "d"])
def test_vis_keeps_shape_and_colour_and_loses_detail(key: str) -> None:
    picture = _picture()
    blurred = make_hint("vis", training_parameters("vis", key), picture)
    assert blurred.shape == picture.shape
    assert blurred.dtype == np.uint8
    assert blurred.std() < picture.std()
    assert abs(float(blurred.mean()) - float(picture.mean())) < 12


def test_parameters_have_one_text() -> None:
    assert parameters_text({"low": 20, "high": 90}) == parameters_text({"high": 90, "low": 20})
    assert is_blank(np.zeros((2, 4, 4, 3), np.uint8))
    assert not is_blank(np.ones((2, 4, 4, 3), np.uint8))


def test_a_wide_picture_is_fitted_centred_and_reflected() -> None:
    box = content_box(100, 400, 64, 64)
    assert box == (24, 0, 16, 64)
    assert padding_of(box, 64, 64) == (24, 24, 0, 0)
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[24:40] = np.arange(16, dtype=np.uint8)[:, None, None] + 1
    reflect(picture, box)
    assert picture[23, 0, 0] == picture[25, 0, 0]
    assert picture[40, 0, 0] == picture[38, 0, 0]
    mask = latent_mask(padding_of(box, 64, 64), 8, 8, 8)
    assert mask[:3].all()
    assert not mask[3:5].any()
    assert mask[5:].all()
    assert not latent_mask(None, 8, 8, 8).any()
