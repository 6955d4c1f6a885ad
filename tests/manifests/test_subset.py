import itertools

import pytest

from manifests.cache import Cache
from manifests.errors import UsageError
from manifests.snapshot import load_snapshot
from manifests.subset import make_subsets
from tests.manifests.filled import fill, freeze, make_cache, samples_table, wanted_table

VIDEOS = [f"v{number:03d}" for number in range(60)]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("subset") / "cache", VIDEOS, [0, 8])


def sources(cache: Cache, name: str) -> list[str]:
    return load_snapshot(cache.store, name).table["source"].to_pylist()


def test_a_condition_makes_a_snapshot_of_its_own(cache):
    [made] = make_subsets(cache, "train", "first", where="source like '%/v00%' and start = 8")
    snapshot = load_snapshot(cache.store, "first")
    assert (made.samples, made.videos, made.hash) == (10, 10, snapshot.hash)
    assert set(snapshot.table["start"].to_pylist()) == {8}
    assert snapshot.table["sample_id"].to_pylist() == sorted(snapshot.table["sample_id"].to_pylist())
    assert snapshot.null_context == load_snapshot(cache.store, "train").null_context


def test_the_same_samples_are_the_same_snapshot(cache):
    [made] = make_subsets(cache, "train", "again", where="start >= 0")
    assert made.hash == load_snapshot(cache.store, "train").hash


def test_parts_hold_every_sample_once_and_no_video_twice(cache):
    made = make_subsets(cache, "train", "split", split={"val": 0.2, "test": 0.1})
    assert [subset.name for subset in made] == ["split-val", "split-test", "split"]
    parts = [sources(cache, subset.name) for subset in made]
    assert sorted(itertools.chain(*parts)) == sorted(sources(cache, "train"))
    assert not set(parts[0]) & set(parts[1])
    assert not set(parts[0] + parts[1]) & set(parts[2])
    assert 4 <= made[0].videos <= 22
    assert all(subset.samples == 2 * subset.videos for subset in made)


def test_a_video_keeps_its_part_when_others_come(cache, tmp_path):
    make_subsets(cache, "train", "small", split={"val": 0.3})
    grown = Cache(str(tmp_path / "grown"), create=True)
    videos = [*VIDEOS, *(f"new{number}" for number in range(20))]
    fill(grown, wanted_table(videos))
    freeze(grown, samples_table(videos))
    make_subsets(grown, "train", "large", split={"val": 0.3})
    old, new = set(sources(cache, "small-val")), set(sources(grown, "large-val"))
    assert old == new & set(sources(cache, "train"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"where": "dataset = 'nope'"}, "'bad' would be empty: 0 of 120"),
        ({"split": {"val": 1.5}}, "between 0 and 1"),
        ({"split": {"val": 0.6, "test": 0.5}}, "sum to 1.1"),
        ({"split": {"a/b": 0.5}}, "letters, digits"),
        ({"split": {"val": 1e-9}}, "'bad-val' would be empty"),
        ({"where": "nope = 1"}, "no column"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_written(cache, options, message):
    with pytest.raises(UsageError, match=message):
        make_subsets(cache, "train", "bad", **options)
    assert not cache.store.exists("snapshots/bad.json")
