"""Public layouts encoded on the tiny checkpoint: in place, a context a caption, images as videos of one frame."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from encode.config import DataConfig, DatasetConfig, EncodeConfig
from encode.job import EncodePlan, EncodeResult, finish_encode, plan_encode, run_encode
from manifests.cache import Cache
from manifests.config import ModelConfig
from manifests.explain import explain
from manifests.shards import read_tensors
from manifests.verify import verify
from tests.encode.layouts import write_files, write_tar
from tests.encode.video_files import numbered_picture, write_video

NO_ENTRIES = {"latents": 0, "context": 0}


class Jobs:
    """Encodes datasets into one cache."""

    def __init__(self, root: Path, checkpoint: Path) -> None:
        self.root = root
        self.model = ModelConfig(path=str(checkpoint))
        self.config = EncodeConfig(
            cache=str(root / "cache"),
            height=32,
            width=48,
            num_frames=5,
            fps=10.0,
            dtype="float32",
            decode_workers=1,
            executor="local",
        )

    def plan(self, datasets: dict[str, DatasetConfig], config: EncodeConfig) -> EncodePlan:
        return plan_encode(self.model, DataConfig(datasets=datasets), config, {"test": 1}, create=True)

    def encode(self, changes: dict[str, Any] | None = None, **datasets: DatasetConfig) -> EncodeResult:
        config = replace(self.config, **(changes or {}))
        planned = self.plan(datasets, config)
        return finish_encode(config, planned, run_encode(self.model, config, planned))

    def latents(self, result: EncodeResult) -> dict[str, torch.Tensor]:
        store = Cache(self.config.cache).store
        samples = map(result.snapshot.sample, range(result.snapshot.num_samples))
        return {sample.source: read_tensors(store, sample.latents)["latents"] for sample in samples}


@pytest.fixture
def jobs(tmp_path: Path, tiny_checkpoint: Path) -> Jobs:
    return Jobs(tmp_path, tiny_checkpoint)


def layout(name: str, path: Path, **settings: Any) -> DatasetConfig:
    return DatasetConfig(layout=name, path=str(path), **settings)


def test_a_video_costs_nothing_again_when_it_moves_into_a_tar(jobs: Jobs) -> None:
    for number, name in enumerate("ab"):
        (jobs.root / "plain" / "videos").mkdir(parents=True, exist_ok=True)
        write_video(jobs.root / "plain" / "videos" / f"{name}.mp4", 8 + number, fps=10)
    write_files(jobs.root / "plain", {"metas/a.txt": "a circle", "metas/b.txt": "a square"})
    first = jobs.encode(d=layout("folder", jobs.root / "plain"))
    members = {path.name: path.read_bytes() for path in sorted((jobs.root / "plain").rglob("*.*"))}
    tar = write_tar(jobs.root / "tars" / "x.tar", members)
    again = jobs.encode(d=layout("webdataset", jobs.root / "tars"))
    assert again.encoded == NO_ENTRIES
    assert again.snapshot.hash == first.snapshot.hash
    fresh = Jobs(jobs.root / "fresh", Path(jobs.model.path))
    in_place = fresh.encode(d=layout("webdataset", jobs.root / "tars"))
    assert in_place.snapshot.hash == first.snapshot.hash
    for one, two in zip(jobs.latents(first).values(), fresh.latents(in_place).values(), strict=True):
        assert torch.equal(one, two)
    assert all(source.startswith(f"{tar}::") for source in fresh.latents(in_place))
    assert sorted(path.name for path in tar.parent.iterdir()) == ["x.tar"]


def test_a_broken_member_is_quarantined_by_its_name(jobs: Jobs) -> None:
    write_video(jobs.root / "a.mp4", 8, fps=10)
    good = (jobs.root / "a.mp4").read_bytes()
    members = {"a.mp4": good, "b.mp4": b"no video", "c.mp4": good[: len(good) // 2]}
    write_tar(jobs.root / "x.tar", members)
    found = jobs.encode({"max_failed": 0.7}, d=layout("webdataset", jobs.root / "x.tar", prompt="p"))
    assert found.counts.samples == 1
    assert {video.split("::")[1].split("@")[0] for video, _, _ in found.quarantined} == {"b.mp4", "c.mp4"}


def test_each_caption_of_a_video_is_an_entry_of_its_own(jobs: Jobs) -> None:
    write_video(jobs.root / "a.mp4", 8, fps=10)
    video = (jobs.root / "a.mp4").read_bytes()
    texts = {"long": "a long circle", "medium": "a circle", "short": "circle"}
    root = write_files(jobs.root / "d", {"videos/a.mp4": video, "captions/a.json": json.dumps({"m": texts})})
    result = jobs.encode(d=layout("folder", root))
    # Three captions, the null context, the default negative prompt.
    assert result.encoded == {"latents": 1, "context": 5}
    assert result.counts.samples == 1
    sample = result.snapshot.sample(0)
    assert sample.captions == texts
    store = Cache(jobs.config.cache).store
    contexts = [read_tensors(store, place)["context"] for place in sample.contexts.values()]
    assert not any(torch.equal(contexts[i], contexts[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    assert not verify(Cache(jobs.config.cache)).findings

    fewer = jobs.encode(d=layout("folder", root, captions={"short": 1, "long": 2}))
    assert fewer.encoded == NO_ENTRIES
    assert fewer.snapshot.sample(0).captions == {"long": "a long circle", "short": "circle"}
    other_weights = jobs.encode(d=layout("folder", root, captions={"short": 9, "long": 1}, weight=3))
    assert other_weights.snapshot.hash == fewer.snapshot.hash

    write_files(root, {"captions/a.json": json.dumps({"m": texts | {"medium": "a blue circle"}})})
    planned = jobs.plan({"d": layout("folder", root)}, jobs.config)
    assert planned.missing == {"latents": 0, "context": 1}
    wanted = [row for row in planned.survey.wanted.to_pylist() if row["caption"] in {*texts.values(), "a blue circle"}]
    explained = explain(Cache(jobs.config.cache), wanted, planned.survey.fingerprints)
    assert sorted(one.status for one in explained) == ["cached", "cached", "stale"]


def test_images_become_samples_of_one_latent_frame(jobs: Jobs) -> None:
    for number, name in enumerate(("a.png", "b.jpg")):
        (jobs.root / "d" / "images").mkdir(parents=True, exist_ok=True)
        Image.fromarray(numbered_picture(number, 64, 128)).save(jobs.root / "d" / "images" / name)
    write_files(jobs.root / "d", {"metas/a.txt": "a bar", "metas/b.txt": "two bars"})
    result = jobs.encode({"num_frames": 1}, d=layout("folder", jobs.root / "d", media="images"))
    assert result.counts.samples == 2
    assert result.snapshot.shapes == {(16, 1, 4, 6): 2}


def test_weights_of_rows_are_kept_beside_the_samples(jobs: Jobs) -> None:
    write_video(jobs.root / "a.mp4", 8, fps=10)
    write_video(jobs.root / "b.mp4", 9, fps=10)
    write_files(jobs.root, {"t.csv": "video,caption,weight\na.mp4,x,2\nb.mp4,y,\n"})
    first = jobs.encode(d=layout("table", jobs.root / "t.csv"))
    weights = dict(
        zip(first.snapshot.column("caption").to_pylist(), first.snapshot.column("weight").to_pylist(), strict=True)
    )
    assert weights == {"x": 2.0, "y": None}
    write_files(jobs.root, {"t.csv": "video,caption,weight\na.mp4,x,3\nb.mp4,y,\n"})
    second = jobs.encode(d=layout("table", jobs.root / "t.csv"))
    assert second.encoded == NO_ENTRIES
    assert second.snapshot.hash != first.snapshot.hash
