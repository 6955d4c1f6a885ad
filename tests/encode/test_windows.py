import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from encode.config import WindowsConfig
from encode.windows import TooShort, num_target_frames, plan_windows, target_frames
from manifests.errors import LatentlineError

SOURCES = st.text("0123456789abcdef", min_size=8, max_size=8)


def steady(num_frames: int, fps: float) -> np.ndarray:
    return np.arange(num_frames) / fps


def test_the_same_rate_takes_every_frame_once() -> None:
    np.testing.assert_array_equal(target_frames(steady(93, 16), 16.0), np.arange(93))


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("fps", [8.0, 15.0, 16.0, 23.976, 24.0, 25.0, 29.97, 30.0, 50.0, 60.0])
def test_the_own_rate_keeps_the_count_even_in_milliseconds(fps: float, rounded: bool) -> None:
    times = steady(93, fps).round(3) if rounded else steady(93, fps)
    np.testing.assert_array_equal(target_frames(times, fps), np.arange(93))


def test_half_the_rate_takes_every_second_frame() -> None:
    np.testing.assert_array_equal(target_frames(steady(60, 32), 16.0), np.arange(0, 60, 2))


def test_the_nearest_frame_is_taken_and_the_earlier_of_two() -> None:
    times = np.array([0.0, 0.1, 0.3])
    np.testing.assert_array_equal(target_frames(times, 10.0), [0, 1, 1, 2])


def test_frames_repeat_when_the_source_is_slower() -> None:
    np.testing.assert_array_equal(target_frames(steady(3, 8), 16.0), [0, 0, 1, 1, 2, 2])


def test_the_last_frame_stands_for_half_a_frame_more_and_no_longer() -> None:
    assert num_target_frames(steady(30, 30), 1000.0) == round((29 / 30 + 1 / 60) * 1000) + 1
    assert num_target_frames(np.zeros(1), 16.0) == 1


def test_variable_rates_are_followed() -> None:
    times = np.array([0.0, 0.02, 0.04, 0.5, 1.0, 1.02])
    np.testing.assert_array_equal(target_frames(times, 4.0), [0, 2, 3, 3, 4])


def test_start_and_end_are_seconds_with_the_end_left_out() -> None:
    times = steady(100, 10)
    np.testing.assert_array_equal(target_frames(times, None, 2.0, 3.0), np.arange(20, 30))
    np.testing.assert_array_equal(target_frames(times, 10.0, 2.0, 3.0), np.arange(20, 30))
    np.testing.assert_array_equal(target_frames(times, 5.0, 2.0, 3.0), [20, 22, 24, 26, 28])
    np.testing.assert_array_equal(target_frames(times, None, 9.5, 99.0), np.arange(95, 100))
    assert num_target_frames(times, 10.0, 9.5, 99.0) == 5
    assert num_target_frames(times, 10.0, 50.0) == 0
    assert num_target_frames(times, None, 50.0) == 0


@given(
    num_frames=st.integers(1, 300),
    source_fps=st.floats(1, 120),
    fps=st.floats(1, 120),
    start=st.floats(0, 3),
    length=st.floats(0.01, 20),
)
def test_every_target_frame_is_the_nearest_one(
    num_frames: int, source_fps: float, fps: float, start: float, length: float
) -> None:
    times = steady(num_frames, source_fps)
    chosen = target_frames(times, fps, start, start + length)
    wanted = start + np.arange(len(chosen)) / fps
    assert (np.diff(chosen) >= 0).all()
    if len(chosen):
        off = np.abs(times[chosen] - wanted)
        np.testing.assert_allclose(off, np.abs(times[:, None] - wanted).min(axis=0), atol=2.1e-3)
        assert wanted[-1] < start + length
        half_frame = 0.5 / source_fps if num_frames > 1 else 0.0
        assert wanted[-1] <= times[-1] + half_frame + 1e-5


@given(total=st.integers(93, 2000), count=st.integers(1, 40), source=SOURCES, seed=st.integers(0, 5))
def test_windows_fit_are_distinct_and_ascending(total: int, count: int, source: str, seed: int) -> None:
    for mode in ("head", "uniform", "random", "slide"):
        config = WindowsConfig(mode=mode, count=count, stride=count, seed=seed)
        starts = plan_windows(total, 93, config, source)
        assert starts == sorted(set(starts))
        assert starts[0] >= 0
        assert starts[-1] <= total - 93
        assert starts == plan_windows(total, 93, config, source)
        if mode in ("uniform", "random"):
            assert len(starts) == min(count, total - 93 + 1)
        if mode == "uniform" and count > 1:
            assert (starts[0], starts[-1]) == (0, total - 93)
            steps = np.diff(starts)
            assert len(steps) == 0 or steps.max() - steps.min() <= 1


@given(total=st.integers(150, 2000), count=st.integers(1, 20), source=SOURCES)
def test_more_random_windows_keep_the_ones_drawn(total: int, count: int, source: str) -> None:
    few = plan_windows(total, 93, WindowsConfig(mode="random", count=count), source)
    more = plan_windows(total, 93, WindowsConfig(mode="random", count=count + 3), source)
    assert set(few) <= set(more)


def test_random_windows_depend_on_the_source_and_the_seed_and_stay_the_same_for_ever() -> None:
    def draw(source: str, seed: int) -> list[int]:
        return plan_windows(1000, 93, WindowsConfig(mode="random", count=3, seed=seed), source)

    assert draw("ab", 0) != draw("cd", 0)
    assert draw("ab", 0) != draw("ab", 1)
    assert draw("ab", 0) == GOLDEN


GOLDEN = [518, 700, 727]


def test_slide_steps_by_the_window_unless_told() -> None:
    assert plan_windows(200, 93, WindowsConfig(mode="slide"), "") == [0, 93]
    assert plan_windows(200, 93, WindowsConfig(mode="slide", stride=50), "") == [0, 50, 100]


@pytest.mark.parametrize("mode", ["head", "uniform", "random", "slide"])
def test_an_exact_clip_has_one_window_and_one_short_has_none(mode: str) -> None:
    config = WindowsConfig(mode=mode, count=5)
    assert plan_windows(93, 93, config, "ab") == [0]
    with pytest.raises(TooShort, match="92 frames at 16 fps, a window needs 93") as caught:
        plan_windows(92, 93, config, "ab", fps=16.0)
    assert isinstance(caught.value, LatentlineError)
