import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from infer.config import InferConfig
from infer.inputs import read_requests
from infer.video import write_mp4
from manifests.errors import UsageError
from pipeline.demo.draw import draw_clip
from pipeline.demo.world import scenes

CONFIG = InferConfig(seed=7, guidance=3.0, num_steps=4, num_frames=13, height=32, width=48, negative_prompt="blurry")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """a.png, a.txt, b.jpg, b..txt and clip.mp4."""
    frames = draw_clip(next(scenes(0)), height=32, width=48, num_frames=9).frames
    Image.fromarray(frames[0]).save(tmp_path / "a.png")
    Image.fromarray(frames[-1]).save(tmp_path / "b.jpg")
    (tmp_path / "a.txt").write_text(" A red circle.\n")
    (tmp_path / "b..txt").write_text("Another.")
    write_mp4(tmp_path / "clip.mp4", frames, 16.0)
    return tmp_path


def write_json(path: Path, content: object) -> str:
    path.write_text(json.dumps(content))
    return str(path)


def test_a_prompt_is_one_request_with_the_recipes_values() -> None:
    (request,) = read_requests("A robot arm lifts a cup; 3/4 view.", CONFIG)
    assert request.name == "a_robot_arm_lifts_a_cup_3_4"
    assert request.prompt == "A robot arm lifts a cup; 3/4 view."
    assert (request.image, request.video, request.num_latent_conditional_frames) == (None, None, 0)
    assert (request.seed, request.guidance, request.num_steps) == (7, 3.0, 4)
    assert (request.num_frames, request.height, request.width) == (13, 32, 48)
    assert request.negative_prompt == "blurry"


@pytest.mark.parametrize("prompt", ["long " * 2000, "two\nlines", "red", "机械臂"])
def test_any_text_is_a_prompt(prompt: str) -> None:
    (request,) = read_requests(prompt, CONFIG)
    assert request.prompt == prompt.strip()
    assert 0 < len(request.name) <= 64


@pytest.mark.parametrize("path", ["data/prompts", "prompts.json", "./x", "clip.mp4", "/nowhere/at/all"])
def test_what_looks_like_a_path_must_exist(path: str) -> None:
    with pytest.raises(UsageError, match="no such file or folder"):
        read_requests(path, CONFIG)


def test_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="empty"):
        read_requests("  ", CONFIG)


def test_a_folder_pairs_images_with_captions(folder: Path) -> None:
    a, b = read_requests(str(folder), CONFIG)
    assert (a.name, a.prompt, a.image) == ("a", "A red circle.", folder / "a.png")
    assert (b.name, b.prompt, b.image) == ("b", "Another.", folder / "b.jpg")
    assert a.num_latent_conditional_frames == b.num_latent_conditional_frames == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "a.txt").unlink(), r"a\.png: no caption; add a\.txt"),
        (lambda f: (f / "b.jpg").unlink(), r"b\.\.txt: no image; add b\.png or b\.jpg"),
        (lambda f: (f / "a.txt").write_text(" \n"), r"a\.txt: the caption is empty"),
        (lambda f: (f / "a.txt").write_bytes(b"\xff\xfe\x00"), r"a\.txt: cannot read this file: not UTF-8"),
        (lambda f: (f / "a.jpg").write_bytes(b""), r"a\.png: a\.jpg has the same stem"),
        (lambda f: [p.unlink() for p in f.iterdir()], "no inputs; expected"),
    ],
)
def test_a_broken_folder_names_the_file(folder: Path, change: object, message: str) -> None:
    change(folder)  # type: ignore[operator]
    with pytest.raises(UsageError, match=message):
        read_requests(str(folder), CONFIG)


def test_json_gives_every_kind_with_its_own_values(folder: Path) -> None:
    path = write_json(
        folder / "inputs.json",
        [
            {"name": "t", "inference_type": "text2world", "prompt": "text", "seed": 1, "resolution": "64,96"},
            {"name": "i", "inference_type": "image2world", "prompt_path": "a.txt", "input_path": "a.png"},
            {"name": "v", "inference_type": "video2world", "prompt": "p", "input_path": "clip.mp4"},
            {
                "name": "v1",
                "prompt": "p",
                "input_path": str(folder / "clip.mp4"),
                "num_latent_conditional_frames": 1,
                "num_output_frames": 5,
                "num_steps": 2,
                "guidance": 0,
                "negative_prompt": "",
                "resolution": "none",
            },
        ],
    )
    text, image, video, own = read_requests(path, CONFIG)
    assert (text.seed, text.height, text.width, text.num_latent_conditional_frames) == (1, 64, 96, 0)
    assert (image.prompt, image.image, image.num_latent_conditional_frames) == (
        "A red circle.",
        folder / "a.png",
        1,
    )
    assert (video.image, video.video, video.num_latent_conditional_frames) == (None, folder / "clip.mp4", 2)
    assert (own.num_latent_conditional_frames, own.num_frames, own.num_steps, own.guidance) == (1, 5, 2, 0)
    assert (own.negative_prompt, own.height, own.seed) == ("", 32, 7)


def test_one_object_and_jsonl(folder: Path) -> None:
    (one,) = read_requests(write_json(folder / "one.json", {"name": "x", "prompt": "p"}), CONFIG)
    assert one.name == "x"
    (folder / "many.jsonl").write_text('{"name": "x", "prompt": "p"}\n\n{"name": "y", "prompt": "q"}\n')
    assert [r.name for r in read_requests(str(folder / "many.jsonl"), CONFIG)] == ["x", "y"]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"promt": "p"}, "unknown key 'promt'; did you mean prompt?"),
        ({"fps_out_of_nowhere": 1, "prompt": "p"}, "unknown key 'fps_out_of_nowhere'; the keys are name,"),
        ({"name": None, "prompt": "p"}, "name = None"),
        ({}, "give one of prompt and prompt_path"),
        ({"prompt": " "}, "prompt is empty"),
        ({"prompt": "p", "prompt_path": "a.txt"}, "give one of prompt and prompt_path"),
        ({"prompt_path": "gone.txt"}, r"prompt_path .*gone\.txt: no such file"),
        ({"prompt": "p", "input_path": "gone.png"}, r"input_path .*gone\.png: no such file"),
        ({"prompt": "p", "input_path": "a.txt"}, "neither image nor video"),
        ({"prompt": "p", "inference_type": "image2world"}, "image2world needs input_path"),
        ({"prompt": "p", "inference_type": "text2world", "input_path": "a.png"}, "takes no input_path"),
        ({"prompt": "p", "inference_type": "video2world", "input_path": "a.png"}, "is an image; use image2"),
        ({"prompt": "p", "inference_type": "image2wrld"}, "inference_type = 'image2wrld'"),
        ({"prompt": "p", "resolution": "720p"}, "resolution = '720p'"),
        ({"prompt": "p", "seed": -1}, "seed = -1"),
        ({"prompt": "p", "input_path": "a.png", "num_latent_conditional_frames": 2}, "has at most 1"),
        ({"prompt": "p", "name": "a/b"}, "becomes a file name"),
        ({"prompt": "p", "name": ".."}, "becomes a file name"),
        ({"prompt": "p", "name": "x" * 300}, "200 bytes at most"),
        ({"prompt": "p", "ground_truth": "gone.mp4"}, r"ground_truth .*gone\.mp4: no such file"),
        ({"prompt": "p", "enable_autoregressive": False, "chunk_size": 9}, "remove chunk_size and chunk_overlap"),
    ],
)
def test_a_bad_entry_names_the_file_and_the_key(folder: Path, entry: dict[str, object], message: str) -> None:
    path = write_json(folder / "inputs.json", [{"name": "good", "prompt": "p"}, {"name": "x", **entry}])
    with pytest.raises(UsageError, match=r"inputs\.json: entry 2: ") as caught:
        read_requests(path, CONFIG)
    assert re.search(message, str(caught.value))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.json", "{", r"x\.json: line 1: not JSON"),
        ("x.json", "[]", "no inputs in this file"),
        ("x.json", "[3]", "expected an object"),
        ("x.json", '[{"prompt": "p"}]', r"x\.json: name is missing"),
        ("x.json", '[{"name": "a", "prompt": "p"}, {"name": "a", "prompt": "p"}]', "'a' is used 2 times"),
        ("x.jsonl", '{"name": "a", "prompt": "p"}\n{oops', r"x\.jsonl: line 2: not JSON"),
        ("x.toml", "name = 1", "inputs are a prompt, a folder"),
        ("x.json", '{"name": "a", "prompt": "p", "name": "b"}', "key 'name' is given twice"),
        ("x.json", '{"name": "a", "prompt": "p", "guidance": NaN}', "NaN is not a number"),
        ("x.json", "[" * 100_000, "nested too deeply"),
        ("x.jsonl", '{"name": "a", "prompt": "p"}\n\n{"name": "b", "name": "b"}', r"line 3: key 'name' is given twice"),
        ("x.yaml", "name: a\nprompt: p\nname: b\n", r"x\.yaml: line 3: not YAML: key 'name' is given twice"),
        ("x.yaml", "- name: [\n", r"x\.yaml: line 2: not YAML"),
        ("x.yaml", "name: 3\nprompt: p", r"name = 3: Input should be a valid string"),
        ("x.yaml", "name: a\nprompt: p\nseed: '3'", r"seed = '3': Input should be a valid integer"),
        ("x.yaml", "name: a\nprompt: 2026-13-45", "not YAML"),
        ("x.yaml", "name: a\non: p", "key True is not text"),
        ("x.yaml", "name: !!python/object/apply:os.getcwd []\nprompt: p", "could not determine a constructor"),
        ("x.yaml", "", "expected an object"),
        ("x.json", '{"samples": []}', "samples: expected an object of name"),
        ("x.json", '{"samples": {}}', "no inputs in this file"),
        ("x.json", '{"samples": {"a": 3}}', r"samples\.a: expected an object"),
        ("x.json", '{"samples": {"a": {"promt": "p"}}}', r"samples\.a: unknown key 'promt'; did you mean prompt"),
        ("x.json", '{"samples": {"a": {"prompt": "p", "name": "b"}}}', r"samples\.a: name: the sample is named 'a'"),
        ("x.json", '{"samples": {"a": {"prompt": "p"}, "a": {"prompt": "q"}}}', "key 'a' is given twice"),
        ("x.json", '{"name": "n", "samples": {"a": {"prompt": "p"}}}', "the keys of samples are the names"),
        ("x.json", '{"sampels": {"a": {"prompt": "p"}}, "seed": 1}', "name is missing|unknown key 'sampels'"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match=message):
        read_requests(str(tmp_path / name), CONFIG)


def test_yaml_says_the_same_as_json(folder: Path) -> None:
    (folder / "in.yaml").write_text(
        """
- {name: t, inference_type: text2world, prompt: text, seed: 1, resolution: "64,96"}
- name: i
  prompt_path: a.txt
  input_path: a.png
- name: long
  prompt: |
    Two
    lines.
  num_output_frames: 40
  enable_autoregressive: true
  chunk_size: 13
  chunk_overlap: 5
"""
    )
    entries = [
        {
            "name": "t",
            "inference_type": "text2world",
            "prompt": "text",
            "seed": 1,
            "resolution": "64,96",
        },
        {"name": "i", "prompt_path": "a.txt", "input_path": "a.png"},
        {
            "name": "long",
            "prompt": "Two\nlines.",
            "num_output_frames": 40,
            "enable_autoregressive": True,
            "chunk_size": 13,
            "chunk_overlap": 5,
        },
    ]
    found = read_requests(str(folder / "in.yaml"), CONFIG)
    assert found == read_requests(write_json(folder / "in.json", entries), CONFIG)
    assert (found[2].num_frames, found[2].chunk_frames, found[2].chunk_overlap) == (40, 13, 5)
    assert found[0].chunk_frames == 93


def test_samples_take_the_defaults_around_them(folder: Path) -> None:
    content = {
        "seed": 5,
        "prompt": "for all",
        "num_steps": 2,
        "enable_autoregressive": False,
        "samples": {
            "one": {"input_path": "a.png"},
            "two": {"prompt_path": "b..txt", "seed": 6},
        },
    }
    one, two = read_requests(write_json(folder / "in.json", content), CONFIG)
    assert (one.name, one.prompt, one.image, one.seed, one.num_steps) == ("one", "for all", folder / "a.png", 5, 2)
    assert (two.name, two.prompt, two.image, two.seed, two.num_steps) == ("two", "Another.", None, 6, 2)
    assert one.chunk_frames is None


def test_paths_are_relative_to_the_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "below").mkdir()
    path = write_json(folder / "below" / "in.json", {"name": "x", "prompt_path": "../a.txt", "input_path": "../a.png"})
    monkeypatch.chdir("/")
    (request,) = read_requests(path, CONFIG)
    assert (request.prompt, request.image) == ("A red circle.", folder / "below" / ".." / "a.png")


def test_a_folder_of_ground_truth_gives_each_its_own(folder: Path) -> None:
    path = write_json(folder / "in.json", [{"name": "clip", "prompt": "p"}])
    (request,) = read_requests(path, replace(CONFIG, ground_truth=str(folder)))
    assert request.ground_truth == folder / "clip.mp4"
    with pytest.raises(UsageError, match=r"infer\.ground_truth: .*: no video named a \(2 missing\)"):
        read_requests(str(folder), replace(CONFIG, ground_truth=str(folder)))
    with pytest.raises(UsageError, match=r"infer\.ground_truth: .*gone: no such folder"):
        read_requests("p", replace(CONFIG, ground_truth=str(folder / "gone")))
