import threading

import pytest

from manifests.cache import Cache
from manifests.compact import compact
from manifests.plan import adopt_plan, missing_entries
from manifests.schema import KINDS, compacted_path
from manifests.snapshot import load_snapshot
from manifests.tables import table_bytes
from tests.manifests.filled import PARTS, commit, fill, freeze, latents_row, make_cache, samples_table, wanted_table

VIDEOS, STARTS = [f"{number:02d}" for number in range(8)], [0, 8]
WANTED = wanted_table(VIDEOS, STARTS)


@pytest.fixture
def cache(tmp_path):
    return make_cache(tmp_path / "cache", VIDEOS, STARTS)


def contents(cache: Cache):
    rows = {kind: cache.rows(kind).sort_by("key").to_pylist() for kind in KINDS}
    index = {kind: cache.index(kind).sort_by("key").to_pylist() for kind in KINDS}
    shards = {kind: cache.shard_ids(kind).to_pylist() for kind in KINDS}
    return rows, index, shards, {kind: cache.summary(kind) for kind in KINDS}


def hide_manifests(cache: Cache) -> None:
    """Take the manifests themselves away, to see who still needs them."""
    for path in cache.store.root.glob("entries/*/*.parquet"):
        path.unlink()


def test_a_compacted_cache_says_the_same(cache):
    before = contents(cache)
    assert compact(cache, min_shards=1) == {"latents": 8, "context": 5}
    assert contents(cache) == before
    assert compact(cache, min_shards=1) == {"latents": 0, "context": 0}


def test_a_compacted_cache_opens_without_its_manifests(cache):
    before = contents(cache)
    compact(cache, min_shards=1)
    hide_manifests(cache)
    assert contents(Cache(cache.url)) == before
    hash_before = load_snapshot(cache.store, "train").hash
    assert freeze(Cache(cache.url), samples_table(VIDEOS, STARTS))[0].hash == hash_before


def test_few_shards_are_left_alone(cache):
    assert compact(cache) == {"latents": 0, "context": 0}
    assert cache.store.list("compacted") == []


def test_what_is_committed_later_is_seen_and_compacted_later(cache):
    compact(cache, min_shards=1)
    more = wanted_table([*VIDEOS, "new"], STARTS)
    assert len(missing_entries(cache, more)) == 3
    fill(cache, more)
    assert not len(missing_entries(cache, more))
    assert compact(cache, min_shards=1) == {"latents": 1, "context": 1}
    hide_manifests(cache)
    assert not len(missing_entries(Cache(cache.url), more))


def test_a_plan_in_progress_is_compacted_in_parts(tmp_path):
    cache = Cache(str(tmp_path / "cache"), create=True)
    sizes = {"latents": 2, "context": 2}
    plan = adopt_plan(cache, WANTED, missing_entries(cache, WANTED), sizes, {"fingerprints": PARTS})
    for number, task in enumerate(plan.tasks()):
        commit(cache, task.shard_id, task.rows)
        if number % 4 == 3:
            compact(cache, min_shards=1)
            rest = adopt_plan(cache, WANTED, missing_entries(cache, WANTED), sizes, {"fingerprints": PARTS})
            assert len(list(rest.tasks())) == 12 - number
    compact(cache, min_shards=1)
    before = contents(cache)
    hide_manifests(cache)
    assert contents(cache) == before


def test_shards_of_no_known_plan_are_always_seen(cache):
    commit(cache, "f" * 40, [latents_row("foreign")])
    commit(cache, "0" * 40, [latents_row("other")])
    compact(cache, min_shards=1)
    index = cache.index("latents", ["key"])["key"].to_pylist()
    assert {latents_row("foreign")["key"], latents_row("other")["key"]} <= set(index)


def test_compactions_at_the_same_time_count_no_shard_twice(cache):
    before = contents(cache)
    barrier = threading.Barrier(3)

    def run() -> None:
        mine = Cache(cache.url)
        barrier.wait()
        compact(mine, min_shards=1)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert contents(cache) == before


def test_overlapping_parts_count_no_shard_twice(cache):
    before = contents(cache)
    compact(cache, min_shards=1)
    [whole] = cache.store.list("compacted/latents")
    part = cache.shard_ids("latents").to_pylist()[:3]
    footer = {"format": 1, "tag": part[0][:12], "plan_shards": 8}
    cache.store.write(
        compacted_path("latents", part[0][:12], "0" * 8), table_bytes(cache.read_manifests("latents", part), footer)
    )
    assert len(cache.store.list("compacted/latents")) == 2
    assert contents(cache) == before
    cache.store.delete(whole.path)
    assert contents(cache) == before
