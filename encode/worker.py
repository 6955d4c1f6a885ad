"""The encoder: a shard task in, a committed manifest out. The same function under every executor.

A worker owns one device and a pool of decoder processes. It holds one model at a time, the text encoder or the
VAE, because a plan's context tasks all come before its latents tasks.
"""

from __future__ import annotations

import contextlib
import logging
import platform
import time
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from encode.config import EncodeConfig
from encode.decode import DecodeJob
from encode.files import file_of, parse_location
from encode.pool import DecodePool, DecoderLost
from encode.probe import DecodeError
from encode.window_jobs import by_window, decode_job, facts_of, is_window
from manifests.commit import commit_shard
from manifests.config import ModelConfig
from manifests.errors import CorruptError, LatentlineError
from manifests.family import find_family
from manifests.image_context import read_image_context
from manifests.plan import ShardTask
from manifests.schema import Kind, manifest_path
from manifests.shards import Entry
from manifests.store import Store
from manifests.values import fault_of

Decoded = Generator[tuple[DecodeJob, npt.NDArray[np.uint8] | DecodeError], None, None]

_log = logging.getLogger(__name__)

_COMMIT_ATTEMPTS = 3
_PACKAGES = ("torch", "diffusers", "transformers", "av", "safetensors", "webdataset")


@dataclass(frozen=True)
class ShardReport:
    """What became of a shard task.

    rows: of the task. began: seconds since the epoch. entries: encoded. errors: (video or caption, error) of those
    quarantined. bytes: of the entries' tensors. seconds: wall clock; of these, wait_seconds waiting for decoded
    frames and encode_seconds in the encoder. truncated: captions longer than `encode.text_length`. committed: False
    if another worker had committed the shard first; with no entries and no errors, before this one had begun.
    """

    shard_id: str
    kind: str
    rows: int
    began: float
    entries: int = 0
    errors: tuple[tuple[str, str], ...] = ()
    bytes: int = 0
    seconds: float = 0.0
    wait_seconds: float = 0.0
    encode_seconds: float = 0.0
    truncated: int = 0
    committed: bool = False

    @property
    def quarantined(self) -> int:
        return len(self.errors)


@dataclass(frozen=True, kw_only=True)
class Oversight:
    """How a caller takes part in a task.

    check: called often, and at least every half second while waiting for frames; may raise to abandon the task.
    starting: told the keys about to be encoded, and nothing when that is done. refused: errors by key, of rows
    to quarantine without a try. alone: keys of captions to encode in a batch of their own.
    """

    check: Callable[[], None] = lambda: None
    starting: Callable[[Sequence[str]], None] = lambda keys: None
    refused: Mapping[str, str] = field(default_factory=dict)
    alone: Collection[str] = ()


class ShardWorker:
    """Encodes shard tasks on one device.

    device: None means CUDA if there is one, else the CPU. footer: what every manifest records of the job; the
    kind's fingerprint, package versions and the device are added to it.
    """

    def __init__(
        self, model: ModelConfig, config: EncodeConfig, footer: Mapping[str, Any], device: str | None = None
    ) -> None:
        self._model = model
        self._config = config
        self._footer = dict(footer)
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._family: ModuleType = find_family("encode", model)
        self._store = Store(config.cache)
        self._encoder: Any = None
        self._pool: DecodePool | None = None
        self._expected: ShardTask | None = None
        self._ahead: tuple[list[str], Decoded] | None = None

    def expect(self, task: ShardTask) -> None:
        """Say which task follows the one in work: its first windows are decoded while that one is committed.

        May be called from another thread. No promise: any task may follow.
        """
        self._expected = task

    def run(self, task: ShardTask, oversight: Oversight = Oversight()) -> ShardReport:
        """Encode a task and commit it, unless that is done already.

        A row that cannot be decoded is quarantined; other errors, and what `oversight` raises, abandon the task.
        """
        begin, began = time.monotonic(), time.time()
        if self._store.exists(manifest_path(task.kind, task.shard_id)):
            return ShardReport(task.shard_id, task.kind, len(task.rows), began)
        errors = {row["key"]: row["error"] or oversight.refused.get(row["key"]) for row in task.rows}
        work = _Work(oversight, {key: error for key, error in errors.items() if error})
        try:
            if task.kind == "context":
                self._encode_contexts(task.rows, work)
            else:
                self._encode_videos(task.kind, task.rows, work)
        except torch.OutOfMemoryError as error:
            size = "encode.text_batch" if task.kind == "context" else "encode.height, encode.width or encode.num_frames"
            raise LatentlineError(f"{self._device}: not enough memory to encode {task.kind}; lower {size}") from error
        work.refuse_faulty(task.kind)
        won = self._commit(task, work, begin)
        return ShardReport(
            shard_id=task.shard_id,
            kind=task.kind,
            rows=len(task.rows),
            began=began,
            entries=len(work.entries),
            errors=tuple((_name(row), work.errors[row["key"]]) for row in task.rows if row["key"] in work.errors),
            bytes=sum(tensor.nbytes for entry in work.entries.values() for tensor in entry.tensors.values()),
            seconds=time.monotonic() - begin,
            wait_seconds=work.wait_seconds,
            encode_seconds=work.encode_seconds,
            truncated=work.truncated,
            committed=won,
        )

    def close(self) -> None:
        """Stop the decoder processes."""
        if self._pool is not None:
            self._pool.close()
            self._pool = self._ahead = None

    def _encode_videos(self, kind: Kind, rows: Sequence[dict[str, Any]], work: _Work) -> None:
        """Latents or hints: windows of videos through the VAE."""
        if self._pool is None:
            self._pool = DecodePool(self._config.num_decoders, self._config.decode_timeout)
        pool, check = self._pool, work.oversight.check
        waited = pool.wait_seconds
        rows = [row for row in rows if row["key"] not in work.errors]
        self._read_image_contexts([row for row in rows if not is_window(row)], work)
        rows = [row for row in rows if is_window(row)]
        with contextlib.closing(self._decode(pool, rows, check)) as decoded:
            # While the first windows are decoded.
            encoder = self._load("VideoEncoder" if kind == "latents" else "HintEncoder")
            for group, (job, frames) in zip(by_window(rows), decoded, strict=True):
                if isinstance(frames, DecoderLost):
                    # A busy machine can kill or slow a decoder too: once more before the video is blamed.
                    [(_, frames)] = pool.imap([job], check=check)
                if isinstance(frames, DecodeError):
                    work.errors |= {row["key"]: str(frames) for row in group}
                    continue
                for row, own_THWC in zip(group, np.split(frames, len(group)), strict=True):
                    with work.encoding(row["key"]):
                        latents_CTHW = encoder.encode(own_THWC)
                    work.entries[row["key"]] = Entry(row["key"], {kind: latents_CTHW}, facts_of(row))
        work.wait_seconds = pool.wait_seconds - waited
        expected, self._expected = self._expected, None
        if expected is not None and expected.kind != "context":
            following = [row for row in expected.rows if is_window(row) and not row["error"]]
            self._ahead = [row["key"] for row in following], pool.imap(self._jobs(following), check=check)

    def _read_image_contexts(self, rows: Sequence[dict[str, Any]], work: _Work) -> None:
        """Given embeddings become entries as they are, in `encode.dtype`."""
        for row in rows:
            try:
                values_MW = read_image_context(file_of(parse_location(row["source"])))
            except LatentlineError as error:
                work.errors[row["key"]] = str(error)
                continue
            dtype = getattr(torch, self._config.dtype)
            work.entries[row["key"]] = Entry(row["key"], {"hint": values_MW.to(dtype)}, facts_of(row))

    def _decode(self, pool: DecodePool, rows: Sequence[dict[str, Any]], check: Callable[[], None]) -> Decoded:
        """Frames of rows, in order; goes on with what was begun ahead if it was for these rows."""
        if self._ahead is not None:
            (keys, decoded), self._ahead = self._ahead, None
            if keys == [row["key"] for row in rows]:
                return decoded
            decoded.close()
        return pool.imap(self._jobs(rows), check=check)

    def _jobs(self, rows: Sequence[dict[str, Any]]) -> Iterator[DecodeJob]:
        return (decode_job(group, self._config.resize) for group in by_window(rows))

    def _encode_contexts(self, rows: Sequence[dict[str, Any]], work: _Work) -> None:
        encoder = self._load("TextEncoder")
        captions = [row for row in rows if row["caption"] is not None]
        for row in rows:
            if row["caption"] is None and row["key"] not in work.errors:
                with work.encoding(row["key"]):
                    null_LD = encoder.null()
                work.entries[row["key"]] = Entry(row["key"], {"context": null_LD}, {"caption": None})
        for batch in _batches(captions, self._config.text_batch, work):
            with work.encoding(*(row["key"] for row in batch)):
                contexts_BLD = encoder.encode([row["caption"] for row in batch])
            for row, context_LD in zip(batch, contexts_BLD, strict=True):
                tokens = encoder.num_tokens(row["caption"])
                work.truncated += tokens > self._config.text_length
                facts = {"caption": row["caption"], "tokens": tokens}
                work.entries[row["key"]] = Entry(row["key"], {"context": context_LD.clone()}, facts)

    def _commit(self, task: ShardTask, work: _Work, begin: float) -> bool:
        """Commit what was encoded, writing anew what does not read back as it was written."""
        seconds = {"seconds": round(time.monotonic() - begin, 3), "encode_seconds": round(work.encode_seconds, 3)}
        for left in reversed(range(_COMMIT_ATTEMPTS)):
            work.oversight.check()
            try:
                return commit_shard(
                    self._store,
                    kind=task.kind,
                    shard_id=task.shard_id,
                    inputs=task.rows,
                    entries=work.entries,
                    errors=work.errors,
                    footer=self._footer_of(task.kind) | seconds,
                )
            except CorruptError as error:
                if not left:
                    raise
                _log.warning("written again: %s", error)
        raise AssertionError("unreachable")

    def _load(self, name: str) -> Any:
        if type(self._encoder).__name__ != name:
            self._encoder = None
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
            self._encoder = getattr(self._family.models(), name)(self._model, self._config, self._device)
        return self._encoder

    def _footer_of(self, kind: str) -> dict[str, Any]:
        parts = self._footer["fingerprints"][kind]
        device = torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else platform.processor()
        packages = {name: version(name) for name in _PACKAGES}
        rest = {name: value for name, value in self._footer.items() if name != "fingerprints"}
        return {"fingerprint": parts, "packages": packages, "device": device, **rest}


@dataclass
class _Work:
    """What a task has come to: entries and errors by key, and where the time went."""

    oversight: Oversight
    errors: dict[str, str]
    entries: dict[str, Entry] = field(default_factory=dict)
    wait_seconds: float = 0.0
    encode_seconds: float = 0.0
    truncated: int = 0

    @contextlib.contextmanager
    def encoding(self, *keys: str) -> Iterator[None]:
        self.oversight.check()
        self.oversight.starting(keys)
        begin = time.monotonic()
        yield
        self.encode_seconds += time.monotonic() - begin
        self.oversight.starting(())

    def refuse_faulty(self, kind: Kind) -> None:
        """Quarantine entries whose values no model makes on purpose."""
        for key, entry in list(self.entries.items()):
            fault = fault_of(kind, entry.tensors[kind])
            if fault:
                self.errors[key] = fault
                del self.entries[key]


def _batches(captions: list[dict[str, Any]], size: int, work: _Work) -> Iterator[list[dict[str, Any]]]:
    """Batches as they are cut without oversight, since a batch may round otherwise than its parts."""
    alone = work.oversight.alone
    for begin in range(0, len(captions), size):
        batch = [row for row in captions[begin : begin + size] if row["key"] not in work.errors]
        together = [row for row in batch if row["key"] not in alone]
        if together:
            yield together
        yield from ([row] for row in batch if row["key"] in alone)


def _name(row: Mapping[str, Any]) -> str:
    return row["source"] or f"caption {row['caption']!r}"
