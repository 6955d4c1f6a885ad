"""Running a plan's shard tasks on Ray actors, one a GPU, so that no death of an encoder or a node stops the job.

A dead encoder is replaced and its tasks are tried again. The ledger says at which entry it died: an entry that has
ended `MAX_ATTEMPTS` encoders is quarantined, the others of its shard are encoded. Deaths that come with their node
are nobody's fault. Encoders are fresh actors rather than restarted ones: Ray gives a GPU to a new one only after the
old one has let go of it, and no task is lost in a restart the driver does not see.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import ray
import torch
from ray.exceptions import ActorUnavailableError, RayActorError, RayError, RayTaskError, RuntimeEnvSetupError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from encode.config import EncodeConfig
from encode.executors import Event, num_tasks, start_anywhere
from encode.ray_actor import Encoder, Ledger
from encode.stopping import Stop
from encode.worker import Oversight, ShardReport
from manifests.config import ModelConfig
from manifests.errors import LatentlineError
from manifests.plan import Plan, ShardTask

TASKS_PER_ENCODER = 2
MAX_ATTEMPTS = 3
CONNECT_SECONDS = 20.0
START_SECONDS = 600.0
STALL_SECONDS = 3600.0
STOP_SECONDS = 1.5
_REASON_CHARACTERS = 240
_POLL_SECONDS = 0.5
_LOOK_SECONDS = 30.0
_NODE_SECONDS = 30.0

_log = logging.getLogger(__name__)


def run_ray(
    model: ModelConfig, config: EncodeConfig, plan: Plan, *, index: int, total: int, stop: Stop, event: Event
) -> Iterator[ShardReport]:
    """Run the tasks of worker `index` of `total` on the Ray that `RAY_ADDRESS` names, or on one started here.

    There is an encoder a GPU, or `encode.encoders`; each has at most two tasks at a time, and keeps frames and
    latents to itself. Raises `Preempted` within seconds once `stop` is requested.
    """
    started = not ray.is_initialized()
    if started:
        _join_ray()
        stop.catch()
    driver = _Driver(model, config, plan, index, total, stop, event)
    try:
        yield from driver.run()
    finally:
        driver.close()
        if started:
            ray.shutdown()


def _join_ray() -> None:
    logging.getLogger("ray").setLevel(logging.ERROR)
    address = os.environ.get("RAY_ADDRESS")
    options = {} if address else {"include_dashboard": False}
    try:
        host, colon, port = (address or "").rpartition(":")
        if colon and port.isdecimal() and "/" not in host:
            socket.create_connection((host, int(port)), CONNECT_SECONDS).close()  # ray.init would try for minutes
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
    except (OSError, RuntimeError) as error:
        where = f"no Ray cluster answers at RAY_ADDRESS = {address!r}" if address else "Ray cannot be started here"
        raise LatentlineError(f"{where}: {_reason(error)}; or use --executor local") from error


@dataclass
class _Attempt:
    """A shard task, and what its earlier attempts have taught."""

    task: ShardTask
    refused: dict[str, str] = field(default_factory=dict)
    alone: set[str] = field(default_factory=set)
    deaths: int = 0


@dataclass(eq=False)
class _Slot:
    """An encoder as the driver sees it. waiting: its tasks by their references, the one in work first."""

    name: str
    handle: Any
    preparing: Any
    node: str = ""
    ready: bool = False
    waiting: dict[Any, _Attempt] = field(default_factory=dict)


class _Driver:
    def __init__(
        self, model: ModelConfig, config: EncodeConfig, plan: Plan, index: int, total: int, stop: Stop, event: Event
    ) -> None:
        self._stop, self._event = stop, event
        self._stall_seconds = STALL_SECONDS + 2 * config.decode_timeout
        self._tasks = start_anywhere(plan).tasks(index=index, total=total)
        self._left = num_tasks(plan, index, total)
        self._again: deque[_Attempt] = deque()
        self._deaths: Counter[str] = Counter()
        self._failed_starts = 0
        gpus = int(ray.cluster_resources().get("GPU", 0))
        self._needs = {"CPU": 1, "GPU": 1} if gpus else {"CPU": 1}
        self._ledger = (
            ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Ledger)
            .options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
            )
            .remote()
        )
        self._actor = ray.remote(
            num_cpus=1, num_gpus=1 if gpus else 0, max_restarts=0, max_task_retries=0, concurrency_groups={"control": 1}
        )(Encoder)
        self._prepare = [ray.put(value) for value in (model, config, plan.footer)] + [torch.get_num_threads()]
        self._born = 0
        self._slots: list[_Slot] = []
        self._seats = min(config.encoders or max(1, gpus), self._left)
        self._progress = self._looked = time.monotonic()

    def run(self) -> Iterator[ShardReport]:
        while self._left:
            self._stop.check()
            self._fill()
            references = {slot.preparing: slot for slot in self._slots if not slot.ready}
            references |= {reference: slot for slot in self._slots for reference in slot.waiting}
            done, _ = ray.wait(list(references), num_returns=len(references), timeout=_POLL_SECONDS)
            for reference in done:
                slot = references[reference]
                if slot not in self._slots:
                    continue  # buried by an earlier reference
                if reference == slot.preparing:
                    self._hear_ready(slot)
                elif report := self._hear_report(slot, reference):
                    self._left -= 1
                    yield report
            self._look()

    def close(self) -> None:
        """Let encoders end what they commit, but not wait for it: a commit is whole or is not."""
        if self._stop.requested and ray.is_initialized():
            running = [reference for slot in self._slots for reference in slot.waiting]
            for slot in self._slots:
                slot.handle.stop.remote()
            if running:
                ray.wait(running, num_returns=len(running), timeout=STOP_SECONDS)
        for actor in [*(slot.handle for slot in self._slots), self._ledger]:
            ray.kill(actor)
        self._slots = []

    def _fill(self) -> None:
        """Replace missing encoders while there is work for them, and give each ready one its tasks."""
        busy = sum(len(slot.waiting) for slot in self._slots)
        while len(self._slots) < min(self._seats, self._left):
            self._slots.append(self._start())
        for room in range(TASKS_PER_ENCODER):
            for slot in self._slots:
                if slot.ready and len(slot.waiting) <= room and busy < self._left:
                    attempt = self._again.popleft() if self._again else _Attempt(next(self._tasks))
                    oversight = Oversight(refused=attempt.refused, alone=attempt.alone)
                    if slot.waiting:
                        slot.handle.expect.remote(attempt.task)
                    slot.waiting[slot.handle.run.remote(attempt.task, oversight)] = attempt
                    busy += 1

    def _start(self) -> _Slot:
        self._born += 1
        name = f"encoder-{self._born}"
        handle = self._actor.remote(name, self._ledger)
        return _Slot(name, handle, handle.prepare.remote(*self._prepare))

    def _hear_ready(self, slot: _Slot) -> None:
        try:
            facts = ray.get(slot.preparing)
        except RayTaskError as error:
            raise _typed(error) from None
        except RuntimeEnvSetupError as error:
            raise LatentlineError(f"Ray cannot set up an encoder's environment: {_reason(error)}") from error
        except RayError as error:
            self._failed_starts += 1
            self._bury(slot, error)
            if self._failed_starts >= MAX_ATTEMPTS:
                raise LatentlineError(
                    f"{MAX_ATTEMPTS} encoders in a row died at their start; last: {_reason(error)}"
                ) from error
        else:
            self._failed_starts = 0
            self._progress = time.monotonic()
            slot.ready, slot.node = True, facts["node"]
            self._event("encoder", encoder=slot.name, **facts)

    def _hear_report(self, slot: _Slot, reference: Any) -> ShardReport | None:
        try:
            report = ray.get(reference)
        except RayTaskError as error:
            raise _typed(error) from None
        except RayError as error:
            self._bury(slot, error)
            return None
        del slot.waiting[reference]
        self._progress = time.monotonic()
        return report

    def _bury(self, slot: _Slot, error: RayError | str) -> None:
        """Take a dead or unreachable encoder out, lay its death to what it was at, and take its tasks back."""
        reason = error if isinstance(error, str) else _reason(error)
        self._slots.remove(slot)
        ray.kill(slot.handle)
        attempts = list(slot.waiting.values())
        if attempts and not self._node_died(slot, error):
            shard_id, keys = _ask(self._ledger.last.remote(slot.name)) or ("", ())
            blamed = next((attempt for attempt in attempts if attempt.task.shard_id == shard_id), attempts[0])
            self._blame(blamed, keys if blamed.task.shard_id == shard_id else (), reason)
        self._again.extendleft(reversed(attempts))
        self._progress = time.monotonic()
        shards = [attempt.task.shard_id for attempt in attempts]
        self._event("retry", encoder=slot.name, shards=shards, reason=reason)
        _log.warning("%s died, its %d tasks are tried again: %s", slot.name, len(shards), reason)

    def _node_died(self, slot: _Slot, error: RayError | str) -> bool:
        if isinstance(error, RayActorError) and (error.preempted or "its node has died" in str(error)):
            return True
        # The calls to a lost node fail before Ray misses the node.
        until = time.monotonic() + (_NODE_SECONDS if isinstance(error, ActorUnavailableError) else 0)
        while not any(node["NodeID"] == slot.node and not node["Alive"] for node in ray.nodes()):
            if time.monotonic() >= until:
                return False
            time.sleep(_POLL_SECONDS)
        return True

    def _blame(self, attempt: _Attempt, keys: tuple[str, ...], reason: str) -> None:
        for key in keys:
            self._deaths[key] += 1
        if not keys:
            attempt.deaths += 1
            if attempt.deaths >= MAX_ATTEMPTS:
                shard_id = attempt.task.shard_id
                raise LatentlineError(
                    f"shard {shard_id}: its encoder died {MAX_ATTEMPTS} times between entries; last: {reason}"
                )
        elif max(self._deaths[key] for key in keys) < MAX_ATTEMPTS:
            return
        elif len(keys) > 1:
            attempt.alone |= set(keys)
            for key in keys:
                del self._deaths[key]
        else:
            what = next(row["source"] or "this caption" for row in attempt.task.rows if row["key"] == keys[0])
            attempt.refused[keys[0]] = f"{what}: the encoder died {MAX_ATTEMPTS} times on it; last: {reason}"

    def _look(self) -> None:
        """Notice what sends no message: encoders that cannot be placed, and those that make no progress."""
        now = time.monotonic()
        if not any(slot.ready for slot in self._slots) and now - self._progress > START_SECONDS:
            have, free = ray.cluster_resources(), ray.available_resources()
            needs = ", ".join(f"{count} {name}" for name, count in self._needs.items())
            offers = ", ".join(f"{free.get(name, 0):g} of {have.get(name, 0):g} {name}" for name in self._needs)
            raise LatentlineError(
                f"no encoder could be started on Ray in {START_SECONDS:g} s: each needs {needs} on one node, free are "
                f"{offers}; free or add some, or use --executor local"
            )
        if now - self._looked < _LOOK_SECONDS:
            return
        self._looked = now
        ages = _ask(self._ledger.ages.remote()) or {}
        for slot in list(self._slots):
            if slot.waiting and ages.get(slot.name, 0.0) > self._stall_seconds:
                self._bury(slot, f"it made no progress in {self._stall_seconds:g} s")


def _ask(reference: Any) -> Any:
    """The ledger's answer; None when it is being restarted, and has forgotten anyway."""
    try:
        return ray.get(reference, timeout=_LOOK_SECONDS)
    except RayError:
        return None


def _typed(error: RayTaskError) -> BaseException:
    """A user's error as it was raised, in one line; of a bug, Ray's account with the remote traceback."""
    return error.cause if isinstance(error.cause, LatentlineError) else error


def _reason(error: BaseException) -> str:
    """One line of an error: of Ray's many about a dead actor, the one that says of what."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return next((line for line in lines if line.startswith("The actor is dead because")), lines[0])[:_REASON_CHARACTERS]
