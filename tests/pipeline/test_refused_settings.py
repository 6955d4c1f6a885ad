"""Numbers and paths that no setting means, refused when the recipe is read."""

from __future__ import annotations

from pathlib import Path

import pytest

from manifests.errors import UsageError
from pipeline.cli import _task
from pipeline.launch import count_gpus
from pipeline.recipe import load_recipe, resolved, to_toml, write_resolved


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


def test_a_recipe_that_a_person_wrote_is_not_written_over(tmp_path: Path) -> None:
    recipe = load_recipe("demo")
    whole = to_toml(resolved(recipe))
    for text in (f"# mine\n{whole}", 'model.path = "a"\n', "a = 1\n", "not a recipe"):
        (tmp_path / "recipe.toml").write_text(text)
        with pytest.raises(UsageError, match=r"recipe\.toml was not made by latentline"):
            write_resolved(recipe, tmp_path)
        assert (tmp_path / "recipe.toml").read_text() == text
    (tmp_path / "recipe.toml").write_text(whole)
    write_resolved(load_recipe("demo", ["train.steps=7"]), tmp_path)
    assert "steps = 7" in (tmp_path / "recipe.toml").read_text()
