import shutil
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from manifests import store
from manifests.cache import Cache
from manifests.compact import compact
from manifests.places import Location
from manifests.plan import missing_entries
from manifests.repair import mend_snapshots, repair
from manifests.schema import MANIFEST
from manifests.shards import Entry, read_payload
from manifests.snapshot import load_snapshot
from manifests.tables import read_table, table_bytes
from manifests.values import fault_of
from manifests.verify import verify
from tests.manifests.filled import (
    PARTS,
    commit,
    fill,
    flip_bit,
    freeze,
    latents_row,
    make_cache,
    samples_table,
    wanted_table,
)

VIDEOS, STARTS = ["a", "b", "c"], [0, 8]
WANTED = wanted_table(VIDEOS, STARTS)


@pytest.fixture
def cache(tmp_path):
    return make_cache(tmp_path / "cache", VIDEOS, STARTS)


def first_row(cache: Cache, kind: str = "latents") -> dict:
    shard_id = cache.shard_ids(kind)[0].as_py()
    return cache.manifest(kind, shard_id)[0].to_pylist()[0] | {"shard_id": shard_id}


def manifest_file(cache: Cache) -> Path:
    return cache.store.root / f"entries/latents/{first_row(cache)['shard_id']}.parquet"


def rewrite(path: Path, change, footer_change=lambda footer: footer) -> None:
    table, footer = read_table(path.read_bytes(), MANIFEST, str(path))
    rows = [change(row) for row in table.to_pylist()]
    path.write_bytes(table_bytes(pa.Table.from_pylist(rows, schema=MANIFEST), footer_change(footer)))


def recover(cache: Cache) -> None:
    """What a user does after damage: repair, encode, verify."""
    repair(cache, verify(cache).findings)
    fill(cache, WANTED)
    freeze(cache, samples_table(VIDEOS, STARTS))
    assert verify(cache).damaged == ()
    assert len(cache.index("latents")) == 6


def test_a_whole_cache_is_whole(cache):
    result = verify(cache)
    assert result.findings == ()
    assert (result.shards, result.entries, result.snapshots) == (5, 10, 1)
    assert result.bytes > 10_000


def test_progress_counts_shards(cache):
    totals = []

    def track(items, total):
        totals.append(total)
        return items

    verify(cache, track=track)
    assert totals == [3, 2]


@pytest.mark.parametrize("where", ["payload", "member header", "facts", "padding"])
def test_one_flipped_bit_anywhere_in_a_tar_is_found_and_repaired(cache, where):
    row = first_row(cache)
    offset = {"payload": 40, "member header": -512 + 124, "facts": -1024 + 2, "padding": row["size"] + 5}[where]
    assert (row["offset"] + row["size"]) % 512 or where != "padding"
    flip_bit(cache.store.root / row["shard"], row["offset"] + offset)
    result = verify(cache)
    assert result.damaged
    assert {finding.shard_id for finding in result.damaged if finding.kind} == {row["shard_id"]}
    assert any("checksum" in finding.what for finding in result.damaged)
    assert all("repair" in finding.todo for finding in result.damaged)
    recover(cache)


@pytest.mark.parametrize("where", ["member boundary", "header", "payload", "everything"])
def test_a_truncated_tar_is_found_and_repaired(cache, where):
    row = first_row(cache)
    path = cache.store.root / row["shard"]
    cut = {"member boundary": row["offset"] - 1536, "header": row["offset"] - 100, "payload": row["offset"] + 9}
    path.write_bytes(path.read_bytes()[: cut.get(where, 0)])
    assert any(row["shard"] in finding.where for finding in verify(cache).damaged)
    recover(cache)


def test_a_missing_tar_is_found_and_repaired(cache):
    row = first_row(cache)
    (cache.store.root / row["shard"]).unlink()
    findings = verify(cache).damaged
    assert [(f.where, f.what) for f in findings if f.kind] == [(row["shard"], "missing, but its manifest names it")]
    recover(cache)


@pytest.mark.parametrize("size", [0, 100, -9])
def test_a_truncated_manifest_is_found_and_repaired(cache, size):
    path = manifest_file(cache)
    path.write_bytes(path.read_bytes()[:size])
    assert any(path.name in finding.where for finding in verify(cache).damaged)
    recover(cache)


def test_a_missing_manifest_makes_its_entries_missing_and_nothing_else(cache):
    path = manifest_file(cache)
    path.unlink()
    assert len(missing_entries(cache, WANTED)) == 2
    result = verify(cache)
    assert [finding.where for finding in result.damaged] == [
        next(iter(cache.store.names("snapshots"))).join(["snapshots/", ""])
    ] or (all(finding.where.startswith("snapshots/") for finding in result.damaged))
    assert any("no manifest names it" in finding.what for finding in result.findings)
    recover(cache)


def test_a_manifest_of_another_fingerprint_is_found_and_repaired(cache):
    other = PARTS["latents"] | {"vae": "9" * 40}
    rewrite(manifest_file(cache), lambda row: row, lambda footer: footer | {"fingerprint": other})
    assert any("do not follow from their rows and its fingerprint" in finding.what for finding in verify(cache).damaged)
    recover(cache)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"start": 3}, "do not follow"),
        ({"shape": [4, 2, 3, 6]}, "its manifest says bfloat16"),
        ({"dtype": "float32"}, "its manifest says float32"),
        ({"offset": 0}, "checksum"),
        ({"size": 10**9}, "ends before"),
        ({"kind": "context"}, "another kind"),
        ({"shard": "entries/latents/other.tar"}, "names the tars"),
    ],
)
def test_a_manifest_that_promises_something_else_is_found_and_repaired(cache, change, message):
    rewrite(manifest_file(cache), lambda row: row | change)
    assert any(message in finding.what for finding in verify(cache).damaged)
    recover(cache)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_found(tmp_path, value):
    cache = Cache(str(tmp_path / "cache"), create=True)
    row = latents_row("a")
    values = torch.zeros(4, 2, 3, 5, dtype=torch.bfloat16)
    values[0, 0, 0, 1] = value
    commit(cache, "5" * 40, [row], entries={row["key"]: Entry(row["key"], {"latents": values}, {})})
    assert [finding.what for finding in verify(cache).damaged] == ["latents are not finite"]


def test_constant_latents_are_found_and_a_constant_context_is_none_of_it():
    assert fault_of("latents", torch.full((4, 2), 0.5)) == "latents are constant: every value is 0.5"
    assert fault_of("context", torch.zeros(4, 2)) is None
    assert fault_of("context", torch.tensor([torch.nan])) == "context is not finite"
    assert fault_of("latents", torch.arange(3.0)) is None


def test_entries_of_two_shards_are_a_note_and_read_once(cache):
    rows = [row for row in WANTED.to_pylist() if row["kind"] == "latents"][:2]
    commit(cache, "f" * 40, rows)
    result = verify(cache)
    assert result.damaged == ()
    assert len(result.findings) == 2
    assert "also in shard" in result.findings[0].what
    assert len(cache.index("latents")) == 6


def test_abandoned_tars_are_a_note(cache):
    row = first_row(cache)
    shutil.copy(cache.store.root / row["shard"], cache.store.root / f"entries/latents/{'9' * 40}.abc.tar")
    (finding,) = verify(cache).findings
    assert not finding.damage
    assert "gc" in finding.todo


def test_a_repair_keeps_what_it_sets_aside_with_the_reasons(cache):
    row = first_row(cache)
    flip_bit(cache.store.root / row["shard"], row["offset"] + 40)
    before = manifest_file(cache).read_bytes()
    done = repair(cache, verify(cache).findings)
    (kept,) = done.set_aside
    assert cache.store.read(kept) == before
    assert b"checksum" in cache.store.read(kept.removesuffix(".parquet") + ".json")
    assert (cache.store.root / row["shard"]).exists()
    assert len(missing_entries(cache, WANTED)) == 2
    assert [finding.where.split("/")[0] for finding in done.left] == ["snapshots"]


def test_repairing_a_whole_cache_does_nothing(cache):
    before = sorted(str(path) for path in cache.store.root.rglob("*"))
    done = repair(cache, verify(cache).findings)
    assert (done.set_aside, done.mended, done.left) == ((), (), ())
    assert sorted(str(path) for path in cache.store.root.rglob("*")) == before


def test_other_snapshots_are_pointed_at_the_entries_encoded_again(cache):
    freeze(cache, samples_table(VIDEOS[:1], STARTS), name="small")
    for shard_id in cache.shard_ids("latents").to_pylist():
        row = cache.manifest("latents", shard_id)[0].to_pylist()[0]
        flip_bit(cache.store.root / row["shard"], row["offset"] + 40)
    repair(cache, verify(cache).findings)
    fill(cache, WANTED)
    before = load_snapshot(cache.store, "small")
    assert len(mend_snapshots(cache)) == 2
    after = load_snapshot(cache.store, "small")
    assert after.hash == before.hash
    for index in range(after.num_samples):
        assert read_payload(cache.store, after.sample(index).latents)
    assert verify(cache).damaged == ()


@pytest.mark.parametrize("damage", ["rows", "file", "target"])
def test_damaged_snapshots_are_found(cache, damage):
    snapshot = load_snapshot(cache.store, "train")
    path = cache.store.root / f"snapshots/{snapshot.hash}.parquet"
    if damage == "rows":
        path.write_bytes(table_bytes(snapshot.table.slice(1), {"null_context": {}, "negative_contexts": {}}))
    elif damage == "file":
        path.write_bytes(path.read_bytes()[:-9])
    else:
        path.unlink()
    assert any(finding.where.startswith("snapshots/") for finding in verify(cache).damaged)
    recover(cache)


def test_a_compacted_manifest_that_promises_what_is_gone_is_found_and_dropped(cache):
    compact(cache, min_shards=1)
    assert verify(cache).findings == ()
    manifest_file(cache).unlink()
    assert not len(missing_entries(cache, WANTED))
    assert any(finding.where.startswith("compacted/latents") for finding in verify(cache).damaged)
    recover(cache)


def test_a_repair_forgets_compacted_manifests_of_what_it_sets_aside(cache):
    compact(cache, min_shards=1)
    row = first_row(cache)
    flip_bit(cache.store.root / row["shard"], row["offset"] + 40)
    repair(cache, verify(cache).findings)
    assert len(missing_entries(cache, WANTED)) == 2
    recover(cache)
    assert compact(cache, min_shards=1)["latents"] == 3
    assert verify(cache).findings == () or all(not finding.damage for finding in verify(cache).findings)


def test_entries_are_read_where_a_whole_cache_says(cache):
    for row in cache.rows("context").to_pylist():
        assert read_payload(cache.store, Location(row["shard"], row["offset"], row["size"], row["checksum"]))


@pytest.mark.parametrize("piece", [300, 512, 5000])
def test_entries_are_checked_wherever_pieces_of_a_tar_end(cache, monkeypatch, piece):
    monkeypatch.setattr(store, "PIECE_BYTES", piece)
    assert verify(cache).findings == ()
    row = first_row(cache)
    flip_bit(cache.store.root / row["shard"], row["offset"] + row["size"] - 1)
    faults = {finding.where: finding.what for finding in verify(cache).damaged if finding.kind}
    assert faults[row["shard"]] == "differs from its checksum"
    assert faults[f"{row['shard']} {row['key']}"] == f"bytes {row['offset']}+{row['size']} differ from their checksum"


def test_a_shard_is_not_held_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "PIECE_BYTES", 1 << 16)
    cache = Cache(str(tmp_path / "cache"), create=True)
    rows = [latents_row("a", start) for start in range(64)]
    values = torch.arange(120, dtype=torch.float32).repeat(512).reshape(4, 2, -1, 5)
    commit(cache, "5" * 40, rows, entries={row["key"]: Entry(row["key"], {"latents": values}, {}) for row in rows})
    tracemalloc.start()
    try:
        result = verify(cache)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (result.damaged, result.entries) == ((), 64)
    assert result.bytes > 12_000_000
    assert peak < 4_000_000
