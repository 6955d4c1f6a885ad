"""A cache through any sequence of what happens to caches: nothing is lost, nothing counts twice, damage is found."""

import shutil
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from manifests.cache import Cache
from manifests.compact import compact
from manifests.gc import find_garbage, remove
from manifests.places import Location
from manifests.plan import adopt_plan, missing_entries
from manifests.repair import repair
from manifests.schema import KINDS, MANIFEST
from manifests.shards import read_payload
from manifests.snapshot import load_snapshot
from manifests.tables import read_table
from manifests.verify import verify
from tests.manifests.filled import PARTS, commit, fill, flip_bit, freeze, samples_table, wanted_table

STARTS = [0, 8]
SIZES = {"latents": 3, "context": 2}


class Lifecycle(RuleBasedStateMachine):
    """Several drivers and a user at work on one cache; `videos` is what the user wants by now."""

    @initialize()
    def begin(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.cache = Cache(str(self.folder / "cache"), create=True)
        self.videos: list[str] = ["v0"]
        self.expected: set[str] = set()
        self.frozen: dict[str, list[str]] = {}

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            self.finish()
            shutil.rmtree(self.folder)

    @property
    def wanted(self):
        return wanted_table(self.videos, STARTS)

    def locations(self) -> list[dict]:
        return [row for kind in KINDS for row in self.cache.index(kind).to_pylist()]

    @rule(count=st.integers(1, 3))
    def want_more(self, count: int) -> None:
        self.videos += [f"v{len(self.videos) + i}" for i in range(count)]

    @rule(tasks=st.integers(0, 4), skip=st.integers(0, 2))
    def encode_some(self, tasks: int, skip: int) -> None:
        """A driver that is killed after some shards, or a few array tasks of many."""
        missing = missing_entries(self.cache, self.wanted)
        if len(missing):
            plan = adopt_plan(self.cache, self.wanted, missing, SIZES, {"fingerprints": PARTS})
            for task in list(plan.tasks())[skip : skip + tasks]:
                commit(self.cache, task.shard_id, task.rows)
                self.expected |= {row["key"] for row in task.rows}

    @rule()
    def encode_twice(self) -> None:
        """Two drivers with one plan: the second loses every race."""
        missing = missing_entries(self.cache, self.wanted)
        if len(missing):
            plan = adopt_plan(self.cache, self.wanted, missing, SIZES, {"fingerprints": PARTS})
            for task in plan.tasks():
                assert commit(self.cache, task.shard_id, task.rows)
                assert not commit(self.cache, task.shard_id, task.rows)
                self.expected |= {row["key"] for row in task.rows}

    @rule()
    def abandon(self) -> None:
        """A worker killed before its commit."""
        path = self.cache.store.root / "entries/latents" / f"{'e' * 40}.{len(self.expected):04d}.tar"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half a shard")

    @rule()
    def compact(self) -> None:
        compact(self.cache, min_shards=1)

    @rule()
    def collect_garbage(self) -> None:
        remove(self.cache, find_garbage(self.cache, older_than=-1))

    @rule(data=st.data())
    def rot_and_repair(self, data) -> None:
        rows = self.locations()
        if rows:
            row = data.draw(st.sampled_from(rows))
            path = self.cache.store.root / row["shard"]
            flip_bit(path, row["offset"] + data.draw(st.integers(0, row["size"] - 1)))
            self.repair(row["shard"].split(".")[0])

    @rule(data=st.data())
    def tear_a_manifest_and_repair(self, data) -> None:
        paths = sorted(self.cache.store.root.glob("entries/*/*.parquet"))
        if paths:
            path = data.draw(st.sampled_from(paths))
            whole = path.read_bytes()
            path.write_bytes(whole[: data.draw(st.integers(0, 200))])
            self.repair(f"entries/{path.parent.name}/{path.stem}", whole)

    def repair(self, shard: str, manifest: bytes | None = None) -> None:
        """Repair the one damaged shard; `manifest` is what its manifest was, if that is what was damaged."""
        manifest = manifest or self.cache.store.read(f"{shard}.parquet")
        table, _ = read_table(manifest, MANIFEST, shard)
        found = verify(self.cache)
        assert any(shard in finding.where for finding in found.damaged)
        done = repair(self.cache, found.findings)
        assert len(done.set_aside) == 1
        self.expected -= set(table["key"].to_pylist())

    @rule()
    def finish(self) -> None:
        """What `encode` does when nothing stops it."""
        fill(self.cache, self.wanted, entries_per_shard=3)
        self.expected |= set(self.wanted["key"].to_pylist())
        snapshot, counts = freeze(self.cache, samples_table(self.videos, STARTS), name=f"of{len(self.videos)}")
        assert counts.samples == len(self.videos) * len(STARTS)
        ids = snapshot.table["sample_id"].to_pylist()
        assert self.frozen.setdefault(f"of{len(self.videos)}", ids) == ids
        for row in self.locations():
            read_payload(self.cache.store, Location(row["shard"], row["offset"], row["size"], row["checksum"]))
        named = {finding.where for finding in verify(self.cache).damaged}
        assert all(where.startswith("snapshots/") for where in named)
        repair(self.cache, verify(self.cache).findings)
        for name, before in self.frozen.items():
            frozen = load_snapshot(self.cache.store, name)
            assert frozen.table["sample_id"].to_pylist() == before
            for index in range(frozen.num_samples):
                read_payload(self.cache.store, frozen.sample(index).latents)
        assert verify(self.cache).damaged == ()

    @invariant()
    def nothing_is_lost_and_nothing_counts_twice(self) -> None:
        if hasattr(self, "cache"):
            keys = [row["key"] for row in self.locations()]
            assert len(keys) == len(set(keys))
            assert set(keys) == self.expected


TestLifecycle = Lifecycle.TestCase
TestLifecycle.settings = settings(max_examples=15, stateful_step_count=12, suppress_health_check=list(HealthCheck))
