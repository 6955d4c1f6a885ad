"""Weights that do not fit, say too little or would run code: refused in one line that names what is wrong."""

import pytest
import safetensors.torch
import torch

from manifests.errors import UsageError
from tests.train.weights import stored
from train.adapters import WEIGHTS_NAME
from train.weights import load_weights, save_weights


class Hostile:
    def __reduce__(self):
        return print, ("this must not run",)


def test_a_file_that_would_run_code_is_refused(tmp_path, capsys):
    torch.save({"net.blocks.0.self_attn.q_proj.weight": Hostile()}, tmp_path / "bad.pt")
    with pytest.raises(UsageError, match="weights_only"):
        load_weights(tmp_path / "bad.pt")
    assert "must not run" not in capsys.readouterr().out


@pytest.mark.parametrize("form", ["nvidia", "comfyui"])
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda state: {n.replace("q_proj", "q_prj"): t for n, t in state.items()}, "matches nothing in the model"),
        (lambda state: {n: t for n, t in state.items() if "1.mlp.layer2.lora_B" not in n}, "has no lora_B.weight"),
        (
            lambda state: {n: t[:, :3] if "lora_A" in n else t[:-1] if "lora_B" in n else t for n, t in state.items()},
            "adapts a|magnitudes",
        ),
        (lambda state: {n: t * float("nan") for n, t in state.items()}, "not finite"),
    ],
    ids=["unknown name", "half a module", "other shapes", "not finite"],
)
def test_a_foreign_adapter_that_does_not_fit_is_one_line(adapter, convert, tmp_path, base, form, edit, message):
    there = convert(adapter[0], form)
    state = {name: tensor.contiguous() for name, tensor in edit(stored(there)).items()}
    bad = tmp_path / f"bad{there.suffix}"
    torch.save(state, bad) if form == "nvidia" else safetensors.torch.save_file(state, bad)
    with pytest.raises(UsageError, match=message) as caught:
        convert(bad, "diffusers", alpha=7.0, base=base)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "2_diffusers" / "folder").exists()


def test_an_alpha_is_never_guessed(adapter, convert, tmp_path):
    folder, _ = adapter
    with pytest.raises(UsageError, match="pass --alpha"):
        load_weights(convert(folder, "nvidia"))
    bare = tmp_path / "bare"
    bare.mkdir()
    safetensors.torch.save_file(stored(folder), bare / WEIGHTS_NAME)
    with pytest.raises(UsageError, match="pass --alpha"):
        load_weights(bare)
    assert load_weights(bare, alpha=7).weights.config["lora_alpha"] == 7
    with pytest.raises(UsageError, match="--alpha 9 does not"):
        load_weights(folder, alpha=9)
    comfy = convert(folder, "comfyui")
    safetensors.torch.save_file({n: t for n, t in stored(comfy).items() if not n.endswith("alpha")}, comfy)
    with pytest.raises(UsageError, match=r"has no alpha; pass --alpha"):
        load_weights(comfy)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda state: dict(list(state.items())[1:]), "is a weight of the base model and missing"),
        (lambda state: state | {"net.blocks.9.mlp.layer1.weight": torch.zeros(2)}, "is not a weight of the base"),
        (lambda state: state | {"net.blocks.0.mlp.layer3.weight": torch.zeros(2)}, "'net.blocks.0.mlp.layer3.weight'"),
        (lambda state: state | {"other": torch.zeros(2)}, "'other' begins with neither"),
        (lambda state: state | {"net.final_layer.linear.weight": torch.zeros(2, 2)}, r"proj_out.weight is \[2, 2\]"),
    ],
    ids=["missing", "another block", "unknown", "no prefix", "shape"],
)
def test_a_full_model_that_does_not_fit_names_the_weight(convert, tmp_path, tiny_checkpoint, base, edit, message):
    state = edit(stored(convert(tiny_checkpoint, "nvidia")))
    torch.save(state, tmp_path / "bad.pt")
    with pytest.raises(UsageError, match=message):
        convert(tmp_path / "bad.pt", "diffusers", base=base)


def test_what_cannot_be_written_is_said_before_anything_is(adapter, convert, tmp_path, tiny_checkpoint):
    with pytest.raises(UsageError, match="needs --base"):
        convert(adapter[0], "model")
    with pytest.raises(UsageError, match="this is a full model"):
        convert(tiny_checkpoint, "peft")
    with pytest.raises(UsageError, match=r"writes a \.pt file"):
        save_weights(load_weights(adapter[0]), "nvidia", tmp_path / "folder")
    with pytest.raises(UsageError, match="there already"):
        save_weights(load_weights(adapter[0]), "peft", adapter[0])
    with pytest.raises(UsageError, match="--ema is for NVIDIA"):
        load_weights(adapter[0], ema=True)
    with pytest.raises(UsageError, match=r"did you mean .*adapter\?"):
        load_weights(tmp_path)
