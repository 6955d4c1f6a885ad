import pyarrow as pa
import pytest

from manifests.cache import Cache
from manifests.errors import CorruptError, LatentlineError, UsageError
from manifests.keys import digest
from manifests.schema import SNAPSHOT_IDENTITY
from manifests.shards import read_payload
from manifests.snapshot import load_snapshot
from tests.manifests.filled import commit, fill, freeze, make_cache, samples_table, wanted_table

VIDEOS, STARTS = ["a", "b", "c", "d"], [0, 8]


def test_a_snapshot_is_named_by_its_samples_not_by_where_or_how_they_lie(tmp_path):
    one = make_cache(tmp_path / "one", VIDEOS, STARTS)
    two = Cache(str(tmp_path / "elsewhere" / "two"), create=True)
    fill(two, wanted_table(["c"], STARTS), entries_per_shard=1)
    fill(two, wanted_table(list(reversed(VIDEOS)), STARTS), entries_per_shard=5)
    backwards = samples_table(list(reversed(VIDEOS)), list(reversed(STARTS)))
    snapshot, _ = freeze(two, backwards)
    assert snapshot.hash == load_snapshot(one.store, "train").hash
    shards = [load_snapshot(cache.store, "train").table["latents_shard"].to_pylist() for cache in (one, two)]
    assert shards[0] != shards[1]


@pytest.mark.parametrize("change", ["another dataset", "one sample less", "another caption"])
def test_other_samples_are_another_snapshot(tmp_path, change):
    cache = make_cache(tmp_path / "cache", VIDEOS, STARTS)
    before = load_snapshot(cache.store, "train").hash
    samples = samples_table(VIDEOS, STARTS)
    if change == "another dataset":
        samples = samples_table(VIDEOS, STARTS, dataset="other")
    elif change == "one sample less":
        samples = samples.slice(1)
    else:
        contexts = samples["context_key"].to_pylist()
        index = samples.schema.get_field_index("context_key")
        samples = samples.set_column(index, "context_key", pa.array([contexts[-1], *contexts[1:]]))
    assert freeze(cache, samples)[0].hash != before


def test_the_hash_is_the_documented_one(tmp_path):
    snapshot = load_snapshot(make_cache(tmp_path / "cache").store, "train")
    assert snapshot.hash == digest([1, [snapshot.table[column].to_pylist() for column in SNAPSHOT_IDENTITY]])


def test_samples_are_sorted_located_and_readable(tmp_path):
    cache = make_cache(tmp_path / "cache", VIDEOS, STARTS)
    snapshot = load_snapshot(cache.store, "train")
    ids = snapshot.table["sample_id"].to_pylist()
    assert ids == sorted(set(ids))
    for index in range(snapshot.num_samples):
        sample = snapshot.sample(index)
        assert read_payload(cache.store, sample.latents)
        assert read_payload(cache.store, sample.contexts[""])
        assert sample.latents_shape == (4, 2, 3, 5)
    assert read_payload(cache.store, snapshot.null_context)


def test_duplicate_samples_are_merged_and_counted(tmp_path):
    cache = make_cache(tmp_path / "cache", VIDEOS, STARTS)
    samples = samples_table(VIDEOS, STARTS)
    snapshot, counts = freeze(cache, pa.concat_tables([samples, samples.slice(0, 3)]))
    assert (counts.samples, counts.duplicates, counts.quarantined) == (8, 3, 0)
    assert snapshot.hash == load_snapshot(cache.store, "train").hash


def test_quarantined_samples_are_left_out_and_counted(tmp_path):
    cache = Cache(str(tmp_path / "cache"), create=True)
    wanted = wanted_table(VIDEOS)
    rows = wanted.to_pylist()
    commit(cache, "1" * 40, [row | {"error": "broken"} for row in rows[:1]])
    fill(cache, wanted)
    snapshot, counts = freeze(cache, samples_table(VIDEOS))
    assert (counts.samples, counts.quarantined) == (3, 1)
    assert "/videos/a.mp4" not in snapshot.table["source"].to_pylist()


def test_a_snapshot_of_entries_that_are_not_there_is_refused(tmp_path):
    cache = make_cache(tmp_path / "cache", VIDEOS, STARTS)
    with pytest.raises(LatentlineError, match=r"2 of 2 samples are not encoded yet \(first: /videos/z.mp4\)"):
        freeze(cache, samples_table(["z"], STARTS), name="other")
    with pytest.raises(UsageError, match="it has train"):
        load_snapshot(cache.store, "other")


def test_a_snapshot_without_its_null_context_is_refused(tmp_path):
    cache = Cache(str(tmp_path / "cache"), create=True)
    wanted = wanted_table(["a"])
    fill(cache, wanted.slice(0, len(wanted) - 1))
    with pytest.raises(LatentlineError, match=r"context .* is not encoded yet"):
        freeze(cache, samples_table(["a"]))


def test_nothing_but_quarantined_samples_is_an_error(tmp_path):
    cache = Cache(str(tmp_path / "cache"), create=True)
    wanted = wanted_table(["a"])
    commit(cache, "1" * 40, [wanted.to_pylist()[0] | {"error": "broken"}])
    fill(cache, wanted)
    with pytest.raises(LatentlineError, match="quarantined"):
        freeze(cache, samples_table(["a"]))


def test_a_snapshot_is_found_by_name_and_by_hash(tmp_path):
    cache = make_cache(tmp_path / "cache")
    snapshot = load_snapshot(cache.store, "train")
    assert load_snapshot(cache.store, snapshot.hash).table.equals(snapshot.table)
    with pytest.raises(UsageError, match="no snapshot 'nope'; it has train"):
        load_snapshot(cache.store, "nope")
    with pytest.raises(UsageError, match="letters, digits"):
        freeze(cache, samples_table(["a", "b", "c"]), name="a/b")


def test_a_damaged_snapshot_is_one_clear_line(tmp_path):
    cache = make_cache(tmp_path / "cache")
    snapshot = load_snapshot(cache.store, "train")
    path = cache.store.root / f"snapshots/{snapshot.hash}.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CorruptError, match=r"snapshots/.*: not a readable Parquet file"):
        load_snapshot(cache.store, "train")
