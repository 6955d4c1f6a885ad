"""Encode, train, infer as one job on the tiny checkpoint: the adapter is live, and others can read every file."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
import webdataset
from diffusers import Cosmos2_5_PredictBasePipeline
from peft import get_peft_model_state_dict
from safetensors import safe_open

from infer.loading import NoGuardrail
from infer.video import read_frames
from manifests.cache import Cache
from manifests.errors import UsageError
from pipeline.encode_stage import encode_stage
from pipeline.recipe import Recipe, load_recipe
from pipeline.stages import infer_stage, train_stage
from tests.pipeline.recipes import make_recipe

PROMPT = "A red circle slides from left to right."


class Run:
    """What one run of the main job left."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.encoded, self.code = encode_stage(recipe)
        self.trained = train_stage(recipe)
        self.adapter = Path(self.trained["adapter"])

    def infer(self, output: Path, **options: Any) -> np.ndarray:
        recipe = replace(self.recipe, infer=replace(self.recipe.infer, output=str(output)))
        result, _ = infer_stage(recipe, PROMPT, guardrail=False, **options)
        return read_frames(result["videos"][0])


@pytest.fixture(scope="module", params=["lora", "dora"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path,
        demo_dataset: Path) -> Run:  # fmt: skip
    recipe = make_recipe(tmp_path_factory.mktemp(request.param), tiny_checkpoint, demo_dataset)
    return Run(replace(recipe, train=replace(recipe.train, method=request.param)))


@pytest.fixture
def diffusers_log() -> Iterator[list[str]]:
    """What diffusers and peft have to say, as they themselves log it."""
    messages: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    handler = Collect(logging.WARNING)
    loggers = [logging.getLogger(name) for name in ("diffusers", "peft")]
    for logger in loggers:
        logger.addHandler(handler)
    yield messages
    for logger in loggers:
        logger.removeHandler(handler)


def stock_pipeline(run: Run) -> Cosmos2_5_PredictBasePipeline:
    return Cosmos2_5_PredictBasePipeline.from_pretrained(run.recipe.model.path, safety_checker=NoGuardrail())


def test_the_job_ends_well_and_says_what_it_did(run: Run) -> None:
    assert run.code == 0
    assert run.encoded["encoded"]["latents"] == run.encoded["samples"] == 8
    assert run.trained["steps"] == 4
    assert run.trained["snapshot"] == run.encoded["snapshot"]
    assert np.isfinite(run.trained["loss"])


def test_training_moved_lora_b_away_from_zero(run: Run) -> None:
    state = safetensors.torch.load_file(run.adapter)
    moved = {key: float(tensor.abs().max()) for key, tensor in state.items() if "lora_B" in key}
    assert moved
    assert all(value > 0 for value in moved.values())
    assert any("magnitude" in key for key in state) is (run.recipe.train.method == "dora")


def test_stock_diffusers_loads_every_key(run: Run, diffusers_log: list[str], recwarn: pytest.WarningsRecorder) -> None:
    pipe = stock_pipeline(run)
    diffusers_log.clear()
    recwarn.clear()
    pipe.load_lora_weights(str(run.adapter.parent), adapter_name="ours")
    said = [*diffusers_log, *(str(warning.message) for warning in recwarn)]
    assert not [line for line in said if "key" in line.lower()], said
    loaded = get_peft_model_state_dict(pipe.transformer, adapter_name="ours")
    state = safetensors.torch.load_file(run.adapter)
    assert {f"transformer.{key}" for key in loaded} == set(state)
    for key, tensor in loaded.items():
        torch.testing.assert_close(tensor, state[f"transformer.{key}"], rtol=0, atol=0)
    config = pipe.transformer.peft_config["ours"]
    assert (config.r, config.lora_alpha, config.use_dora) == (4, 8, run.recipe.train.method == "dora")


def test_the_file_records_alpha(run: Run) -> None:
    with safe_open(run.adapter, "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    assert metadata["transformer.lora_alpha"] == 8


def test_stock_diffusers_makes_another_video_with_the_adapter(run: Run) -> None:
    pipe = stock_pipeline(run)
    pipe.set_progress_bar_config(disable=True)

    def video() -> np.ndarray:
        generator = torch.Generator().manual_seed(0)
        return pipe(prompt=PROMPT, height=32, width=48, num_frames=9, num_inference_steps=2, output_type="np",
                    generator=generator).frames[0]  # fmt: skip

    base = video()
    pipe.load_lora_weights(str(run.adapter.parent))
    assert np.abs(video() - base).max() > 0.02


def test_our_video_differs_with_and_without_the_adapter(run: Run, tmp_path: Path) -> None:
    base = run.infer(tmp_path / "base")
    adapted = run.infer(tmp_path / "adapted", adapters=[str(run.adapter)])
    assert base.shape == adapted.shape == (9, 32, 48, 3)
    assert np.abs(base.astype(int) - adapted).max() > 5
    again = run.infer(tmp_path / "again", adapters=[str(run.adapter.parent)])
    np.testing.assert_array_equal(adapted, again)
    recipe = load_recipe(str(tmp_path / "adapted" / "recipe.toml"))
    assert recipe.infer.inputs == PROMPT
    assert [adapter.path for adapter in recipe.infer.adapters.values()] == [str(run.adapter)]


def test_an_adapter_that_matches_nothing_is_an_error_and_leaves_nothing(run: Run, tmp_path: Path) -> None:
    state = safetensors.torch.load_file(run.adapter)
    foreign = {key.replace("transformer_blocks", "other_blocks"): tensor for key, tensor in state.items()}
    safetensors.torch.save_file(foreign, tmp_path / "foreign.safetensors")
    with pytest.raises(UsageError, match=r"foreign\.safetensors: key '.*other_blocks.*' matches nothing in this model"):
        run.infer(tmp_path / "videos", adapters=[str(tmp_path / "foreign.safetensors")])
    assert not (tmp_path / "videos").exists()


def test_the_recipe_lies_beside_the_run_and_describes_it(run: Run) -> None:
    assert load_recipe(str(Path(run.recipe.train.output) / "recipe.toml")) == run.recipe


def test_stock_webdataset_iterates_the_shards(run: Run) -> None:
    cache = Path(run.recipe.encode.cache)
    for kind, name, shape in (("latents", "latents", [16, 3, 4, 6]), ("context", "context", None)):
        urls = sorted(str(path) for path in (cache / "entries" / kind).glob("*.tar"))
        samples = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
        index = Cache(str(cache)).index(kind).to_pylist()
        assert sorted(sample["__key__"] for sample in samples) == sorted(row["key"] for row in index)
        for sample in samples:
            tensor = safetensors.torch.load(sample["safetensors"])[name]
            assert torch.isfinite(tensor).all()
            assert shape is None or list(tensor.shape) == shape
            facts = json.loads(sample["json"])
            assert ("caption" in facts) is (kind == "context")


def test_pyarrow_and_duckdb_read_manifests_and_snapshot(run: Run) -> None:
    cache = run.recipe.encode.cache
    rows = duckdb.sql(f"select status, count(*), sum(size) from '{cache}/entries/latents/*.parquet' group by status")
    ((status, count, size),) = rows.fetchall()
    assert (status, count) == ("ok", 8)
    assert size > 8 * 16 * 3 * 4 * 6 * 4
    table = pq.read_table(next(Path(cache, "snapshots").glob("*.parquet")))
    assert table.num_rows == 8
    joined = duckdb.sql(
        f"select count(*) from '{cache}/snapshots/*.parquet' s join '{cache}/entries/latents/*.parquet' m "
        "on s.latents_key = m.key and s.latents_offset = m.offset and s.latents_checksum = m.checksum"
    )
    assert joined.fetchall() == [(8,)]


def test_ray_writes_the_same_tars_as_a_plain_loop(tmp_path: Path, tiny_checkpoint: Path, demo_dataset: Path) -> None:
    recipe = make_recipe(tmp_path, tiny_checkpoint, demo_dataset)
    snapshots = []
    for executor in ("ray", "local"):
        encode = replace(recipe.encode, cache=str(tmp_path / executor), executor=executor, encoders=2, shard_mb=0.01)
        result, _ = encode_stage(replace(recipe, encode=encode))
        snapshots.append(result["snapshot"])
    assert snapshots[0] == snapshots[1]
    assert len(_tars(tmp_path / "ray")) > 4
    assert _tars(tmp_path / "ray") == _tars(tmp_path / "local")


def _tars(cache: Path) -> dict[str, bytes]:
    """Bytes of each tar by shard id: the attempt in the name is random."""
    return {path.name.partition(".")[0]: path.read_bytes() for path in sorted(cache.glob("entries/*/*.tar"))}


def test_a_snapshot_of_another_model_is_refused_before_a_run_begins(run: Run, tmp_path: Path) -> None:
    from pipeline.demo.checkpoint import build_tiny_checkpoint

    other = replace(run.recipe.model, path=str(build_tiny_checkpoint(tmp_path / "other", seed=3)))
    recipe = replace(run.recipe, model=other, train=replace(run.recipe.train, output=str(tmp_path / "run")))
    for dry_run in (True, False):
        with pytest.raises(UsageError, match=r"made with vae .*run `latentline encode` with this model") as error:
            train_stage(recipe, dry_run=dry_run)
        assert "\n" not in str(error.value)
        assert not (tmp_path / "run").exists()


def test_a_finished_run_is_found_again(run: Run) -> None:
    again = train_stage(run.recipe)
    assert again["resumed_from"] == 4
    assert again["adapter"] == run.trained["adapter"]
