"""Every built-in recipe end to end, smaller, from data that lies exactly as its source publishes it."""

from __future__ import annotations

import csv
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from infer.video import read_frames
from pipeline.encode_stage import encode_stage
from pipeline.recipe import builtin_recipes, load_recipe, resolved, validate
from pipeline.stages import infer_stage, train_stage

PROMPT = "A red circle slides from left to right."


def _videos(dataset: Path) -> list[tuple[Path, str]]:
    return [
        (path, (dataset / "metas" / f"{path.stem}.txt").read_text().strip()) for path in sorted(dataset.rglob("*.mp4"))
    ]


def _one_prompt(folder: Path, dataset: Path) -> dict[str, Path]:
    shutil.copytree(dataset / "videos", folder / "videos")
    return {"assets": folder}


def _gr1(folder: Path, dataset: Path) -> dict[str, Path]:
    shutil.copytree(dataset / "videos", folder / "videos")
    lines = [f'{path.name},"{caption}, and ""stops"""' for path, caption in _videos(dataset)]
    (folder / "metadata.csv").write_text("\n".join(["video,prompt", *lines]) + "\n")
    return {"gr1": folder}


def _two_folders(folder: Path, dataset: Path) -> dict[str, Path]:
    for number, (path, caption) in enumerate(_videos(dataset)):
        part = folder / ("accident" if number == 0 else "normal")
        for below in ("videos", "captions"):
            (part / below).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, part / "videos")
        text = {"qwen2p5_7b_caption": {"long": caption, "medium": caption[:20], "short": caption[:9]}}
        (part / "captions" / f"{path.stem}.json").write_text(json.dumps(text))
    return {"normal": folder / "normal", "accident": folder / "accident"}


def _tars_and_folder(folder: Path, dataset: Path) -> dict[str, Path]:
    tars = folder / "egocentric-100k" / "factory001" / "worker001"
    tars.mkdir(parents=True)
    with tarfile.open(tars / "part00.tar", "w") as tar:
        for number, (path, _) in enumerate(_videos(dataset)[:2]):
            tar.add(path, f"factory001_worker001_{number:05d}.mp4")
    shutil.copytree(dataset, folder / "own")
    return {"egocentric": folder / "egocentric-100k", "own": folder / "own"}


def _videoufo(folder: Path, dataset: Path) -> dict[str, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    with (
        tarfile.open(folder / "VideoUFO_1.tar", "w") as tar,
        open(folder / "VideoUFO.csv", "w", newline="") as file,
    ):
        table = csv.writer(file)
        table.writerow(["ID", "Topic", "Brief Caption", "Detailed Caption"])
        for path, caption in _videos(dataset):
            tar.add(path, f"VideoUFO_1/{path.name}")
            table.writerow([path.stem, "shapes", "Shapes.", caption])
        table.writerow(["not-there", "shapes", "Its tar was not fetched.", "So it is left out."])
    return {"videoufo": folder}


def _videoufo_with_hints(folder: Path, dataset: Path) -> dict[str, Path]:
    for kind in ("depth", "seg"):
        (folder / kind).mkdir(parents=True)
        for path, _ in _videos(dataset):
            shutil.copy(path, folder / kind / path.name)
    return _videoufo(folder, dataset)


LAYOUTS: dict[str, Callable[[Path, Path], dict[str, Path]]] = {
    "egocentric-adapters": _tars_and_folder,
    "gr1-dora": _gr1,
    "gr1-lora": _gr1,
    "its-full": _two_folders,
    "its-lora": _two_folders,
    "its-lora-aggressive": _two_folders,
    "its-lora-conservative": _two_folders,
    "nemo-assets-lora": _one_prompt,
    "videoufo-depth": _videoufo_with_hints,
    "videoufo-edge": _videoufo,
    "videoufo-lora": _videoufo,
    "videoufo-seg": _videoufo_with_hints,
    "videoufo-vis": _videoufo,
}
SIZE = {"height": 32, "width": 48, "num_frames": 9}


def test_every_builtin_recipe_is_here() -> None:
    assert set(LAYOUTS) == set(builtin_recipes()) - {"demo"}


def _smaller(name: str, folder: Path, checkpoint: Path, dataset: Path) -> dict[str, Any]:
    values = resolved(load_recipe(name))
    for key, path in LAYOUTS[name](folder / "data", dataset).items():
        values["data"]["datasets"][key]["path"] = str(path)
    for part in values["data"]["datasets"].values():
        part["filters"]["min_frames"] = part["filters"]["min_frames"] and 17
    values["model"] = {"path": str(checkpoint), "family": values["model"]["family"]}
    values["encode"] |= SIZE | {"cache": str(folder / "cache"), "dtype": "float32", "executor": "local"}
    values["train"] |= {
        "output": str(folder / "run"), "steps": 2, "batch_size": 3, "dtype": "float32", "activation": "none",
        "parallel": "auto", "context_parallel": 1,
    }  # fmt: skip
    values["train"]["lora"]["rank"] = 4
    values["train"]["track"]["tensorboard"] = False
    values["infer"] |= SIZE | {"output": str(folder / "out"), "num_steps": 2, "dtype": "float32"}
    for adapter in values["infer"]["adapters"].values():
        adapter["path"] = str(folder / "run" / "adapter")
    return values


@pytest.mark.parametrize("name", sorted(set(LAYOUTS) - {"its-lora-aggressive", "its-lora-conservative"}))
def test_from_its_own_layout_to_a_video(
    name: str, tmp_path: Path, tiny_checkpoint: Path, tiny_transfer: Path, demo_dataset: Path
) -> None:
    hint = {"edge", "vis", "depth", "seg"} & {name.removeprefix("videoufo-")}
    recipe = validate(_smaller(name, tmp_path, tiny_transfer if hint else tiny_checkpoint, demo_dataset), name)
    encoded, code = encode_stage(recipe)
    assert code == 0
    assert encoded["samples"] >= 4
    train_stage(recipe)
    inputs = PROMPT
    if hint:
        video = str(_videos(demo_dataset)[0][0])
        control = {kind: {"control_path": video} if kind in ("depth", "seg") else {} for kind in hint}
        inputs = str(tmp_path / "inputs.json")
        Path(inputs).write_text(
            json.dumps({"name": "a", "prompt": PROMPT, "video_path": video, "max_frames": 9} | control)
        )
    made, code = infer_stage(recipe, inputs, guardrail=False)
    assert code == 0
    assert read_frames(made["videos"][0]).shape == (9, 32, 48, 3)
