"""Image contexts from files to the cache."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from encode.config import DataConfig, DatasetConfig, EncodeConfig, HintsConfig, WindowsConfig
from encode.job import EncodeResult, finish_encode, plan_encode, run_encode
from manifests.cache import Cache
from manifests.config import ModelConfig
from manifests.errors import LatentlineError, UsageError
from manifests.image_context import IMAGE, read_image_context
from manifests.shards import read_tensors
from manifests.verify import verify


@pytest.fixture
def contexts(tmp_path: Path, demo_dataset: Path) -> Path:
    """A folder with an image context of each video, [4, 24]; the first is a `.safetensors` in bfloat16."""
    folder = tmp_path / "given" / "image_context"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for index, video in enumerate(sorted((demo_dataset / "videos").glob("*.mp4"))):
        values = rng.normal(size=(4, 24)).astype(np.float32)
        if index:
            np.save(folder / f"{video.stem}.npy", values)
        else:
            save_file({"x": torch.from_numpy(values).bfloat16()}, folder / f"{video.stem}.safetensors")
    return folder


def _config(tmp_path: Path, image_context: str = "given") -> EncodeConfig:
    return EncodeConfig(
        cache=str(tmp_path / "cache"), height=32, width=48, num_frames=9, fps=16.0, dtype="float32", executor="local",
        decode_workers=1, windows=WindowsConfig(mode="uniform", count=2),
        hints=HintsConfig(kinds=("edge",), variants=1, image_context=image_context),  # type: ignore[arg-type]
    )  # fmt: skip


def _encode(config: EncodeConfig, checkpoint: Path, dataset: Path, hints: Path) -> EncodeResult:
    model = ModelConfig(path=str(checkpoint), family="cosmos-transfer2.5")
    given = DatasetConfig(layout="folder", path=str(dataset), hints_path=str(hints.parent))
    planned = plan_encode(model, DataConfig(datasets={"d": given}), config, {}, create=True)
    return finish_encode(config, planned, run_encode(model, config, planned))


def test_each_sample_has_its_own_and_a_file_is_stored_once(
    tmp_path: Path, tiny_transfer: Path, demo_dataset: Path, contexts: Path
) -> None:
    config = _config(tmp_path)
    plain = _encode(_config(tmp_path, "zero"), tiny_transfer, demo_dataset, contexts)
    assert IMAGE not in plain.snapshot.hint_kinds
    result = _encode(config, tiny_transfer, demo_dataset, contexts)
    assert result.encoded == {"latents": 0, "context": 0, "hint": 4}, "two windows a video share one"
    assert result.snapshot.hint_kinds == {"edge": 8, IMAGE: 8}
    assert result.snapshot.hash != plain.snapshot.hash
    cache = Cache(config.cache)
    for index in range(8):
        sample = result.snapshot.sample(index)
        [file] = contexts.glob(f"{Path(sample.source).stem}.*")
        stored = read_tensors(cache.store, sample.hints[IMAGE])["hint"]
        torch.testing.assert_close(stored, read_image_context(file), rtol=0, atol=0)
    assert not verify(cache).damaged
    again = _encode(config, tiny_transfer, demo_dataset, contexts)
    assert again.encoded["hint"] == 0
    np.save(file.with_suffix(".npy"), np.ones((4, 24), np.float64))
    changed = _encode(config, tiny_transfer, demo_dataset, contexts)
    assert changed.encoded == {"latents": 0, "context": 0, "hint": 1}
    assert changed.snapshot.hash != result.snapshot.hash


def test_what_is_no_image_context_is_one_line_that_names_the_file(
    tmp_path: Path, tiny_transfer: Path, demo_dataset: Path, contexts: Path
) -> None:
    first, second, third, _ = sorted(contexts.iterdir())
    np.save(second, np.zeros((4, 25), np.float32))
    third.write_bytes(b"no array")
    with pytest.raises(UsageError) as error:
        _encode(_config(tmp_path), tiny_transfer, demo_dataset, contexts)
    line = (
        f"encode.hints.image_context: 2 files that are no image context: {second} (of shape [4, 25], the model takes "
    )
    assert str(error.value).startswith(f"{line}[4, 24]), {third} (unreadable: ")
    assert "\n" not in str(error.value)
    first.unlink()
    with pytest.raises(UsageError) as error:
        _encode(_config(tmp_path), tiny_transfer, demo_dataset, contexts)
    line = f"data.datasets.d: 1 videos without an image context: {first.stem} (expected {first.with_suffix('.npy')})"
    assert str(error.value) == line
    alone = replace(_config(tmp_path), hints=HintsConfig(image_context="given"))
    with pytest.raises(UsageError, match=r"goes with hints; name some in encode\.hints\.kinds"):
        _encode(alone, tiny_transfer, demo_dataset, contexts)


def test_one_that_is_not_finite_quarantines_its_samples(
    tmp_path: Path, tiny_transfer: Path, demo_dataset: Path, contexts: Path
) -> None:
    bad = sorted(contexts.iterdir())[2]
    np.save(bad, np.full((4, 24), np.nan, np.float32))
    with pytest.raises(LatentlineError, match="1 of 4 videos cannot be used"):
        _encode(_config(tmp_path), tiny_transfer, demo_dataset, contexts)
    result = _encode(replace(_config(tmp_path), max_failed=0.5), tiny_transfer, demo_dataset, contexts)
    assert result.snapshot.num_samples == 6
    assert list(result.quarantined.values()) == [f"{bad}: the image context is not finite"]


def test_a_model_without_image_context_says_so(
    tmp_path: Path, tiny_transfer: Path, demo_dataset: Path, contexts: Path
) -> None:
    copy = tmp_path / "model"
    copy.mkdir()
    for part in tiny_transfer.iterdir():
        if part.name != "transformer":
            (copy / part.name).symlink_to(part)
    (copy / "transformer").mkdir()
    for file in (tiny_transfer / "transformer").iterdir():
        (copy / "transformer" / file.name).write_bytes(file.read_bytes())
    config = json.loads((copy / "transformer" / "config.json").read_text())
    (copy / "transformer" / "config.json").write_text(json.dumps(config | {"img_context_dim_in": None}))
    with pytest.raises(UsageError, match="this model takes no image context; leave it out"):
        _encode(_config(tmp_path), copy, demo_dataset, contexts)
