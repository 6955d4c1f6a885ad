"""Sample videos during training: a callback for the trainer, made of infer's parts and the transformer that trains.

    OUTPUT/samples/step_00000100/<index>-<stem>.mp4     what the model makes of a sample's text, with a fixed seed
    OUTPUT/samples/step_00000100/contact_sheet.png      each beside the sample's own video

Texts come from the cache, so no text encoder is loaded; videos are not checked by a guardrail, as they are for the one
who trains.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from infer.video import contact_sheet, write_mp4
from manifests.errors import UsageError
from manifests.family import find_family
from manifests.shards import read_tensors
from manifests.snapshot import Sample, Snapshot
from manifests.store import Store
from pipeline.recipe import Recipe
from train.hints import HintReader
from train.parallel import Ranks


class SampleVideos:
    """snapshot: whose first samples are shown, each with the first of its captions by name.

    Raises UsageError if their texts do not fit what sampling needs.
    """

    def __init__(self, recipe: Recipe, snapshot: Snapshot, store: Store) -> None:
        self.recipe = recipe
        self.config = recipe.train.samples
        self.snapshot = snapshot
        self.store = store
        self._family = find_family("infer", recipe.model)
        self._trained_family = find_family("train", recipe.model)
        self._hints = HintReader(snapshot, store, recipe.train, self._trained_family)
        self._pipe: Any = None
        if not self._trained_family.is_projected(snapshot):
            raise UsageError('train.samples.every: sample videos need projected contexts; encode.text is "raw"')
        self._negative = self._negative_context() if self.config.guidance > 1 else None

    def __call__(self, transformer: nn.Module, step: int, ranks: Ranks) -> Path | None:
        """Make the videos on every rank: those that split the weights stay in step. The main rank writes them."""
        folder = Path(self.recipe.train.output) / "samples" / f"step_{step:08d}"
        rows = []
        if self._pipe is None:
            dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}[self.recipe.train.dtype]
            self._pipe = self._family.load_decoder(self.recipe.model, dtype=dtype)
        self._pipe.vae.to(ranks.device)
        for index in range(min(self.config.count, self.snapshot.num_samples)):
            sample = self.snapshot.sample(index)
            name = min(sample.captions)
            latents = read_tensors(self.store, sample.latents)["latents"]
            own, made = self._family.preview(
                self._pipe,
                transformer,
                self._contexts(sample, name),
                self._trained_family.normalise(latents, self.snapshot.fingerprints["latents"]),
                image=self.config.image,
                num_steps=self.config.num_steps,
                guidance=self.config.guidance,
                seed=self.config.seed,
                conditioning_timestep=self.recipe.train.objective.conditioning_timestep,
                **self._hints.of(sample, 0, self.config.seed),
            )
            if ranks.is_main:
                folder.mkdir(parents=True, exist_ok=True)
                stem = f"{index:03d}-{Path(sample.source).stem}"
                fps = self.snapshot.column("fps")[index].as_py() or self.recipe.infer.fps
                write_mp4(folder / f"{stem}.mp4", made, fps)
                rows += [(f"source: {stem}: {sample.captions[name]}", own), (f"step {step}: {stem}", made)]
        self._pipe.vae.to("cpu")
        if not ranks.is_main:
            return None
        contact_sheet(folder / "contact_sheet.png", rows)
        return folder / "contact_sheet.png"

    def _contexts(self, sample: Sample, name: str) -> list[torch.Tensor]:
        context = read_tensors(self.store, sample.contexts[name])["context"].unsqueeze(0)
        return [context] if self._negative is None else [context, self._negative]

    def _negative_context(self) -> torch.Tensor:
        prompt = self.recipe.infer.negative_prompt
        prompt = self._family.DEFAULT_NEGATIVE_PROMPT if prompt is None else prompt
        if prompt not in self.snapshot.negative_contexts:
            raise UsageError(
                f"train.samples.guidance: the cache has no context of the negative prompt {prompt[:40]!r}...; leave "
                "infer.negative_prompt out, or set train.samples.guidance = 1"
            )
        return read_tensors(self.store, self.snapshot.negative_contexts[prompt])["context"].unsqueeze(0)
