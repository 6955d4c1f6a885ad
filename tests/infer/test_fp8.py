"""A base in 8 bits, in inference: nearly the same predictions, under every kind of adapter, and a video of its own."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from infer.config import AdapterConfig, InferConfig
from infer.generate import generate
from infer.inputs import read_requests
from infer.results import fingerprints
from infer.studio import Studio
from infer.team import Layout, in_team, open_store
from manifests.config import ModelConfig
from manifests.errors import UsageError
from tests.infer.conftest import SaveAdapter
from train.cosmos25 import TOKEN_LINEARS
from train.fp8 import Fp8Linear
from train.parallel import join


@pytest.fixture
def model(tiny_checkpoint: Path) -> ModelConfig:
    return ModelConfig(path=str(tiny_checkpoint))


@pytest.fixture
def config(tmp_path: Path) -> InferConfig:
    return InferConfig(output=str(tmp_path / "out"), num_steps=2, num_frames=9, height=32, width=48)


def opened(model: ModelConfig, config: InferConfig) -> Any:
    """The pipeline that makes the videos."""
    requests = [replace(r, negative_prompt="") for r in read_requests("a red circle", config)]
    with join() as ranks, in_team(ranks, Layout(1, 1, 1), open_store(ranks)) as team:
        return Studio.open(model, config, requests, guardrail=False, team=team, accelerate_vae=lambda vae: None).pipe


@torch.no_grad()
def predicted(pipe: Any) -> torch.Tensor:
    """The transformer's output for one fixed input, [1, 16, 2, 4, 4] float32."""
    generator = torch.Generator().manual_seed(0)
    noisy, context = torch.randn(1, 16, 2, 4, 4, generator=generator), torch.randn(1, 8, 64, generator=generator)
    return pipe.transformer(
        hidden_states=noisy,
        condition_mask=torch.zeros(1, 1, 2, 4, 4),
        timestep=torch.full((1, 1, 2, 1, 1), 0.5),
        encoder_hidden_states=context,
        padding_mask=torch.zeros(1, 1, 32, 32),
        return_dict=False,
    )[0].float()


@pytest.mark.parametrize("kind", ["none", "lora", "dora", "fused"])
def test_predictions_are_nearly_those_of_bfloat16(
    model: ModelConfig, config: InferConfig, save_adapter: SaveAdapter, kind: str
) -> None:
    if kind != "none":
        adapter = AdapterConfig(path=str(save_adapter(dora=kind == "dora")))
        config = replace(config, adapters={"a": adapter}, fuse=kind == "fused")
    exact = predicted(opened(model, replace(config, dtype="float32")))
    sixteen = predicted(opened(model, config))
    pipe = opened(model, replace(config, base_linears="fp8"))
    eight = predicted(pipe)
    off, off_by_eight = ((value - exact).norm() / exact.norm() for value in (sixteen, eight))
    assert off < off_by_eight < 0.1
    quantised = [name for name, module in pipe.transformer.named_modules() if isinstance(module, Fp8Linear)]
    assert len(quantised) == len(TOKEN_LINEARS) * len(pipe.transformer.transformer_blocks)


def test_it_is_another_video_and_the_same_as_ever_without(model: ModelConfig, config: InferConfig) -> None:
    requests = [replace(r, negative_prompt="") for r in read_requests("a red circle", config)]
    prints = [
        fingerprints(model, replace(config, base_linears=linears), requests, guardrail=False)
        for linears in ("dtype", "fp8")
    ]
    assert prints[0] != prints[1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_what_cannot_work_is_refused_in_one_line(model: ModelConfig, config: InferConfig) -> None:
    requests = read_requests("a red circle", config)
    for changes, message in (({}, r"infer\.base_linears = fp8 needs .*a CPU"), ({"dtype": "float32"}, "infer.dtype")):
        with pytest.raises(UsageError, match=message) as caught:
            generate(model, replace(config, base_linears="fp8", **changes), requests, guardrail=False)
        assert "\n" not in str(caught.value)
        assert not Path(config.output).exists()
