"""Adapters of sigma ranges: the outputs are those of weights changed by hand, and nothing of a switch stays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import Cosmos2_5_PredictBasePipeline
from torch import Tensor

from infer import cosmos25
from infer.adapters import load_adapters
from infer.config import AdapterConfig
from infer.denoise import denoise
from infer.loading import NoGuardrail
from infer.ranges import switched_by_sigma
from manifests.errors import LatentlineError, UsageError
from tests.infer.conftest import SaveAdapter
from tests.infer.test_adapters import apply_by_hand, velocity

STEPS = 4  # sigmas .995, .970, .7, .0099


def sample(pipe: Cosmos2_5_PredictBasePipeline, on_sigma: Callable[[float], None] | None) -> Tensor:
    return denoise(
        pipe,
        [cosmos25.encode_prompt(pipe, "a red circle")],
        condition_BCTHW=None,
        height=32,
        width=48,
        num_frames=5,
        num_steps=STEPS,
        guidance=1.0,
        generator=torch.Generator("cpu").manual_seed(0),
        conditioning_timestep=0.0001,
        on_step=lambda: None,
        on_sigma=on_sigma,
    )


@pytest.fixture
def by_hand(tiny_checkpoint: Path) -> Callable[[], Cosmos2_5_PredictBasePipeline]:
    def load() -> Cosmos2_5_PredictBasePipeline:
        return Cosmos2_5_PredictBasePipeline.from_pretrained(tiny_checkpoint, safety_checker=NoGuardrail())

    return load


def test_adapters_work_in_their_ranges_and_add_up_where_these_overlap(
    pipe: Cosmos2_5_PredictBasePipeline,
    by_hand: Callable[[], Cosmos2_5_PredictBasePipeline],
    save_adapter: SaveAdapter,
) -> None:
    one, two = save_adapter("one", alpha=8.0), save_adapter("two", rank=2, alpha=1.0, seed=1)
    adapters = {
        "early": AdapterConfig(path=str(one), weight=0.5, sigma_min=0.5),
        "middle": AdapterConfig(path=str(two), weight=2.0, sigma_min=0.1, sigma_max=0.99),
    }
    plain = by_hand()
    base = {name: tensor.clone() for name, tensor in plain.transformer.state_dict().items()}
    seen: list[tuple[bool, bool]] = []

    def change_weights(sigma: float) -> None:
        plain.transformer.load_state_dict(base, strict=False)  # the loop has the projection aside
        on = (sigma >= 0.5, 0.1 <= sigma < 0.99)
        seen.append(on)
        if on[0]:
            apply_by_hand(plain, one, 0.5 * 8.0 / 4)
        if on[1]:
            apply_by_hand(plain, two, 2.0 * 1.0 / 2)

    expected = sample(plain, change_weights)
    assert {(True, False), (True, True), (False, False)} <= set(seen)
    untouched = sample(pipe, None)
    load_adapters(pipe, adapters)
    always = velocity(pipe)
    with switched_by_sigma(pipe, adapters) as switch:
        torch.testing.assert_close(sample(pipe, switch), expected, rtol=1e-4, atol=1e-4)
    assert (expected - untouched).abs().max() > 1e-2
    torch.testing.assert_close(velocity(pipe), always, rtol=0, atol=0)  # all on again, at their weights


def test_a_dora_that_is_off_leaves_the_base_model(
    pipe: Cosmos2_5_PredictBasePipeline, save_adapter: SaveAdapter
) -> None:
    base = velocity(pipe)
    adapters = {"late": AdapterConfig(path=str(save_adapter(dora=True)), sigma_max=0.5)}
    load_adapters(pipe, adapters)
    on = velocity(pipe)
    with switched_by_sigma(pipe, adapters) as switch:
        assert switch is not None
        switch(0.9)
        torch.testing.assert_close(velocity(pipe), base, rtol=0, atol=1e-6)
        switch(0.1)
        torch.testing.assert_close(velocity(pipe), on, rtol=0, atol=0)
    assert (on - base).abs().max() > 1e-2


def test_without_ranges_nothing_is_switched(pipe: Cosmos2_5_PredictBasePipeline, save_adapter: SaveAdapter) -> None:
    with switched_by_sigma(pipe, {"a": AdapterConfig(path=str(save_adapter()))}) as switch:
        assert switch is None


def test_a_range_without_a_step_is_an_error(pipe: Cosmos2_5_PredictBasePipeline, save_adapter: SaveAdapter) -> None:
    adapters = {"never": AdapterConfig(path=str(save_adapter()), sigma_max=0.001)}
    load_adapters(pipe, adapters)
    with (
        pytest.raises(LatentlineError, match=r"infer\.adapters\.never: no step lies in its range; the 4 steps have"),
        switched_by_sigma(pipe, adapters) as switch,
    ):
        sample(pipe, switch)


@pytest.mark.parametrize(
    ("ends", "fuse", "message"),
    [
        ({"sigma_min": 0.5, "sigma_max": 0.5}, False, "sigma_min = 0.5 is not below sigma_max = 0.5"),
        ({"sigma_min": 0.5}, True, r"infer\.adapters\.a: a fused adapter works at every sigma"),
    ],
)
def test_ranges_that_cannot_be_are_refused(
    pipe: Cosmos2_5_PredictBasePipeline, save_adapter: SaveAdapter, ends: dict[str, float], fuse: bool, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        load_adapters(pipe, {"a": AdapterConfig(path=str(save_adapter()), **ends)}, fuse=fuse)  # type: ignore[arg-type]
