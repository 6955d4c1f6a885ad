"""Previews: a few of a snapshot's latents decoded back to video, beside the source and with the loss in numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from encode.files import digest_of, file_of, name_of, parse_location
from encode.pool import DecodePool
from encode.probe import DecodeError
from encode.window_jobs import decode_job
from infer.video import contact_sheet, write_mp4
from manifests.cache import Cache
from manifests.errors import StaleCacheError
from manifests.family import find_family
from manifests.hints import kind_of
from manifests.image_context import IMAGE
from manifests.places import Location
from manifests.shards import read_tensors
from manifests.snapshot import Snapshot, load_snapshot
from pipeline.recipe import Recipe, validate
from pipeline.report import quiet_libraries, track

_FALLBACK_FPS = 16.0


def cache_preview(url: str, recipe: Recipe | None, *, snapshot: str, count: int, output: Path) -> dict[str, Any]:
    """Decode `count` samples, evenly spread over a snapshot, to `output`: an MP4 each and a contact sheet of all.

    Of its hints a sample shows one a kind.

    recipe: whose model decodes; None takes the recipe the entries were made with. PSNR, in dB over the 8-bit RGB
    values of all frames, is against the window decoded from the source; None where that is gone or has changed.
    Raises `StaleCacheError` if the model's VAE is not the one that made the latents.
    """
    quiet_libraries()
    cache = Cache(url)
    frozen = load_snapshot(cache.store, snapshot)
    chosen = sorted({round(i) for i in np.linspace(0, frozen.num_samples - 1, min(count, frozen.num_samples))})
    rows = [_manifest_row(cache, frozen, index) for index in chosen]
    recipe = recipe or validate(rows[0]["footer"]["recipe"], f"the recipe in {url}")
    family = find_family("encode", recipe.model)
    wanted = family.latents_parts(recipe.model, recipe.encode)
    differing = [name for name, value in wanted.items() if frozen.fingerprints["latents"].get(name) != value]
    if differing:
        raise StaleCacheError(
            f"snapshot {snapshot!r}: its latents were made with another {', '.join(differing)} than model.path "
            f"{recipe.model.path!r} has; give the recipe that encoded them"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    decoder = family.models().VideoDecoder(recipe.model, recipe.encode, device)
    output.mkdir(parents=True, exist_ok=True)
    strips, videos = [], []
    with DecodePool(1, recipe.encode.decode_timeout) as decoders:
        for index, row in track("decoding")(list(zip(chosen, rows, strict=True)), len(rows)):
            frames = decoder.decode(read_tensors(cache.store, frozen.sample(index).latents)["latents"])
            source, fps, problem = _source(row, decoders)
            name = f"{index:06d}-{Path(name_of(parse_location(row['source']))).stem}"
            write_mp4(output / f"{name}.mp4", frames, fps)
            psnr = None if source is None else psnr_of(frames, source)
            label = f"{name}, {f'PSNR {psnr:.1f} dB' if psnr is not None else problem}"
            strips += [(f"latents: {label}", frames)] + ([(f"source: {name}", source)] if source is not None else [])
            for hint, place in _one_a_kind(frozen.sample(index).hints).items():
                shown = decoder.decode(read_tensors(cache.store, place)["hint"])
                write_mp4(output / f"{name}.{kind_of(hint)}.mp4", shown, fps)
                strips.append((f"hint {hint}: {name}", shown))
            facts = {"video": str(output / f"{name}.mp4"), "source": row["source"], "start": row["start"]}
            videos.append({**facts, "psnr": psnr, "problem": problem})
    contact_sheet(output / "contact-sheet.png", strips)
    known = [video["psnr"] for video in videos if video["psnr"] is not None]
    return {
        "cache": url,
        "snapshot": frozen.hash,
        "contact_sheet": str(output / "contact-sheet.png"),
        "mean_psnr": sum(known) / len(known) if known else None,
        "videos": videos,
    }


def _one_a_kind(hints: Mapping[str, Location]) -> dict[str, Location]:
    """The first variant of each kind of hint."""
    first: dict[str, str] = {}
    for name in sorted(hints.keys() - {IMAGE}):
        first.setdefault(kind_of(name), name)
    return {name: hints[name] for name in first.values()}


def psnr_of(frames: np.ndarray, other: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two uint8 arrays of one shape, dB; infinite if they are equal."""
    error = np.mean((frames.astype(np.float64) - other.astype(np.float64)) ** 2)
    return math.inf if error == 0 else float(10 * np.log10(255.0**2 / error))


def _manifest_row(cache: Cache, snapshot: Snapshot, index: int) -> dict[str, Any]:
    """The manifest's row of a sample's latents, and the manifest's footer."""
    row = snapshot.table.slice(int(snapshot.first_rows[index]), 1).to_pylist()[0]
    shard_id = row["latents_shard"].rsplit("/", 1)[1].split(".")[0]
    table, footer = cache.manifest("latents", shard_id)
    [found] = [item for item in table.to_pylist() if item["key"] == row["latents_key"]]
    return {**found, "footer": footer}


def _source(row: dict[str, Any], decoders: DecodePool) -> tuple[np.ndarray | None, float, str | None]:
    """(frames of the window in the source, frames a second, why there are none)."""
    video = parse_location(row["source"])
    fps = row["fps"] or _FALLBACK_FPS
    if not file_of(video).is_file():
        return None, fps, "the source is gone"
    try:
        same = digest_of(video) == row["source_hash"]
    except OSError:
        same = False
    if not same:
        return None, fps, "the source has changed"
    resize = row["footer"]["recipe"].get("encode", {}).get("resize", "stretch")
    job = decode_job([row | {"source": str(video)}], resize)
    try:
        fps = row["fps"] or decoders.probe(video).result().fps
        return np.array(decoders.submit(job).result()), fps, None
    except DecodeError as error:
        return None, fps, str(error)
