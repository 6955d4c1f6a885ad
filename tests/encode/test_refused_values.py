"""Latents no model makes on purpose are quarantined, not stored: a real VAE with broken weights makes them."""

import shutil

import pytest
import safetensors.torch
import torch

from manifests.cache import Cache
from manifests.errors import LatentlineError
from manifests.verify import verify
from pipeline.encode_stage import encode_stage
from tests.pipeline.recipes import make_recipe


@pytest.mark.parametrize(
    ("value", "message"), [(float("nan"), "latents are not finite"), (0.0, "latents are constant: every value is 0")]
)
def test_latents_that_make_no_sense_are_quarantined(tmp_path, tiny_checkpoint, demo_dataset, value, message):
    model = tmp_path / "model"
    shutil.copytree(tiny_checkpoint, model)
    [path] = (model / "vae").glob("*.safetensors")
    weights = safetensors.torch.load_file(path)
    for name in weights:
        if name.startswith("quant_conv."):
            weights[name] = torch.full_like(weights[name], value)
    safetensors.torch.save_file(weights, path, {"format": "pt"})
    recipe = make_recipe(tmp_path, model, demo_dataset)
    with pytest.raises(LatentlineError, match=message):
        encode_stage(recipe)
    cache = Cache(recipe.encode.cache)
    assert cache.summary("latents").entries == 0
    assert set(cache.index("latents")["error"].to_pylist()) == {message}
    assert cache.summary("context").entries > 0
    assert verify(cache).findings == ()
