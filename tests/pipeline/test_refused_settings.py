"""Numbers and paths that no setting means, refused when the recipe is read."""

from __future__ import annotations

import pytest

from manifests.errors import UsageError
from pipeline.cli import _task
from pipeline.launch import count_gpus
from pipeline.recipe import load_recipe


@pytest.mark.parametrize(
    "setting",
    [
        "train.optimizer.lr=inf",
        "train.optimizer.betas=[0.9, 1.5]",
        "train.optimizer.betas=[-0.1, 0.9]",
        "train.lora.alpha=inf",
        "train.objective.conditioning_timestep=nan",
        "train.seed=99999999999999999999",
        "encode.windows.seed=-9223372036854775809",
        "infer.seed=9223372036854775808",
        "infer.guidance=inf",
        "train.output=",
        "infer.output=",
        "encode.cache=",
    ],
)
def test_a_value_out_of_range_names_its_key(setting: str) -> None:
    with pytest.raises(UsageError, match=setting.partition("=")[0].replace(".", r"\.")):
        load_recipe("demo", [setting])


@pytest.mark.parametrize("text", ["²", "1²"])
def test_digits_that_are_no_number_are_one_line(text: str) -> None:
    for read, option in ((_task, "--task"), (count_gpus, "--gpus")):
        with pytest.raises(UsageError, match=option):
            read(text)
    with pytest.raises(UsageError, match="--task"):
        _task(f"0/{text}")
