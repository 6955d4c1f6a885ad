"""A small real cache of random latents and contexts that fits the tiny checkpoint, made by manifests' writers."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import torch

from manifests.cache import Cache
from manifests.commit import commit_shard
from manifests.config import ModelConfig
from manifests.fingerprint import component_folder, weights_digest
from manifests.keys import captions_key, digest
from manifests.schema import SNAPSHOT
from manifests.shards import Entry
from manifests.snapshot import Snapshot, build_snapshot

SHAPE = (16, 3, 4, 6)
CONTEXT = (8, 64)


def make_snapshot(
    folder: Path,
    checkpoint: Path,
    *,
    shapes: tuple[tuple[int, ...], ...] = (SHAPE,) * 6,
    poisoned: int | None = None,
    datasets: tuple[str, ...] = (),
    captions: tuple[str, ...] = (),
    context: tuple[int, ...] = CONTEXT,
    **parts: object,
) -> Snapshot:
    """Encode nothing: write random latents of the given shapes and a context each, and freeze them.

    poisoned: index of a sample whose latents hold a NaN. datasets: of each sample; default `test`. captions: names of
    the captions each sample has, with a context each; default one without a name. context: shape of each context.
    parts: fingerprint parts to replace.
    """
    cache = Cache(str(folder), create=True)
    generator = torch.Generator().manual_seed(7)
    latents, contexts = {}, {}
    for index, shape in enumerate(shapes):
        values = torch.randn(shape, generator=generator)
        if index == poisoned:
            values[0, 0, 0, 0] = torch.nan
        latents[digest(["latents", index])] = values
        for name in captions or ("",):
            contexts[_context(index, name)] = torch.randn(context, generator=generator)
    null_key = digest(["context", None])
    contexts[null_key] = torch.randn(context, generator=generator)
    for kind, tensors in (("latents", latents), ("context", contexts)):
        commit_shard(
            cache.store,
            kind=kind,
            shard_id="shard0",
            inputs=[{"key": key, "kind": kind} for key in tensors],
            entries={key: Entry(key, {kind: tensor}, {}) for key, tensor in tensors.items()},
            errors={},
            footer={},
        )
    columns = SNAPSHOT.names[1 : SNAPSHOT.names.index("latents_shape")]
    rows = []
    for index, key in enumerate(latents):
        own = {name: _context(index, name) for name in captions or ("",)}
        named = captions_key(own) if captions else None
        for name, context_key in own.items():
            row = {"dataset": datasets[index] if datasets else "test", "latents_key": key, "context_key": context_key}
            row |= {"source": f"{index}.mp4", "source_hash": digest(["video", index])}
            row |= {"caption_name": name or None, "captions_key": named}
            rows.append(dict.fromkeys(columns) | row)
    snapshot, _ = build_snapshot(
        cache,
        pa.Table.from_pylist(rows, schema=pa.schema([SNAPSHOT.field(name) for name in columns])),
        name="train",
        fingerprints=fingerprints(checkpoint, **parts),
        null_key=null_key,
        negative_keys={},
    )
    return snapshot


def _context(index: int, name: str) -> str:
    return digest(["context", index, name]) if name else digest(["context", index])


def fingerprints(checkpoint: Path, **parts: object) -> dict[str, dict]:
    model = ModelConfig(path=str(checkpoint))
    vae = json.loads((component_folder(model, "vae") / "config.json").read_text())
    made = {
        "latents": {
            "vae": weights_digest(component_folder(model, "vae")),
            "latents_mean": vae["latents_mean"],
            "latents_std": vae["latents_std"],
        },
        "context": {
            "length": CONTEXT[0],
            "projection": weights_digest(component_folder(model, "transformer"), "crossattn_proj"),
        },
    }
    for kind in made.values():
        kind.update({name: value for name, value in parts.items() if name in kind})
    return made


def distance(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """Norm of the difference of two adapters over the norm of the second."""
    assert first.keys() == second.keys()
    flat = [torch.cat([state[name].flatten().double() for name in sorted(state)]) for state in (first, second)]
    return float((flat[0] - flat[1]).norm() / flat[1].norm())
