import json
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    Cosmos2_5_PredictBasePipeline,
    CosmosTransformer3DModel,
    UniPCMultistepScheduler,
)
from safetensors.torch import load_file
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from infer.loading import NoGuardrail
from manifests.errors import UsageError
from pipeline.demo.checkpoint import MARKER, build_tiny_checkpoint


@pytest.fixture(scope="module")
def pipe(tiny_checkpoint: Path) -> Cosmos2_5_PredictBasePipeline:
    return Cosmos2_5_PredictBasePipeline.from_pretrained(
        str(tiny_checkpoint), revision="main", safety_checker=NoGuardrail(), dtype=torch.float32
    )


def test_each_component_loads_by_its_class_and_subfolder(tiny_checkpoint: Path) -> None:
    transformer = CosmosTransformer3DModel.from_pretrained(tiny_checkpoint, subfolder="transformer")
    vae = AutoencoderKLWan.from_pretrained(tiny_checkpoint, subfolder="vae")
    text_encoder = Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny_checkpoint, subfolder="text_encoder")
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint, subfolder="tokenizer")
    scheduler = UniPCMultistepScheduler.from_pretrained(tiny_checkpoint, subfolder="scheduler")

    text = text_encoder.config.text_config
    projection = transformer.crossattn_proj[0]
    assert projection.in_features == text.num_hidden_layers * text.hidden_size
    assert projection.out_features == transformer.config.text_embed_dim
    assert (transformer.config.in_channels, transformer.config.out_channels) == (17, 16)
    assert vae.config.z_dim == 16
    assert len(set(vae.config.latents_mean)) == len(set(vae.config.latents_std)) == 16
    assert len(tokenizer) <= text.vocab_size
    assert tokenizer.pad_token is not None
    assert scheduler.config.prediction_type == "flow_prediction"
    for module in (transformer, vae, text_encoder):
        assert {p.dtype for p in module.parameters()} == {torch.float32}


def test_strides_are_those_of_the_real_vae(pipe: Cosmos2_5_PredictBasePipeline) -> None:
    latents = pipe.vae.encode(torch.zeros(1, 3, 13, 32, 48)).latent_dist.mode()
    assert latents.shape == (1, 16, 4, 4, 6)


def test_latents_tell_videos_apart(pipe: Cosmos2_5_PredictBasePipeline) -> None:
    torch.manual_seed(0)
    dark, bright = -0.8 + 0.1 * torch.randn(1, 3, 5, 32, 32), 0.8 + 0.1 * torch.randn(1, 3, 5, 32, 32)
    latents = [pipe.vae.encode(v).latent_dist.mode() for v in (dark, bright)]
    assert (latents[0] - latents[1]).abs().mean() > 0.3
    assert all(0.3 < x.std() < 10 for x in latents)


def test_sigmas_are_flow_sigmas_from_200_to_a_hundredth(pipe: Cosmos2_5_PredictBasePipeline) -> None:
    pipe.scheduler.set_timesteps(36)
    sigmas = pipe.scheduler.sigmas
    assert sigmas[0].item() == pytest.approx(200 / 201)
    assert sigmas[-2].item() == pytest.approx(0.01 / 1.01)
    assert sigmas[-1] == 0


def test_chat_format_takes_strings_and_text_items(pipe: Cosmos2_5_PredictBasePipeline) -> None:
    def render(content: object, **kwargs: object) -> str:
        return pipe.tokenizer.apply_chat_template(
            [{"role": "system", "content": "Be brief."}, {"role": "user", "content": content}],
            tokenize=False,
            **kwargs,
        )

    expected = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHé <b>.<|im_end|>\n"
    assert render("Hé <b>.") == render([{"type": "text", "text": "Hé <b>."}]) == expected
    assert render("Hé <b>.", add_generation_prompt=True) == expected + "<|im_start|>assistant\n"
    ids = pipe.tokenizer(expected)["input_ids"]
    assert pipe.tokenizer.decode(ids) == expected
    assert ids.count(pipe.tokenizer.convert_tokens_to_ids("<|im_start|>")) == 2


def test_prompts_change_the_embeds_and_fit_in_512(pipe: Cosmos2_5_PredictBasePipeline) -> None:
    with torch.no_grad():
        embeds = pipe._get_prompt_embeds(["a red circle", "a blue square"])
    assert embeds.shape == (2, 512, pipe.transformer.config.crossattn_proj_in_channels)
    assert (embeds[0] - embeds[1]).abs().max() > 0.1


def test_the_stock_pipeline_generates_and_no_part_is_dead(pipe: Cosmos2_5_PredictBasePipeline) -> None:
    def generate(prompt: str) -> torch.Tensor:
        return pipe(
            prompt=prompt,
            height=32,
            width=32,
            num_frames=5,
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        ).frames

    pipe.set_progress_bar_config(disable=True)
    video = generate("a red circle")
    assert video.shape == (1, 5, 3, 32, 32)
    assert video.isfinite().all()
    assert video.std() > 0.02
    assert (video - generate("a blue square")).abs().max() > 1e-4
    with torch.no_grad():
        for block in pipe.transformer.transformer_blocks:
            assert all(p.abs().max() > 0 for p in block.parameters())


def test_same_seed_gives_the_same_files_and_another_seed_other_weights(tiny_checkpoint: Path, tmp_path: Path) -> None:
    state = torch.get_rng_state()
    again = build_tiny_checkpoint(tmp_path / "again")
    other = build_tiny_checkpoint(tmp_path / "other", seed=1)
    assert torch.equal(torch.get_rng_state(), state)

    files = [p.relative_to(tiny_checkpoint) for p in tiny_checkpoint.rglob("*") if p.is_file()]
    assert all((again / f).read_bytes() == (tiny_checkpoint / f).read_bytes() for f in files)
    weights = "transformer/diffusion_pytorch_model.safetensors"
    key = "transformer_blocks.0.attn1.to_q.weight"
    assert not torch.equal(load_file(other / weights)[key], load_file(tiny_checkpoint / weights)[key])


def test_an_existing_checkpoint_is_kept_unless_the_seed_changed(tmp_path: Path) -> None:
    folder = build_tiny_checkpoint(tmp_path / "tiny")
    made = (folder / "model_index.json").stat().st_mtime_ns
    build_tiny_checkpoint(folder)
    assert (folder / "model_index.json").stat().st_mtime_ns == made
    build_tiny_checkpoint(folder, seed=3)
    assert json.loads((folder / MARKER).read_text())["seed"] == 3
    assert [p.name for p in tmp_path.iterdir()] == ["tiny"]


def test_a_folder_with_other_content_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(UsageError, match="not a tiny checkpoint"):
        build_tiny_checkpoint(tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "keep"
