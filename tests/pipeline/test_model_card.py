"""An adapter's folder as a Hugging Face model, and its way to the hub."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

from infer.loading import NoGuardrail
from pipeline.model_card import write_model_folder
from pipeline.recipe import Recipe, load_recipe
from pipeline.stages import train_stage
from tests.command import latentline
from tests.pipeline.hub import fake_hub
from tests.pipeline.places import Place
from train.adapters import read_adapter


@pytest.fixture(scope="module")
def trained(encoded: Place, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    """A recipe and the folder of the finished run it made."""
    run = tmp_path_factory.mktemp("trained") / "my-run"
    recipe = load_recipe(str(encoded.recipe), [f"train.output={run}"])
    train_stage(recipe)
    return recipe, run


def python_block(card: str) -> str:
    return re.search(r"```python\n(.*?)```", card, re.DOTALL).group(1)


def test_the_folder_is_a_whole_model(trained: tuple[Recipe, Path]) -> None:
    recipe, run = trained
    folder = run / "adapter"
    assert {path.name for path in folder.iterdir()} == {
        "pytorch_lora_weights.safetensors", "README.md", "config.json", "recipe.toml", "metrics.jsonl",
    }  # fmt: skip
    assert load_recipe(str(folder / "recipe.toml")) == recipe
    config = json.loads((folder / "config.json").read_text())
    assert (config["base_model"], config["family"], config["method"]) == (recipe.model.path, "cosmos2.5", "lora")
    assert config["snapshot"] == json.loads((run / "dataset.json").read_text())["snapshot"]
    assert (folder / "metrics.jsonl").read_text() == (run / "metrics.jsonl").read_text()


def test_the_card_states_data_training_and_results(trained: tuple[Recipe, Path]) -> None:
    _, run = trained
    card = ModelCard.load(run / "adapter" / "README.md")
    assert card.data.library_name == "diffusers"
    assert {"lora", "cosmos"} <= set(card.data.tags)
    assert card.data.license == "other"
    text = card.content
    for fact in ("shapes (8)", "| videos | 4 |", "32x48, 9 frames at 16 fps: 8 samples", "| rank, alpha | 4, 8 |",
                 "| steps x batch | 4 x 2 |", "| steps done | 4 |", "training loss"):  # fmt: skip
        assert fact in text
    assert json.loads((run / "dataset.json").read_text())["snapshot"] in text


def test_the_cards_three_lines_load_the_adapter(trained: tuple[Recipe, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run as they are; only NVIDIA's guardrail, a package of its own with models of its own, is left out."""
    from diffusers.pipelines.cosmos import pipeline_cosmos2_5_predict

    monkeypatch.setattr(pipeline_cosmos2_5_predict, "CosmosSafetyChecker", NoGuardrail)
    _, run = trained
    lines = python_block((run / "adapter" / "README.md").read_text())
    assert len(lines.splitlines()) == 3
    names: dict[str, Any] = {}
    exec(lines, names)
    held = names["pipe"].transformer.state_dict()
    state, metadata = read_adapter(run / "adapter")
    for name, tensor in state.items():
        module, part, _ = name.rsplit(".", 2)
        assert torch.equal(held[f"{module}.{part}.default_0.weight"], tensor)
    assert names["pipe"].transformer.peft_config["default_0"].lora_alpha == metadata["lora_alpha"] == 8


def test_a_hub_model_is_the_base_of_the_card_and_pictures_are_shown(trained: tuple[Recipe, Path]) -> None:
    from dataclasses import replace

    recipe, run = trained
    for step, colour in ((2, "red"), (4, "blue")):
        folder = run / "samples" / f"step_{step}"
        folder.mkdir(parents=True)
        Image.new("RGB", (8, 8), colour).save(folder / "a.png")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "validation/loss": 0.25}\n')
    model = replace(recipe.model, path="nvidia/Cosmos-Predict2.5-2B", revision="diffusers/base/post-trained")
    folder = write_model_folder(replace(recipe, model=model), run, repo_id="someone/arm")
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model == "nvidia/Cosmos-Predict2.5-2B"
    assert "![a](samples/a.png)" in card.content
    assert Image.open(folder / "samples" / "a.png").getpixel((0, 0)) == (0, 0, 255)
    assert "| validation/loss | 0.25 |" in card.content
    assert "revision='diffusers/base/post-trained'" in python_block(card.content)
    assert "load_lora_weights('someone/arm')" in python_block(card.content)


def test_weights_that_diffusers_cannot_read_are_not_said_to_be_an_adapter(
    trained: tuple[Recipe, Path], tmp_path: Path
) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "trained_weights.safetensors").write_bytes(b"")
    folder = write_model_folder(trained[0], tmp_path)
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "latentline"
    assert "load_lora_weights" not in card.content
    assert "`trained_weights.safetensors`: read by latentline" in card.content


def test_push_uploads_the_whole_folder(encoded: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real calls of huggingface_hub, to an endpoint of this machine."""
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    command = ("train", encoded.recipe, "--push", "someone/name", "--json", "--set", f"train.output={tmp_path}/run")
    with fake_hub() as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        done = latentline(*command)
        assert done.code == 0, done.err
        folder = tmp_path / "run" / "adapter"
        assert hub.files == {path.name: path.read_bytes() for path in folder.iterdir()}
        assert "load_lora_weights('someone/name')" in hub.files["README.md"].decode()
        assert hub.repos[0]["visibility"] == "private"
        assert "Bearer hf_test" in hub.tokens
        assert "someone/name" in done.json["pushed"]
        hub.refuse = True
        refused = latentline(*command)
        assert refused.code == 1
        assert "--push 'someone/name'" in refused.error()


@pytest.mark.parametrize(
    ("token", "repo", "message"),
    [
        ("", "someone/name", "environment variable HF_TOKEN"),
        ("hf_test", "name", "write it as OWNER/NAME"),
        ("hf_test", "a//b", "--push 'a//b'"),
    ],
)
def test_a_push_that_cannot_work_is_said_before_training(
    encoded: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token: str, repo: str,
    message: str,
) -> None:  # fmt: skip
    monkeypatch.setenv("HF_TOKEN", token)
    outcome = latentline("train", encoded.recipe, "--push", repo, "--set", f"train.output={tmp_path}/run")
    assert outcome.code == 2
    assert message in outcome.error()
    assert not (tmp_path / "run").exists()
