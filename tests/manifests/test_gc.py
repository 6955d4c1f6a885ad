import os
import time

import pytest

from manifests.gc import ABANDONED, SET_ASIDE, SPENT, STAGED, find_garbage, remove
from manifests.plan import adopt_plan, missing_entries
from manifests.repair import repair
from manifests.verify import verify
from tests.manifests.filled import PARTS, commit, fill, flip_bit, freeze, make_cache, samples_table, wanted_table

VIDEOS, STARTS = ["a", "b"], [0, 8]
DAY = 24 * 3600.0


@pytest.fixture
def cache(tmp_path):
    return make_cache(tmp_path / "cache", VIDEOS, STARTS)


def age(cache, *patterns: str) -> None:
    """Make files look two days old."""
    for pattern in patterns or ("*",):
        for path in cache.store.root.rglob(pattern):
            os.utime(path, (time.time() - 2 * DAY,) * 2)


def whys(cache, older_than: float = DAY) -> list[str]:
    return sorted({item.why for item in find_garbage(cache, older_than=older_than)})


def test_a_cache_in_use_has_no_garbage_but_its_finished_plan(cache):
    age(cache)
    garbage = find_garbage(cache, older_than=DAY)
    assert [item.why for item in garbage] == [SPENT]
    remove(cache, garbage)
    assert verify(cache).findings == ()
    assert not len(missing_entries(cache, wanted_table(VIDEOS, STARTS)))


def test_a_plan_with_something_left_to_do_stays(cache):
    more = wanted_table([*VIDEOS, "c"], STARTS)
    adopt_plan(cache, more, missing_entries(cache, more), {"latents": 2, "context": 2}, {"fingerprints": PARTS})
    age(cache)
    assert len(find_garbage(cache, older_than=DAY)) == 1
    fill(cache, more)
    assert len(find_garbage(cache, older_than=DAY)) == 2


def test_the_array_size_of_a_job_goes_with_its_last_plan(cache):
    [plan] = (cache.store.root / "plans").glob("*.parquet")
    own = f"{plan.stem.rpartition('-')[0]}.array.json"
    more = wanted_table([*VIDEOS, "c"], STARTS)
    unfinished = adopt_plan(
        cache, more, missing_entries(cache, more), {"latents": 2, "context": 2}, {"fingerprints": PARTS}
    )
    others = [f"{unfinished.plan_id.rpartition('-')[0]}.array.json", f"{'7' * 40}.array.json"]
    for name in (own, *others):
        cache.store.write(f"plans/{name}", b'{"tasks": 4}')
    age(cache)
    found = {item.path for item in find_garbage(cache, older_than=DAY)}
    assert found == {f"plans/{plan.name}", f"plans/{own}", f"plans/{others[1]}"}


def test_abandoned_tars_and_unfinished_writes_go_once_they_are_old(cache):
    folder = cache.store.root / "entries/latents"
    (folder / f"{'9' * 40}.abc.tar").write_bytes(b"x" * 700)
    (folder / f"{'8' * 40}.abc.tar#1").write_bytes(b"x" * 300)
    assert whys(cache) == []
    age(cache, "*abc*")
    garbage = [item for item in find_garbage(cache, older_than=DAY) if item.why in (ABANDONED, STAGED)]
    assert sorted(item.size for item in garbage) == [300, 700]
    assert all(1.9 * DAY < item.age < 2.1 * DAY for item in garbage)
    remove(cache, garbage)
    assert not list(folder.glob("*abc*"))
    assert verify(cache).findings == ()


def test_a_tar_that_only_a_snapshot_names_stays(cache):
    row = cache.rows("latents").to_pylist()[0]
    flip_bit(cache.store.root / row["shard"], row["offset"] + 40)
    repair(cache, verify(cache).findings)
    age(cache)
    assert row["shard"] not in [item.path for item in find_garbage(cache, older_than=DAY)]
    fill(cache, wanted_table(VIDEOS, STARTS))
    freeze(cache, samples_table(VIDEOS, STARTS))
    garbage = find_garbage(cache, older_than=DAY)
    assert [item.why for item in garbage if item.path == row["shard"]] == [ABANDONED]
    assert SET_ASIDE in [item.why for item in garbage]
    remove(cache, garbage)
    assert verify(cache).findings == ()


def test_a_tar_being_written_now_stays_however_short_the_age_asked_for(cache):
    rows = wanted_table(["z"]).to_pylist()[:1]

    class Looking(type(cache.store)):
        def write_if_absent(self, path, data):
            seen.extend(item.path for item in find_garbage(cache, older_than=60.0))
            return super().write_if_absent(path, data)

    seen = []
    store, cache.store = cache.store, Looking(cache.url)
    commit(cache, "5" * 40, rows)
    cache.store = store
    assert seen == []
