"""Ranks that make videos: which of them work on one together, and how they agree on what is next.

A team makes one video at a time. In a team of one each rank makes videos of its own; larger teams halve the work of
guidance (one rank for the prompt, one for the negative prompt), share out a video's tokens, or both. Teams take the
next request from one counter, so that a slow one holds up nobody.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from manifests.errors import UsageError
from train.context_parallel import Context
from train.parallel import Ranks

# A member waits while its leader decodes and writes; whoever started the ranks ends those that wait for a dead one.
_TIMEOUT = timedelta(hours=2)


@dataclass(frozen=True)
class Layout:
    """teams: how many work side by side. cfg: 2 where a team halves guidance. context: ranks that share tokens."""

    teams: int
    cfg: int
    context: int

    @property
    def team_size(self) -> int:
        return self.cfg * self.context


def choose_layout(parallel: str, world: int, *, videos: int, guided: bool, tokens: Sequence[int]) -> Layout:
    """How `world` ranks make `videos` videos.

    guided: all of them use guidance. tokens: the token counts of one frame window of each. `auto`: as many teams as
    there are videos to make, if that divides the ranks; teams of several halve guidance first, then share tokens.
    Raises UsageError where the ranks cannot be laid out as `parallel` says.
    """
    if parallel == "cfg":
        if world % 2 or not guided:
            what = f"{world} ranks are not pairs" if world % 2 else "a video without guidance has no second half"
            raise UsageError(f"infer.parallel = cfg: {what}; use an even number with guidance above 1, or context")
        return Layout(world // 2, 2, 1)
    if parallel == "context":
        if odd := [count for count in tokens if count % world]:
            raise UsageError(f"infer.parallel = context: {world} ranks do not divide a video's {odd[0]:,} tokens")
        return Layout(1, 1, world)
    if parallel == "auto":
        most = min(world, max(1, videos))
        for teams in [*range(most, 0, -1), *range(most + 1, world)]:
            size = world // teams
            cfg = 2 if guided and size % 2 == 0 else 1
            if world % teams == 0 and not any(count % (size // cfg) for count in tokens):
                return Layout(teams, cfg, size // cfg)
    return Layout(world, 1, 1)


@dataclass(frozen=True)
class Team:
    """This rank's team. store: of all ranks, None where there is one rank. guidance, context: the ranks to share
    the halves of guidance and the tokens with, None if this rank has them to itself."""

    ranks: Ranks
    layout: Layout
    store: Any
    guidance: Context | None = None
    context: Context | None = None

    @property
    def index(self) -> int:
        return self.ranks.rank // self.layout.team_size

    @property
    def is_leader(self) -> bool:
        return self.ranks.rank % self.layout.team_size == 0

    def turns(self, count: int) -> Iterator[int]:
        """The indices below `count` that are this team's to do, as its leader gets to them."""
        turn = 0
        while True:
            index = self._next(turn)
            if index >= count:
                return
            yield index
            turn += 1

    def _next(self, turn: int) -> int:
        if self.store is None:
            return turn
        if not self.is_leader:
            return int(self.store.get(f"team{self.index}/{turn}"))
        index = self.store.add("next", 1) - 1
        if self.layout.team_size > 1:
            self.store.set(f"team{self.index}/{turn}", str(index))
        return index

    def share(self, name: str, value: bytes | None = None) -> bytes:
        """The leader's bytes under a name that is used once, on every rank of the team."""
        if self.store is None or self.layout.team_size == 1:
            assert value is not None
            return value
        key = f"team{self.index}/{name}"
        if not self.is_leader:
            return bytes(self.store.get(key))
        assert value is not None
        self.store.set(key, value)
        return value

    def report(self, index: int, record: dict[str, Any]) -> None:
        """Tell rank 0 about a request that is done."""
        if self.store is not None:
            self.store.set(f"record/{index}", json.dumps(record))
            self.store.add("done", 1)

    def num_done(self) -> int:
        """Requests that the teams reported so far."""
        return 0 if self.store is None else int(self.store.add("done", 0))

    def reported(self, indices: Sequence[int], *, wait: bool) -> dict[int, dict[str, Any]]:
        """What the teams reported about these requests: about all of them with `wait`, else about those done."""
        if self.store is None:
            return {}
        names = {index: f"record/{index}" for index in indices}
        return {
            index: json.loads(self.store.get(name)) for index, name in names.items() if wait or self.store.check([name])
        }


def from_rank_0(ranks: Ranks, store: Any, name: str, value: Any = None) -> Any:
    """Rank 0's value, plain JSON, on every rank."""
    if store is None:
        return value
    if ranks.is_main:
        store.set(name, json.dumps(value))
    return json.loads(store.get(name))


def open_store(ranks: Ranks) -> Any:
    """The key-value store that the ranks met through, None for one rank."""
    if ranks.world == 1:
        return None
    store, _, _ = next(dist.rendezvous("env://", ranks.rank, ranks.world))
    store.set_timeout(_TIMEOUT)
    return dist.PrefixStore("infer", store)


@contextmanager
def in_team(ranks: Ranks, layout: Layout, store: Any) -> Iterator[Team]:
    """Join this rank's team; all ranks enter. Ranks are in order of team, half of guidance, part of the tokens."""
    guidance = context = None
    for first in range(0, ranks.world, layout.team_size):
        team = list(range(first, first + layout.team_size))
        halves = [team[part :: layout.context] for part in range(layout.context)] if layout.cfg > 1 else []
        parts = [team[half : half + layout.context] for half in range(0, layout.team_size, layout.context)]
        guidance = _joined(ranks, halves) or guidance
        context = _joined(ranks, parts if layout.context > 1 else []) or context
    yield Team(ranks, layout, store, guidance, context)


def _joined(ranks: Ranks, groups: Sequence[Sequence[int]]) -> Context | None:
    """Every rank takes part in making every group."""
    own = None
    for members in groups:
        group = dist.new_group(list(members), timeout=_TIMEOUT)
        if ranks.rank in members:
            own = Context(members.index(ranks.rank), len(members), group.group_name)
    return own
