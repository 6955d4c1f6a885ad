"""The main job with its cache on an object store, and training from a copy on the local disk."""

import json
import uuid
from pathlib import Path

import pytest

from manifests.cache import Cache
from manifests.errors import LatentlineError
from manifests.snapshot import load_snapshot
from manifests.verify import verify
from pipeline.encode_stage import encode_stage
from pipeline.recipe import Recipe, validate
from pipeline.stages import train_stage
from tests.manifests.s3 import BUCKET, environment, faulty_proxy, in_environment, moto_server
from tests.pipeline.recipes import recipe_values


@pytest.fixture(scope="module")
def remote():
    """(url of the bucket, faults) of an S3 endpoint behind a proxy."""
    with moto_server() as port, faulty_proxy(port) as (proxy_port, faults), in_environment(environment(proxy_port)):
        yield f"s3://{BUCKET}", faults


def recipe_at(folder: Path, checkpoint: Path, dataset: Path, cache: str, **train) -> Recipe:
    values = recipe_values(folder, checkpoint, dataset)
    values["encode"]["cache"] = cache
    values["train"] |= {"output": str(folder / uuid.uuid4().hex), **train}
    return validate(values, "test")


def losses(recipe: Recipe) -> list[float]:
    records = [json.loads(line) for line in (Path(recipe.train.output) / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


def test_encode_and_train_on_s3_are_as_on_a_local_disk(remote, tmp_path, tiny_checkpoint, demo_dataset):
    url, faults = remote
    places = {"s3": f"{url}/job", "local": str(tmp_path / "cache")}
    seen = {}
    for name, place in places.items():
        recipe = recipe_at(tmp_path, tiny_checkpoint, demo_dataset, place)
        result, code = encode_stage(recipe)
        assert code == 0
        train_stage(recipe)
        seen[name] = (result["snapshot"], losses(recipe))
        assert verify(Cache(place)).findings == ()
    assert seen["s3"] == seen["local"]
    assert len(seen["s3"][1]) == 4
    assert encode_stage(recipe_at(tmp_path, tiny_checkpoint, demo_dataset, places["s3"]))[0]["encoded"] == {
        "latents": 0,
        "context": 0,
    }

    local = {"local_cache": str(tmp_path / "copy"), "local_cache_gb": 0.1}
    first = recipe_at(tmp_path, tiny_checkpoint, demo_dataset, places["s3"], **local)
    train_stage(first)
    assert losses(first) == seen["s3"][1]
    faults.refuse = lambda method, path: path.endswith(".tar")
    again = recipe_at(tmp_path, tiny_checkpoint, demo_dataset, places["s3"], **local)
    train_stage(again)
    assert losses(again) == seen["s3"][1]
    faults.refuse = lambda method, path: False


def test_an_encode_through_failing_requests_loses_nothing(remote, tmp_path, tiny_checkpoint, demo_dataset):
    url, faults = remote
    count = iter(range(10**9))
    faults.refuse = lambda method, path: next(count) % 4 == 3
    faults.forget = lambda method, path: method == "PUT" and next(count) % 5 == 4
    recipe = recipe_at(tmp_path, tiny_checkpoint, demo_dataset, f"{url}/faulty")
    result, code = encode_stage(recipe)
    faults.refuse = faults.forget = lambda method, path: False
    assert code == 0
    assert result["samples"] == 8
    cache = Cache(recipe.encode.cache)
    assert verify(cache).damaged == ()
    assert load_snapshot(cache.store, "train").num_samples == 8


def test_a_missing_bucket_is_one_clear_line(tmp_path, tiny_checkpoint, demo_dataset, monkeypatch):
    with moto_server() as port:
        for name, value in environment(port).items():
            monkeypatch.setenv(name, value)
        recipe = recipe_at(tmp_path, tiny_checkpoint, demo_dataset, "s3://no-such-bucket/cache")
        with pytest.raises(LatentlineError, match="no-such-bucket") as caught:
            encode_stage(recipe)
        assert "\n" not in str(caught.value)
