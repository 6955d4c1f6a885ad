"""What the encoders write is what diffusers would compute, and a fingerprint names exactly what made it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, Cosmos2_5_PredictBasePipeline, CosmosTransformer3DModel
from diffusers.pipelines.cosmos import pipeline_cosmos2_5_predict, pipeline_cosmos2_5_transfer
from safetensors.torch import load_file, save_file

from encode import cosmos25, cosmos_transfer25
from encode.config import EncodeConfig
from encode.cosmos25 import check_geometry, context_parts, entry_shape, latents_parts
from encode.cosmos25_models import TextEncoder, VideoEncoder
from infer.loading import NoGuardrail
from manifests.config import ModelConfig
from manifests.errors import UsageError
from manifests.keys import fingerprint

CPU = torch.device("cpu")
CONFIG = EncodeConfig(cache="unused", height=32, width=48, num_frames=9, dtype="float32")
CAPTIONS = ["A red circle slides.", "A much longer caption: the blue square rises from the bottom to the top.", "x"]


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> ModelConfig:
    return ModelConfig(path=str(tiny_checkpoint))


@pytest.fixture(scope="module")
def pipe(model: ModelConfig) -> Cosmos2_5_PredictBasePipeline:
    return Cosmos2_5_PredictBasePipeline.from_pretrained(model.path, safety_checker=NoGuardrail())


@pytest.fixture
def copied(model: ModelConfig, tmp_path: Path) -> ModelConfig:
    return ModelConfig(path=str(shutil.copytree(model.path, tmp_path / "copy")))


def frames(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (9, 32, 48, 3), dtype=np.uint8)


def context_fingerprint(model: ModelConfig, config: EncodeConfig = CONFIG) -> str:
    return fingerprint(context_parts(model, config))


def latents_fingerprint(model: ModelConfig, config: EncodeConfig = CONFIG) -> str:
    return fingerprint(latents_parts(model, config))


def change_json(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def change_tensor(folder: Path, prefix: str = "") -> None:
    """Add a little to one value of the first tensor whose name starts with `prefix`."""
    for file in sorted(folder.glob("*.safetensors")):
        tensors = load_file(file)
        for name in sorted(tensors):
            if name.startswith(prefix) and tensors[name].is_floating_point():
                tensors[name] = tensors[name].clone()
                tensors[name].view(-1)[-1] += 1.0
                save_file(tensors, file, metadata={"format": "pt"})
                return
    raise AssertionError(f"{folder} has no tensor {prefix}*")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_latents_are_the_unnormalised_posterior_mean(model: ModelConfig, dtype: str) -> None:
    config = replace(CONFIG, dtype=dtype)
    latents = VideoEncoder(model, config, CPU).encode(frames())
    vae = AutoencoderKLWan.from_pretrained(model.path, subfolder="vae", torch_dtype=getattr(torch, dtype))
    video = torch.from_numpy(frames()).permute(3, 0, 1, 2)[None].float() / 127.5 - 1.0
    with torch.no_grad():
        posterior = vae.encode(video.to(vae.dtype)).latent_dist
    torch.testing.assert_close(latents, posterior.mean[0], rtol=0, atol=0)
    assert latents.shape == entry_shape("latents", model, config) == (16, 3, 4, 6)
    assert latents.dtype == getattr(torch, dtype)


def test_black_and_white_reach_both_ends_of_the_vaes_range(model: ModelConfig) -> None:
    encoder = VideoEncoder(model, CONFIG, CPU)
    with torch.no_grad():
        for value, pixel in ((0, -1.0), (255, 1.0)):
            expected = encoder._vae.encode(torch.full((1, 3, 9, 32, 48), pixel)).latent_dist.mean[0]
            latents = encoder.encode(np.full((9, 32, 48, 3), value, np.uint8))
            torch.testing.assert_close(latents, expected, rtol=0, atol=0)


def test_contexts_are_the_pipelines_text_through_the_transformers_projection(
    model: ModelConfig, pipe: Cosmos2_5_PredictBasePipeline
) -> None:
    contexts = TextEncoder(model, CONFIG, CPU).encode(CAPTIONS)
    with torch.no_grad():
        raw = pipe._get_prompt_embeds(CAPTIONS, device=CPU)
        expected = pipe.transformer.crossattn_proj(raw)
    assert contexts.shape == (3, *entry_shape("context", model, CONFIG))
    torch.testing.assert_close(contexts, expected, rtol=1e-5, atol=1e-6)
    assert (contexts[0] - contexts[1]).abs().max() > 1e-2


def test_raw_contexts_are_the_pipelines_text_itself(model: ModelConfig, pipe: Cosmos2_5_PredictBasePipeline) -> None:
    config = replace(CONFIG, text="raw")
    encoder = TextEncoder(model, config, CPU)
    raw = encoder.encode(CAPTIONS[:2])
    assert raw.shape == (2, *entry_shape("context", model, config))
    with torch.no_grad():
        torch.testing.assert_close(raw, pipe._get_prompt_embeds(CAPTIONS[:2], device=CPU), rtol=0, atol=0)
    assert not encoder.null().any()
    assert encoder.null().shape == raw.shape[1:]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_null_context_is_gelu_of_the_bias_at_every_token(model: ModelConfig, dtype: str) -> None:
    null = TextEncoder(model, replace(CONFIG, dtype=dtype), CPU).null()
    transformer = CosmosTransformer3DModel.from_pretrained(model.path, subfolder="transformer")
    projection = transformer.crossattn_proj
    with torch.no_grad():
        zeros = projection(torch.zeros(1, 512, projection[0].in_features))[0]
    expected = torch.nn.functional.gelu(projection[0].bias.detach())
    torch.testing.assert_close(null, zeros.to(null.dtype), rtol=0, atol=0)
    torch.testing.assert_close(null, expected.to(null.dtype).expand(512, -1), rtol=0, atol=0)
    assert null.abs().max() > 0
    assert null.is_contiguous()


def test_a_context_does_not_depend_on_its_batch(model: ModelConfig) -> None:
    encoder = TextEncoder(model, CONFIG, CPU)
    together = encoder.encode(CAPTIONS)
    alone = torch.cat([encoder.encode([caption]) for caption in CAPTIONS])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_a_long_caption_is_cut_and_can_be_told_from_one_that_fits(model: ModelConfig) -> None:
    encoder = TextEncoder(model, replace(CONFIG, text_length=64), CPU)
    long = "circle " * 200
    assert encoder.num_tokens(long) > 64 >= encoder.num_tokens("circle")
    assert encoder.encode([long]).shape[1] == 64


@pytest.mark.parametrize(
    ("field", "value", "near"),
    [
        ("height", 40, "32, 48"),
        ("width", 100, "96, 112"),
        ("height", 8, "16"),
        ("width", 0, "16"),
        ("width", 456, "448, 464"),
        ("num_frames", 92, "89, 93"),
        ("num_frames", 64, "61, 65"),
        ("num_frames", 10, "9, 13"),
        ("num_frames", 0, "1"),
        ("num_frames", -3, "1"),
    ],
)
def test_a_wrong_size_names_the_key_and_values_near_it(field: str, value: int, near: str) -> None:
    with pytest.raises(UsageError, match=rf"^encode\.{field} = {value} is not .*: {near}") as error:
        check_geometry(replace(CONFIG, **{field: value}))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("num_frames", [1, 5, 93, 97])
def test_right_sizes_pass(num_frames: int) -> None:
    check_geometry(replace(CONFIG, height=432, width=768, num_frames=num_frames))


def test_fingerprints_do_not_depend_on_where_the_model_lies(model: ModelConfig, copied: ModelConfig) -> None:
    assert latents_fingerprint(copied) == latents_fingerprint(model)
    assert context_fingerprint(copied) == context_fingerprint(model)


def test_fingerprints_do_not_depend_on_how_the_job_runs_or_is_cut(model: ModelConfig) -> None:
    other = replace(
        CONFIG, cache="else", snapshot="b", height=64, num_frames=13, fps=8.0, shard_mb=1, text_batch=3,
        decode_workers=5, executor="local", max_failed=0.5, negative_prompts=("blurry",),
    )  # fmt: skip
    assert latents_fingerprint(model, other) == latents_fingerprint(model)
    assert context_fingerprint(model, other) == context_fingerprint(model)


def test_saving_details_in_a_config_change_no_fingerprint(copied: ModelConfig) -> None:
    before = latents_fingerprint(copied), context_fingerprint(copied)
    for component in ("vae", "text_encoder", "transformer"):
        change_json(Path(copied.path, component, "config.json"), _diffusers_version="9", transformers_version="9")
    assert (latents_fingerprint(copied), context_fingerprint(copied)) == before


def test_the_trained_part_of_the_transformer_is_in_no_fingerprint(copied: ModelConfig) -> None:
    before = latents_fingerprint(copied), context_fingerprint(copied)
    change_tensor(Path(copied.path, "transformer"), "transformer_blocks.0")
    assert (latents_fingerprint(copied), context_fingerprint(copied)) == before


@pytest.mark.parametrize("part", ["weight", "latents_mean", "clip_output", "dtype", "pixels", "encoder"])
def test_latents_fingerprints_change_with_what_makes_latents(
    copied: ModelConfig, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    before, contexts = latents_fingerprint(copied), context_fingerprint(copied)
    vae = Path(copied.path, "vae")
    config = CONFIG
    if part == "weight":
        change_tensor(vae, "encoder.")
    elif part == "latents_mean":
        change_json(vae / "config.json", latents_mean=[0.25] * 16)
    elif part == "clip_output":
        change_json(vae / "config.json", clip_output=False)
    elif part == "dtype":
        config = replace(CONFIG, dtype="bfloat16")
    elif part == "pixels":
        monkeypatch.setattr(cosmos25, "PIXEL_POLICY", "another way to resize")
    else:
        monkeypatch.setattr(cosmos25, "ENCODER_VERSION", 99)
    assert latents_fingerprint(copied, config) != before
    assert context_fingerprint(copied) == contexts


@pytest.mark.parametrize(
    "part",
    ["text_encoder", "projection", "config", "tokenizer.json", "tokenizer_config.json", "length", "dtype", "raw"],
)
def test_context_fingerprints_change_with_what_makes_contexts(copied: ModelConfig, part: str) -> None:
    before, latents = context_fingerprint(copied), latents_fingerprint(copied)
    root, config = Path(copied.path), CONFIG
    if part == "text_encoder":
        change_tensor(root / "text_encoder")
    elif part == "projection":
        change_tensor(root / "transformer", "crossattn_proj")
    elif part == "config":
        change_json(root / "text_encoder" / "config.json", rope_theta=77.0)
    elif part.endswith(".json"):
        with open(root / "tokenizer" / part, "a") as file:
            file.write(" ")
    else:
        changes = {"length": {"text_length": 256}, "dtype": {"dtype": "bfloat16"}, "raw": {"text": "raw"}}
        config = replace(CONFIG, **changes[part])
    assert context_fingerprint(copied, config) != before
    assert latents_fingerprint(copied) == latents


def test_a_model_without_projection_says_what_to_set(copied: ModelConfig) -> None:
    folder = Path(copied.path, "transformer")
    for file in folder.glob("*.safetensors"):
        kept = {name: tensor for name, tensor in load_file(file).items() if "crossattn_proj" not in name}
        save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(UsageError, match=r'crossattn_proj.*encode\.text = "raw"'):
        context_parts(copied, CONFIG)
    assert context_parts(copied, replace(CONFIG, text="raw"))["projection"] is None


def test_a_folder_that_is_no_checkpoint_is_named(copied: ModelConfig) -> None:
    Path(copied.path, "vae", "config.json").unlink()
    with pytest.raises(UsageError, match=r"vae/config\.json"):
        latents_parts(copied, CONFIG)


def test_the_negative_prompt_is_the_one_of_diffusers():
    assert cosmos25.DEFAULT_NEGATIVE_PROMPT == pipeline_cosmos2_5_predict.DEFAULT_NEGATIVE_PROMPT
    assert cosmos_transfer25.DEFAULT_NEGATIVE_PROMPT == pipeline_cosmos2_5_transfer.DEFAULT_NEGATIVE_PROMPT
