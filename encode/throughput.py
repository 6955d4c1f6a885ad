"""How fast a job encodes, and what its encoders wait for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from encode.worker import ShardReport


def throughput(reports: Iterable[ShardReport]) -> dict[str, float]:
    """Windows a second over all encoders, and the shares of their time that went into waiting and encoding.

    windows_per_second: of wall clock, from the first shard of latents to the last. decode_wait_share: of the
    encoders' time in those shards, waiting for frames. encoder_busy_share: in the VAE, from frames in host memory to
    latents in host memory; the rest of their time goes into loading it and committing shards. Empty without windows.
    """
    shards = [report for report in reports if report.kind == "latents" and report.entries]
    if not shards:
        return {}
    begin = min(report.began for report in shards)
    end = max(report.began + report.seconds for report in shards)
    seconds = sum(report.seconds for report in shards)
    return {
        "windows_per_second": round(sum(report.entries for report in shards) / (end - begin), 3),
        "decode_wait_share": round(sum(report.wait_seconds for report in shards) / seconds, 4),
        "encoder_busy_share": round(sum(report.encode_seconds for report in shards) / seconds, 4),
    }
