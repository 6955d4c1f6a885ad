"""Recipes: what is left out, what is wrong, and what is overridden, all said with dotted paths."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from infer.config import AdapterConfig
from manifests.errors import UsageError
from pipeline.recipe import builtin_recipes, load_recipe, resolved, to_toml, validate, write_resolved
from train.config import ObjectiveConfig

LEAST = '[model]\npath = "m"\n[encode]\ncache = "c"\n'


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(LEAST)
    return path


def problem(values: dict) -> str:
    with pytest.raises(UsageError) as error:
        validate({"model": {"path": "m"}, "encode": {"cache": "c"}} | values, "r.toml")
    assert error.value.exit_code == 2
    message = str(error.value)
    assert message.startswith("recipe r.toml: ")
    assert "\n" not in message
    return message.removeprefix("recipe r.toml: ")


def test_every_default_survives_being_written_and_read(recipe_file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(str(recipe_file))
    (tmp_path / "again.toml").write_text(to_toml(resolved(recipe)))
    assert load_recipe(str(tmp_path / "again.toml")) == recipe


def test_values_that_are_no_defaults_survive_too(recipe_file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(
        str(recipe_file),
        [
            "encode.fps=source",
            'encode.negative_prompts=["blurry", "dark \\"night\\""]',
            'data.datasets.my-data.layout="table"',
            "data.datasets.my-data.path=clips.csv",
            "train.objective.conditioning={1 = 0.25, 2 = 0.75}",
            "train.optimizer.betas=[0.9, 0.95]",
            "infer.adapters.a.path=x",
            "infer.negative_prompt=",
            "model.revision=abc",
        ],
    )
    assert recipe.train.objective.conditioning == {1: 0.25, 2: 0.75}
    assert recipe.infer.adapters == {"a": AdapterConfig(path="x")}
    write_resolved(recipe, tmp_path / "run")
    assert load_recipe(str(tmp_path / "run" / "recipe.toml")) == recipe
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["recipe.toml"]


@pytest.mark.parametrize("name", builtin_recipes())
def test_built_in_recipes_are_valid_and_begin_with_what_they_are(name: str) -> None:
    recipe = load_recipe(name)
    assert builtin_recipes()[name]
    assert validate(tomllib.loads(to_toml(resolved(recipe))), name) == recipe
    assert recipe.data.datasets


def test_gr1_lora_is_the_published_recipe() -> None:
    recipe = load_recipe("gr1-lora")
    assert (recipe.encode.height, recipe.encode.width, recipe.encode.num_frames) == (432, 768, 93)
    assert (recipe.train.lora.rank, recipe.train.lora.alpha) == (32, 32)
    assert recipe.train.objective == ObjectiveConfig(
        conditioning={1: 0.5, 2: 0.5}, conditioning_timestep=0.0001, text_dropout=0.2
    )


@pytest.mark.parametrize(
    ("section", "key", "near"),
    [
        ("encode", "hight", "encode.height"),
        ("encode", "chache", "encode.cache"),
        ("train", "lerning_rate", None),
        ("train", "rank", "train.lora.rank"),
        ("infer", "steps", "infer.num_steps"),
        ("train", "height", "encode.height"),
        ("model", "revison", "model.revision"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_one(section: str, key: str, near: str | None) -> None:
    base = {"encode": {"cache": "c"}, "model": {"path": "m"}}.get(section, {})
    message = problem({section: {**base, key: 1}})
    hint = f", did you mean {near!r}?" if near else ""
    assert message == f"unknown key '{section}.{key}'{hint}"


def test_unknown_keys_deep_inside_and_unknown_sections_are_named() -> None:
    assert problem({"train": {"lora": {"rnk": 4}}}) == "unknown key 'train.lora.rnk', did you mean 'train.lora.rank'?"
    assert problem({"trian": {}}) == "unknown key 'trian', did you mean 'train'?"
    assert problem({"height": 5}) == "unknown key 'height', did you mean 'encode.height'?"
    message = problem({"data": {"datasets": {"gr1": {"layout": "folder", "path": "p", "promt": "x"}}}})
    assert message == "unknown key 'data.datasets.gr1.promt', did you mean 'data.datasets.gr1.prompt'?"


def test_all_problems_are_said_at_once() -> None:
    message = problem({"train": {"stpes": 3, "seed": "x"}, "infer": {"guidance": -1}})
    assert "unknown key 'train.stpes', did you mean 'train.steps'?" in message
    assert "train.seed = 'x': " in message
    assert "infer.guidance = -1: " in message


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"encode": {"cache": "c", "height": 432.5}}, "encode.height = 432.5: "),
        ({"encode": {"cache": "c", "height": "tall"}}, "encode.height = 'tall': "),
        ({"encode": {"cache": 7}}, "encode.cache = 7: input should be a valid string"),
        ({"encode": {}}, "encode.cache is required"),
        (
            {"encode": {"cache": "c", "executor": "slurm"}},
            "encode.executor = 'slurm': input should be 'ray' or 'local'",
        ),
        ({"encode": {"cache": "c", "max_failed": 1.5}}, "encode.max_failed = 1.5: "),
        ({"encode": {"cache": "c", "fps": "fast"}}, "encode.fps = 'fast': "),
        ({"train": 5}, "train = 5: "),
        ({"train": {"lora": {"rank": 0}}}, "train.lora.rank = 0: input should be greater than or equal to 1"),
        ({"train": {"objective": {"conditioning": {"1": 0.5}}}}, "train.objective.conditioning = "),
        ({"data": {"datasets": {"x": {"path": "p"}}}}, "data.datasets.x.layout is required"),
        ({"infer": {"adapters": {"x": "path"}}}, "infer.adapters.x = 'path': "),
    ],
)
def test_a_wrong_value_is_named_with_its_key(values: dict, message: str) -> None:
    assert problem(values).startswith(message)


def test_a_union_names_what_its_members_want() -> None:
    assert problem({"encode": {"cache": "c", "fps": "fast"}}) == (
        "encode.fps = 'fast': input should be a valid number, unable to parse string as a number or input should be "
        "'source'"
    )


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.steps=8", 8),
        (" train.steps = 8 ", 8),
        ("train.seed=-1", -1),
        ("train.parallel=shard", "shard"),
        ('train.parallel="shard"', "shard"),
        ("train.track.wandb=true", True),
        ("train.optimizer.lr=3e-4", 3e-4),
        ('train.lora.targets=["to_q"]', ("to_q",)),
        ("infer.output=a=b", "a=b"),
        ("infer.inputs=a red circle, sliding", "a red circle, sliding"),
    ],
)
def test_set_takes_toml_and_plain_text(recipe_file: Path, override: str, expected: object) -> None:
    value: object = load_recipe(str(recipe_file), [override])
    for name in override.partition("=")[0].strip().split("."):
        value = getattr(value, name)
    assert value == expected


def test_the_last_set_wins(recipe_file: Path) -> None:
    assert load_recipe(str(recipe_file), ["train.steps=1", "train.steps=2"]).train.steps == 2


@pytest.mark.parametrize("override", ["train.steps", "=8", "train..steps=8", ".steps=8", ""])
def test_a_set_that_is_no_assignment_says_how_to_write_it(recipe_file: Path, override: str) -> None:
    with pytest.raises(UsageError, match=r"--set .*: write it as section\.key=value"):
        load_recipe(str(recipe_file), [override])


def test_a_set_below_a_value_is_refused(recipe_file: Path) -> None:
    with pytest.raises(UsageError, match="'cache' is a value, not a section"):
        load_recipe(str(recipe_file), ["encode.cache.path=x"])


def test_a_set_of_an_unknown_key_is_refused(recipe_file: Path) -> None:
    with pytest.raises(UsageError, match=r"unknown key 'train\.stepps', did you mean 'train\.steps'\?"):
        load_recipe(str(recipe_file), ["train.stepps=3"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[model\npath = 1", r"not valid TOML: .*line 1"),
        (b"[model]\npath = 'm'\n[model]\n", "not valid TOML"),
        (b'model = "\xff"', "cannot read this file: it is not UTF-8 text"),
        (b"", "model is required; encode is required"),
    ],
)
def test_a_file_that_is_no_recipe_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "bad.toml").write_bytes(content)
    with pytest.raises(UsageError, match=rf"^recipe .*bad\.toml: {message}") as error:
        load_recipe(str(tmp_path / "bad.toml"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("demmo", r"did you mean 'demo'\?"),
        ("zzz", "built in: demo, egocentric-adapters, gr1-dora"),
        ("no/such.toml", "no such file"),
    ],
)
def test_an_unknown_recipe_suggests_one(name: str, hint: str) -> None:
    with pytest.raises(UsageError, match=hint):
        load_recipe(name)


def test_an_output_that_is_a_file_is_named(recipe_file: Path) -> None:
    with pytest.raises(UsageError, match=r"recipe\.toml.*cannot be a folder"):
        write_resolved(load_recipe(str(recipe_file)), recipe_file / "run")


def test_a_recipe_cannot_be_changed_in_place(recipe_file: Path) -> None:
    recipe = load_recipe(str(recipe_file))
    with pytest.raises(AttributeError):
        recipe.train.steps = 5  # type: ignore[misc]
    assert replace(recipe, train=replace(recipe.train, steps=5)).train.steps == 5
