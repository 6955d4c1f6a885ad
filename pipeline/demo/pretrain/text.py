"""The text encoder: a Qwen2.5-VL of 3 layers, trained to predict captions and to know at every pad what they said.

As a language model alone it would not gather a caption's meaning at its end. Linear probes of the normalised hidden
states, which are what the DiT reads, ask for every attribute of the scene; the probes are thrown away.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from encode.cosmos25 import DEFAULT_NEGATIVE_PROMPT
from encode.cosmos25_models import conversation, normalise_state, token_ids
from pipeline.demo.checkpoint import build_text_encoder, build_tokenizer
from pipeline.demo.pretrain.data import base_scenes
from pipeline.demo.pretrain.loop import Loop
from pipeline.demo.world import BACKGROUNDS, COLOURS, MOTIONS, PLACES, SHAPES, SIZES, Scene, Thing

VOCAB = 640
LAYERS = 3
HIDDEN = 64
LENGTH = 512
RARE_WORDS = 0.25
"""Share of captions with a word of random letters in place of one of theirs: words the encoder must tell apart too."""

ATTRIBUTES: tuple[Collection[str], ...] = (SIZES, COLOURS, SHAPES, MOTIONS, PLACES)
CLASSES = [2 + len(kind) for _ in range(2) for kind in ATTRIBUTES] + [1 + len(COLOURS), len(BACKGROUNDS) + 1]
"""Of two things' attributes, each with classes for a thing that is not there and for a word nobody knows."""


def build_text(captions: list[str]) -> tuple[Qwen2Tokenizer, Qwen2_5_VLForConditionalGeneration]:
    tokenizer = build_tokenizer(captions, vocab_size=VOCAB)
    return tokenizer, build_text_encoder(tokenizer, vocab_size=VOCAB, layers=LAYERS, hidden=HIDDEN, tied=True)


def train_text(
    *, steps: int, batch_size: int, captions: int, device: torch.device, length: int = LENGTH, lr: float = 2e-3,
    seed: int = 0,
) -> tuple[Qwen2Tokenizer, Qwen2_5_VLForConditionalGeneration]:  # fmt: skip
    """Train tokenizer and encoder from scratch. length: tokens that captions are padded to."""
    torch.manual_seed(seed)
    found = base_scenes(3000 + seed, captions)
    rng = np.random.default_rng(seed)
    texts, labels = zip(*(_example(scene, rng) for scene in found), strict=True)
    tokenizer, encoder = build_text([scene.caption for scene in found[:2000]])
    encoder.to(device).train()
    ids_NL, ends_N = tokens_of(tokenizer, list(texts), length)
    ids_NL, ends_N, labels_NA = (value.to(device) for value in (ids_NL, ends_N, torch.tensor(labels)))
    probe = nn.Linear(LAYERS * HIDDEN, sum(CLASSES)).to(device)
    parameters = [*encoder.model.language_model.parameters(), *probe.parameters()]
    loop = Loop("text encoder", parameters, steps=steps, lr=lr, device=device)
    places_L = torch.arange(length, device=device)

    def loss(index: Tensor) -> dict[str, Tensor]:
        ids_BL, ends_B = ids_NL[index], ends_N[index, None]
        output = encoder(ids_BL, output_hidden_states=True)
        in_text = (places_L < ends_B)[:, 1:]
        each = F.cross_entropy(output.logits[:, :-1].flatten(0, 1).float(), ids_BL[:, 1:].flatten(), reduction="none")
        language = (each.view_as(in_text) * in_text).sum() / in_text.sum()
        at_B1 = ends_B + (torch.rand_like(ends_B.float()) * (length - ends_B)).long()
        states_BLD = torch.cat([normalise_state(state) for state in output.hidden_states[1:]], -1)
        read_BD = states_BLD.gather(1, at_B1[..., None].expand(-1, -1, states_BLD.shape[-1]))[:, 0]
        answers = probe(read_BD).split(CLASSES, -1)
        probed = torch.stack([F.cross_entropy(a, labels_NA[index, i]) for i, a in enumerate(answers)]).mean()
        right = torch.stack([(a.argmax(-1) == labels_NA[index, i]).float().mean() for i, a in enumerate(answers)])
        return {
            "loss": language + probed,
            "language": language.detach(),
            "probe": probed.detach(),
            "right": right.mean(),
        }

    for record in loop.run(loss, torch.empty(batch_size, dtype=torch.long, device=device), captions, graph=False):
        loop.say(record)
    return tokenizer, encoder.eval()


def tokens_of(tokenizer: Qwen2Tokenizer, captions: list[str], length: int) -> tuple[Tensor, Tensor]:
    """Token ids [N, length] as stage 1 makes them, and where the pads begin [N]."""
    ids = token_ids(
        tokenizer.apply_chat_template(
            [conversation(caption) for caption in captions],
            tokenize=True,
            max_length=length,
            truncation=True,
            padding="max_length",
        )
    )
    ids_NL = torch.tensor(ids)
    return ids_NL, (ids_NL != tokenizer.pad_token_id).sum(1).clamp(max=length - 1)


@torch.no_grad()
def contexts_of(
    encoder: Qwen2_5_VLForConditionalGeneration, ids_NL: Tensor, device: torch.device, batch_size: int = 256
) -> Tensor:
    """Normalised hidden states of all layers, as `encode.text = "raw"` stores them, [N, L, layers x hidden]."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    parts = []
    for ids in ids_NL.split(batch_size):
        states = encoder(ids.to(device), output_hidden_states=True).hidden_states[1:]
        parts.append(torch.cat([normalise_state(state) for state in states], -1).to(dtype))
    return torch.cat(parts)


def negative_prompt_tokens(tokenizer: Qwen2Tokenizer, length: int) -> Tensor:
    return tokens_of(tokenizer, [DEFAULT_NEGATIVE_PROMPT], length)[0]


def _example(scene: Scene, rng: np.random.Generator) -> tuple[str, list[int]]:
    """A caption and its labels, one of its first thing's words replaced by random letters now and then."""
    words, labels = _words(scene.things[0]), _labels(scene.things[0])
    caption = scene.caption
    if rng.random() < RARE_WORDS:
        place = int(rng.integers(5))
        letters = "".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), int(rng.integers(2, 7))))
        caption = caption.replace(f" {words[place]}", f" {letters}", 1)
        labels[place] = 1
    labels += _labels(scene.things[1]) if len(scene.things) > 1 else [0] * len(ATTRIBUTES)
    labels.append(1 + list(COLOURS).index(scene.pillar) if scene.pillar else 0)
    labels.append(list(BACKGROUNDS).index(scene.background))
    return caption, labels


def _words(thing: Thing) -> list[str]:
    return [thing.size, str(thing.colour), thing.shape, thing.motion, str(thing.start)]


def _labels(thing: Thing) -> list[int]:
    return [2 + list(kind).index(word) for kind, word in zip(ATTRIBUTES, _words(thing), strict=True)]
