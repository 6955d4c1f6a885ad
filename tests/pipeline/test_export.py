"""`latentline export` as a user meets it."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.command import latentline
from tests.infer.conftest import save_adapter

__all__ = ["save_adapter"]


def test_an_adapter_to_nvidia_and_back(save_adapter, tiny_checkpoint, tmp_path: Path) -> None:
    folder = save_adapter(alpha=6.0, dora=True)
    there, back = tmp_path / "out" / "adapter.pt", tmp_path / "out" / "back"
    outcome = latentline("export", folder, "--to", "nvidia", "--output", there, "--base", tiny_checkpoint, "--json")
    assert outcome.code == 0
    said = outcome.json
    assert (said["from"], said["method"], said["rank"], said["alpha"]) == ("diffusers", "dora", 4, 6)
    assert "lora_alpha=6" in outcome.err
    without = latentline("export", there, "--to", "diffusers", "--output", back)
    assert without.code == 2
    assert "pass --alpha" in without.error()
    assert not back.exists()
    assert latentline("export", there, "--to", "diffusers", "--output", back, "--alpha", "6").code == 0
    name = "pytorch_lora_weights.safetensors"
    before, after = load_file(folder / name), load_file(back / name)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_comfyui_is_labelled_untested(save_adapter, tmp_path: Path) -> None:
    outcome = latentline("export", save_adapter(), "--to", "comfyui", "--output", tmp_path / "a.safetensors")
    assert outcome.code == 0
    assert "untested" in outcome.err


def test_a_fused_model_generates_what_base_and_adapter_do(place, save_adapter, tmp_path: Path) -> None:
    folder = save_adapter(alpha=8.0)
    fused, base = tmp_path / "fused", place.values["model"]["path"]
    assert latentline("export", folder, "--to", "model", "--base", base, "--output", fused).code == 0
    made = []
    for name, options in (("with", ["--adapter", folder]), ("fused", ["--set", f"model.path={fused}"]), ("bare", [])):
        output = ["--set", f"infer.output={tmp_path / name}", "--no-guardrail", "--json"]
        outcome = latentline("infer", place.recipe, "a red circle", *output, *options)
        assert outcome.code == 0
        made.append(_frames(Path(outcome.json["videos"][0])))
    apart = (made[0] - made[1]).abs().mean()
    assert apart < 0.1 * (made[0] - made[2]).abs().mean()


def _frames(video: Path) -> torch.Tensor:
    from infer.video import read_frames

    return torch.stack([torch.from_numpy(frame).float() for frame in read_frames(video)])


def test_other_formats_are_pointed_to_export(place, tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(b"")
    for arguments in (
        ("infer", place.recipe, "x", "--no-guardrail", "--adapter", tmp_path / "model.pt"),
        ("encode", place.recipe, "--set", f"model.path={tmp_path}/model.pt"),
    ):
        outcome = latentline(*arguments)
        assert outcome.code == 2
        assert "latentline export" in outcome.error()


def test_what_is_not_there_is_one_line(tmp_path: Path) -> None:
    for source, message in ((tmp_path / "none", "no such file"), (tmp_path, "is in this folder")):
        outcome = latentline("export", source, "--to", "peft", "--output", tmp_path / "out")
        assert outcome.code == 2
        assert message in outcome.error()
