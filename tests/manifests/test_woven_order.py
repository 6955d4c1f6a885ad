"""The order of a run with weights, over real snapshots of several datasets."""

from collections import Counter

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from manifests.cache import Cache
from manifests.errors import UsageError
from manifests.keys import captions_key
from manifests.mixture import Mixture
from manifests.order import Order, WovenOrder, order_of
from manifests.snapshot import Snapshot, load_snapshot
from tests.manifests.filled import commit, context_row, fill, freeze, samples_table, wanted_table

NORMAL, ACCIDENT = ["n1", "n2", "n3", "n4", "n5", "n6", "n7"], ["a1", "a2"]


def both(cache: Cache, **columns: list) -> Snapshot:
    """7 samples of `normal` and 2 of `accident`; columns replace those of the samples, in that order."""
    fill(cache, wanted_table([*NORMAL, *ACCIDENT]))
    parts = [samples_table(NORMAL, dataset="normal"), samples_table(ACCIDENT, dataset="accident")]
    samples = pa.concat_tables(parts)
    for name, values in columns.items():
        index = samples.schema.get_field_index(name)
        samples = samples.set_column(index, name, pa.array(values, samples.schema.field(name).type))
    freeze(cache, samples)
    return load_snapshot(cache.store, "train")


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    return both(Cache(str(tmp_path_factory.mktemp("cache")), create=True))


def datasets(snapshot: Snapshot, order: Order | WovenOrder, positions: range) -> Counter[str]:
    return Counter(snapshot.sample(order[p][1]).dataset for p in positions)


def test_without_weights_the_order_is_the_plain_one(snapshot):
    order, plain = order_of(snapshot, 3, Mixture()), Order(snapshot.hash, 3, 9)
    assert [order[p] for p in range(40)] == [plain[p] for p in range(40)]


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    normal=st.integers(0, 20),
    accident=st.integers(1, 20),
    seed=st.integers(0, 2**40),
    cut=st.integers(0, 200),
    ranks=st.integers(1, 8),
)
def test_shares_are_exact_epochs_whole_and_restarts_and_ranks_invisible(snapshot, normal, accident, seed, cut, ranks):
    mixture = Mixture(datasets={"normal": float(normal), "accident": float(accident)})
    total = (normal + accident) * 14
    order = order_of(snapshot, seed, mixture)
    stream = [order[p] for p in range(total)]
    counts = Counter(snapshot.sample(index).dataset for _, index in stream)
    assert (counts["normal"], counts["accident"]) == (normal * 14, accident * 14)
    again = order_of(snapshot, seed, mixture)
    assert {p: again[p] for r in range(ranks) for p in range(cut + r, total, ranks)} == dict(
        list(enumerate(stream))[cut:]
    )
    visits = Counter(stream)
    assert set(visits.values()) == {1}
    for name, size in (("normal", 7), ("accident", 2)):
        own = [(epoch, index) for epoch, index in stream if snapshot.sample(index).dataset == name]
        assert [epoch for epoch, _ in own] == [place // size for place in range(len(own))]


def test_other_seeds_shuffle_otherwise_with_the_same_pattern(snapshot):
    mixture = Mixture(datasets={"normal": 0.7, "accident": 0.3})
    one, two = order_of(snapshot, 1, mixture), order_of(snapshot, 2, mixture)
    assert [one[p][1] for p in range(30)] != [two[p][1] for p in range(30)]
    assert all(
        datasets(snapshot, order, range(k, k + 10)) == {"normal": 7, "accident": 3}
        for order in (one, two)
        for k in (0, 10, 90)
    )


def test_rows_that_weigh_more_come_more_often(tmp_path):
    cache = Cache(str(tmp_path), create=True)
    plain = both(cache).hash
    weighted = both(cache, weight=[2.0, 2.0, None, None, 0.5, 0.5, 0.0, None, None])
    assert weighted.hash != plain
    order = order_of(weighted, 0, Mixture())
    names = Counter(weighted.sample(order[p][1]).source.split("/")[-1][:2] for p in range(90))
    assert names == {"n1": 20, "n2": 20, "n3": 10, "n4": 10, "n5": 5, "n6": 5, "a1": 10, "a2": 10}
    order = order_of(weighted, 0, Mixture(datasets={"normal": 1.0, "accident": 1.0}))
    names = Counter(weighted.sample(order[p][1]).source.split("/")[-1][:2] for p in range(140))
    assert names["a1"] + names["a2"] == 70
    assert names["n1"] == 4 * names["n5"] == 20


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"normal": 1.0}, "has samples of accident, which data.datasets gives no weight"),
        ({"normal": 1.0, "accident": 1.0, "rain": 0.2}, "data.datasets.rain.weight = 0.2, but .* no sample of it"),
        ({"normal": 0.0, "accident": 0.0}, "sum to 0"),
    ],
)
def test_weights_that_do_not_fit_are_refused(snapshot, weights, message):
    with pytest.raises(UsageError, match=message) as caught:
        order_of(snapshot, 0, Mixture(datasets=weights))
    assert "\n" not in str(caught.value)


def several(cache: Cache, quarantined: str | None = None) -> Snapshot:
    """Two videos with the captions `long` and `short` each, one more with a single caption."""
    fill(cache, wanted_table(["a", "b", "c"]))
    rows = []
    for row in samples_table(["a", "b", "c"]).to_pylist():
        if row["source"].endswith("c.mp4"):
            rows.append(row)
            continue
        texts = {name: f"{name} of {row['source']}" for name in ("short", "long")}
        keys = {name: context_row(text)["key"] for name, text in texts.items()}
        for name, text in texts.items():
            new = {"caption": text, "caption_name": name, "context_key": keys[name]}
            rows.append(row | new | {"captions_key": captions_key(keys)})
    contexts = [context_row(row["caption"]) for row in rows if row["caption_name"]]
    for row in contexts:
        row["error"] = "not finite" if row["caption"] == quarantined else None
    commit(cache, "several", contexts)
    snapshot, counts = freeze(cache, pa.Table.from_pylist(rows, schema=samples_table(["a"]).schema))
    assert (counts.samples, counts.quarantined, counts.duplicates) == ((3, 0, 0) if quarantined is None else (2, 1, 0))
    return snapshot


def test_a_sample_has_all_its_captions(tmp_path):
    cache = Cache(str(tmp_path), create=True)
    snapshot = several(cache)
    assert (snapshot.num_samples, len(snapshot.table)) == (3, 5)
    assert sum(snapshot.shapes.values()) == 3
    captions = {snapshot.sample(i).source: snapshot.sample(i).captions for i in range(3)}
    assert captions["/videos/a.mp4"] == {"long": "long of /videos/a.mp4", "short": "short of /videos/a.mp4"}
    assert captions["/videos/c.mp4"] == {"": "a video of c"}
    places = [place for i in range(3) for place in snapshot.sample(i).contexts.values()]
    assert len(set(places)) == 5
    assert load_snapshot(cache.store, "train").table.to_pylist() == snapshot.table.to_pylist()
    order = order_of(snapshot, 0, Mixture())
    assert {order[position][1] for position in range(3)} == {0, 1, 2}


def test_a_caption_in_quarantine_leaves_its_sample_out_whole(tmp_path):
    snapshot = several(Cache(str(tmp_path), create=True), quarantined="short of /videos/a.mp4")
    assert "/videos/a.mp4" not in snapshot.table["source"].to_pylist()


def test_caption_weights_must_name_the_captions_there_are(tmp_path):
    snapshot = several(Cache(str(tmp_path), create=True))
    order_of(snapshot, 0, Mixture(captions={"test": {"long": 1.0, "short": 3.0}}))
    with pytest.raises(UsageError, match=r"captions names long, medium, snapshot .* has long, short"):
        order_of(snapshot, 0, Mixture(captions={"test": {"long": 1.0, "medium": 1.0}}))
