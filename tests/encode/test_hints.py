"""Hints from videos to the cache, and the caches of jobs that ask for none."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from encode import cosmos_transfer25_models
from encode.config import DataConfig, DatasetConfig, EncodeConfig, HintsConfig, WindowsConfig
from encode.decode import DecodeJob, decode_window
from encode.job import EncodeResult, finish_encode, plan_encode, run_encode
from encode.window_jobs import by_window, decode_job
from infer.video import write_mp4
from manifests.cache import Cache
from manifests.config import ModelConfig
from manifests.errors import LatentlineError, UsageError
from manifests.gc import find_garbage, remove
from manifests.hints import make_hint
from manifests.padding import content_box
from manifests.repair import repair
from manifests.schema import OPTIONAL, SNAPSHOT
from manifests.shards import read_tensors
from manifests.snapshot import load_snapshot
from manifests.verify import verify

KINDS = ("depth", "edge", "seg", "vis")


@pytest.fixture
def dataset(tmp_path: Path, demo_dataset: Path) -> Path:
    """Two videos of 64 x 96 with captions, depth at another size and rate, and seg."""
    folder = tmp_path / "data"
    (folder / "videos").mkdir(parents=True)
    (folder / "metas").mkdir()
    rng = np.random.default_rng(0)
    for video in sorted((demo_dataset / "videos").glob("*.mp4"))[:2]:
        shutil.copy(video, folder / "videos")
        shutil.copy(demo_dataset / "metas" / f"{video.stem}.txt", folder / "metas")
        depth = np.repeat(rng.integers(0, 256, (1, 32, 48, 1), dtype=np.uint8), 3, 3).repeat(9, 0)
        for kind, frames, fps in (("depth", depth, 8.0), ("seg", np.full((17, 64, 96, 3), 90, np.uint8), 16.0)):
            (folder / kind).mkdir(exist_ok=True)
            write_mp4(folder / kind / f"{video.stem}.mp4", frames, fps)
    return folder


def _config(tmp_path: Path, *kinds: str, **settings: object) -> EncodeConfig:
    return EncodeConfig(
        cache=str(tmp_path / "cache"), height=32, width=48, num_frames=9, fps=16.0, dtype="float32", executor="local",
        decode_workers=1, hints=HintsConfig(kinds=kinds, variants=3), **settings,
    )  # fmt: skip


def _encode(config: EncodeConfig, checkpoint: Path, dataset: Path, family: str = "cosmos-transfer2.5") -> EncodeResult:
    model = ModelConfig(path=str(checkpoint), family=family)
    data = DataConfig(datasets={"d": DatasetConfig(layout="folder", path=str(dataset))})
    planned = plan_encode(model, data, config, {}, create=True)
    return finish_encode(config, planned, run_encode(model, config, planned))


def test_hints_are_entries_with_recorded_parameters(tmp_path: Path, tiny_transfer: Path, dataset: Path) -> None:
    config = _config(tmp_path, *KINDS)
    result = _encode(config, tiny_transfer, dataset)
    assert result.encoded["hint"] == 2 * (3 + 3 + 1) + 1, "the two seg videos are equal: one entry"
    assert result.snapshot.hint_kinds == dict.fromkeys(KINDS, 2)
    cache = Cache(config.cache)
    assert not verify(cache).damaged
    rows = {row["key"]: row for row in cache.rows("hint").to_pylist()}
    encoder = cosmos_transfer25_models.HintEncoder(ModelConfig(path=str(tiny_transfer)), config, torch.device("cpu"))
    sample = result.snapshot.sample(0)
    names = result.snapshot.column("hint_names")[0].as_py()
    assert names == ["depth/0", "edge/0", "edge/1", "edge/2", "seg/0", "vis/0", "vis/1", "vis/2"]
    for name, key in zip(names, result.snapshot.column("hint_keys")[0].as_py(), strict=True):
        row = rows[key]
        stored = read_tensors(cache.store, sample.hints[name])["hint"]
        if name.startswith(("edge", "vis")):
            window = DecodeJob(path=row["source"], first=0, num_frames=9, fps=16.0, height=32, width=48)
            frames = [make_hint(row["hint"], json.loads(row["parameters"]), one) for one in decode_window(window)]
            torch.testing.assert_close(stored, encoder.encode(np.stack(frames)), rtol=0, atol=0)
        else:
            assert Path(row["source"]).parent.name == row["hint"]
            torch.testing.assert_close(stored, encoder.encode(decode_window(decode_job([row], "stretch"))))
    assert len({rows[key]["parameters"] for key in rows if rows[key]["hint"] == "edge"}) == 6
    again = _encode(config, tiny_transfer, dataset)
    assert again.encoded == {"latents": 0, "context": 0, "hint": 0}
    assert again.snapshot.hash == result.snapshot.hash
    more = _encode(replace(config, hints=HintsConfig(kinds=("edge",), variants=4)), tiny_transfer, dataset)
    assert more.encoded["hint"] == 2, "variants that are there stay"
    assert more.snapshot.hash != result.snapshot.hash


def test_a_window_is_decoded_once_for_several_hints(demo_dataset: Path) -> None:
    [video, other, *_] = sorted((demo_dataset / "videos").glob("*.mp4"))
    window = {"clip_start": None, "clip_end": None, "start": 2, "num_frames": 5, "fps": 16.0, "height": 32, "width": 48}
    edge = {"hint": "edge", "parameters": '{"low":60,"high":160}'}
    vis = {"hint": "vis", "parameters": '{"downscale":1,"rescale":8}'}
    row = {"source": str(video), **window}
    rows = [row | edge, row | vis, row | {"start": 3} | vis, row | {"source": str(other)} | vis]
    assert list(by_window(rows)) == [rows[:2], rows[2:3], rows[3:]]
    assert [len(group) for group in by_window([row | edge] * 9)] == [4, 4, 1], "memory has a limit"
    for alone in ({"hint": "depth", "parameters": "{}"}, {}):
        assert [len(group) for group in by_window([row | alone] * 3)] == [1, 1, 1]
    frames = decode_window(decode_job([row], "stretch"))
    together = decode_window(decode_job(rows[:2], "stretch"))
    assert together.shape == (10, 32, 48, 3)
    for made, one in zip(np.split(together, 2), (edge, vis), strict=True):
        expected = [make_hint(one["hint"], json.loads(one["parameters"]), frame) for frame in frames]  # type: ignore[arg-type]
        assert (made == np.stack(expected)).all()


def test_a_job_without_hints_writes_what_it_always_wrote(tmp_path: Path, tiny_transfer: Path, dataset: Path) -> None:
    result = _encode(_config(tmp_path), tiny_transfer, dataset)
    assert result.encoded.keys() == {"latents", "context"}
    files = sorted((tmp_path / "cache").rglob("*.parquet"))
    assert len(files) >= 4
    for file in files:
        assert not OPTIONAL & set(pq.read_schema(file).names), file
    assert set(pq.read_schema(next((tmp_path / "cache" / "snapshots").glob("*.parquet"))).names) == (
        set(SNAPSHOT.names) - OPTIONAL
    )
    assert result.snapshot.sample(0).hints == {}


def test_a_black_hint_is_the_mean_latent(tmp_path: Path, tiny_transfer: Path, dataset: Path) -> None:
    for video in (dataset / "depth").glob("*.mp4"):
        write_mp4(video, np.zeros((17, 64, 96, 3), np.uint8), 16.0)
    config = _config(tmp_path, "depth")
    result = _encode(config, tiny_transfer, dataset)
    stored = read_tensors(Cache(config.cache).store, result.snapshot.sample(0).hints["depth/0"])["hint"]
    mean = torch.tensor(json.loads((tiny_transfer / "vae" / "config.json").read_text())["latents_mean"])
    torch.testing.assert_close(stored, mean.view(-1, 1, 1, 1).expand_as(stored), rtol=0, atol=0)


def test_padding_keeps_the_aspect_and_hints_lie_where_their_video_does(
    tmp_path: Path, tiny_transfer: Path, dataset: Path
) -> None:
    config = replace(_config(tmp_path, "depth", resize="pad"), height=64, width=64)
    result = _encode(config, tiny_transfer, dataset)
    box = content_box(64, 96, 64, 64)
    assert result.snapshot.sample(0).padding == (box[0], 64 - box[0] - box[2], 0, 0)
    assert result.snapshot.fingerprints["latents"]["pixels"].startswith("fit-bicubic-reflect")
    [row, *_] = Cache(config.cache).rows("hint").to_pylist()
    assert json.loads(row["parameters"]) == {"box": list(box)}
    frames = decode_window(decode_job([row], "pad"))
    inner = frames[:, box[0] : box[0] + box[2]]
    assert (frames[:, box[0] - 1] == inner[:, 1]).all()
    plain = DecodeJob(path=row["source"], first=0, num_frames=9, fps=16.0, height=box[2], width=box[3])
    assert (inner == decode_window(plain)).all()
    latents = Cache(config.cache).rows("latents").to_pylist()[0]
    assert decode_window(decode_job([latents], "pad")).shape == (9, 64, 64, 3)


@pytest.mark.parametrize(("kind", "mixes"), [("seg", False), ("depth", True)])
def test_segments_are_resized_without_mixing_their_colours(tmp_path: Path, kind: str, mixes: bool) -> None:
    frames = np.zeros((5, 64, 96, 3), np.uint8)
    frames[:, :, 33:] = (200, 40, 90)
    write_mp4(tmp_path / "given.mp4", frames, 16.0)
    window = {"start": 0, "num_frames": 5, "fps": None, "clip_start": None, "clip_end": None}
    row = {"source": str(tmp_path / "given.mp4"), "hint": kind, "parameters": "{}", **window}
    whole, small = (
        decode_window(decode_job([row | {"height": height, "width": width}], "pad"))
        for height, width in ((64, 96), (48, 80))
    )
    colours, found = ({tuple(colour) for colour in part.reshape(-1, 3)} for part in (whole, small))
    assert (found <= colours) is not mixes


def test_a_short_hint_quarantines_its_windows_and_names_the_file(
    tmp_path: Path, tiny_transfer: Path, dataset: Path
) -> None:
    short = sorted((dataset / "seg").glob("*.mp4"))[0]
    write_mp4(short, np.full((5, 64, 96, 3), 90, np.uint8), 16.0)
    config = _config(tmp_path, "seg", max_failed=0.6)
    result = _encode(config, tiny_transfer, dataset)
    assert result.snapshot.num_samples == 1
    [error] = result.quarantined.values()
    assert error == f"the seg video {short} is too short: 5 frames, the window ends with frame 9"
    with pytest.raises(LatentlineError, match="1 of 2 videos cannot be used"):
        _encode(replace(config, max_failed=0.1), tiny_transfer, dataset)


def test_another_rate_is_an_error_only_where_frames_are_counted(
    tmp_path: Path, tiny_transfer: Path, dataset: Path
) -> None:
    config = replace(_config(tmp_path, "depth", max_failed=1.0), fps="source")
    with pytest.raises(LatentlineError, match="every one of the 2 samples is quarantined"):
        _encode(config, tiny_transfer, dataset)
    errors = {row["error"] for row in Cache(config.cache).rows("hint").to_pylist()}
    assert all("has 8.000 fps, its video 16.000; set encode.fps" in error for error in errors)


def test_missing_hints_are_one_line_that_names_the_files(tmp_path: Path, tiny_transfer: Path, dataset: Path) -> None:
    gone = sorted((dataset / "depth").glob("*.mp4"))[0]
    gone.unlink()
    with pytest.raises(UsageError) as error:
        _encode(_config(tmp_path, "depth"), tiny_transfer, dataset)
    line = "data.datasets.d: 1 videos without a depth video (`latentline encode --make depth` makes them): "
    assert str(error.value) == f"{line}{gone.stem} (expected {gone})"
    assert not list((tmp_path / "cache").glob("entries/*"))


def test_a_table_names_hints_in_columns(tmp_path: Path, tiny_transfer: Path, dataset: Path) -> None:
    lines = ["video,caption,depth"]
    for video in sorted((dataset / "videos").glob("*.mp4")):
        (dataset / "depth" / f"{video.stem}.mp4").rename(dataset / f"far-{video.stem}.mp4")
        lines.append(f"videos/{video.name},a caption,far-{video.stem}.mp4")
    (dataset / "table.csv").write_text("\n".join(lines) + "\n")
    model = ModelConfig(path=str(tiny_transfer), family="cosmos-transfer2.5")
    data = DataConfig(datasets={"d": DatasetConfig(layout="table", path=str(dataset / "table.csv"))})
    planned = plan_encode(model, data, _config(tmp_path, "depth"), {}, create=False)
    sources = {Path(row["source"]).name for row in planned.survey.wanted.to_pylist() if row["kind"] == "hint"}
    assert sources == {line.rpartition(",")[2] for line in lines[1:]}
    planned = plan_encode(model, data, _config(tmp_path, "edge"), {}, create=False)
    assert {row["hint"] for row in planned.survey.wanted.to_pylist()} == {None, "edge"}, "columns nobody asked for"


def test_predict_takes_no_hints(tmp_path: Path, tiny_checkpoint: Path, dataset: Path) -> None:
    with pytest.raises(UsageError, match=r"encode.hints: Cosmos-Predict2.5 takes none; set model.family"):
        _encode(_config(tmp_path, "edge"), tiny_checkpoint, dataset, "cosmos2.5")
    with pytest.raises(UsageError, match=r'encode.resize = "pad"'):
        _encode(_config(tmp_path, resize="pad"), tiny_checkpoint, dataset, "cosmos2.5")


def test_presets_give_one_variant(tmp_path: Path, tiny_transfer: Path, dataset: Path) -> None:
    config = replace(_config(tmp_path), hints=HintsConfig(kinds=("edge",), variants=3, edge_preset="medium"))
    config = replace(config, windows=WindowsConfig(mode="uniform", count=2))
    result = _encode(config, tiny_transfer, dataset)
    assert {row["parameters"] for row in Cache(config.cache).rows("hint").to_pylist()} == {'{"high":200,"low":100}'}
    assert list(result.snapshot.sample(0).hints) == ["edge/0"]


def test_a_damaged_hint_is_found_made_again_and_the_snapshot_mended(
    tmp_path: Path, tiny_transfer: Path, dataset: Path
) -> None:
    config = _config(tmp_path, "depth", "edge")
    result = _encode(config, tiny_transfer, dataset)
    [tar] = (tmp_path / "cache" / "entries" / "hint").glob("*.tar")
    data = bytearray(tar.read_bytes())
    data[result.snapshot.sample(0).hints["edge/1"].offset + 200] ^= 1
    tar.write_bytes(data)
    found = verify(Cache(config.cache))
    assert {finding.kind for finding in found.damaged if finding.kind} == {"hint"}
    assert any(finding.where.startswith("snapshots/") for finding in found.damaged)
    repair(Cache(config.cache), found.findings)
    again = _encode(config, tiny_transfer, dataset)
    assert again.encoded == {"latents": 0, "context": 0, "hint": 8}
    assert again.snapshot.hash == result.snapshot.hash
    assert not verify(Cache(config.cache)).damaged
    loaded = load_snapshot(Cache(config.cache).store, "train")
    read_tensors(Cache(config.cache).store, loaded.sample(0).hints["edge/1"])
    garbage = find_garbage(Cache(config.cache), older_than=-1)
    assert str(tar.relative_to(tmp_path / "cache")) in {item.path for item in garbage}
    remove(Cache(config.cache), garbage)
    assert not verify(Cache(config.cache)).damaged


def test_hints_of_clips_and_captions_are_shared(tmp_path: Path, tiny_transfer: Path, dataset: Path) -> None:
    """Two captions of one video have one set of hints; another clip has its own."""
    video = sorted((dataset / "videos").glob("*.mp4"))[0]
    rows = ["video,short,long,start", f"videos/{video.name},a,b,", f"videos/{video.name},a,b,0.4"]
    (dataset / "table.csv").write_text("\n".join(rows) + "\n")
    table = DatasetConfig(layout="table", path=str(dataset / "table.csv"), captions={"short": 1, "long": 1})
    model = ModelConfig(path=str(tiny_transfer), family="cosmos-transfer2.5")
    config = _config(tmp_path, "edge")
    planned = plan_encode(model, DataConfig(datasets={"d": table}), config, {}, create=True)
    result = finish_encode(config, planned, run_encode(model, config, planned))
    assert result.encoded == {"latents": 2, "context": 4, "hint": 6}
    assert result.snapshot.num_samples == 2
    assert all(len(result.snapshot.sample(index).hints) == 3 for index in range(2))
    assert all(len(result.snapshot.sample(index).contexts) == 2 for index in range(2))
    half = result.snapshot.part([1])
    assert half.sample(0).hints == result.snapshot.sample(1).hints
