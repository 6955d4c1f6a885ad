import contextlib
import fcntl
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest

from manifests.errors import CorruptError, UsageError
from manifests.local_cache import CachedStore
from manifests.shards import read_tensors
from manifests.snapshot import load_snapshot
from manifests.store import Store
from tests.manifests.filled import entry, flip_bit, latents_row, make_cache

REPOSITORY = Path(__file__).parents[2]


def cached(remote: Store, tmp_path: Path, limit: int = 10**6) -> CachedStore:
    return CachedStore(remote.url, tmp_path / "local", limit)


def files(tmp_path: Path) -> list[Path]:
    return sorted(path for path in (tmp_path / "local").glob("??/*"))


def test_a_second_read_needs_no_remote(remote, tmp_path):
    store = cached(remote, tmp_path)
    assert store.read_range("entries/07", 10, 50) == b"\x07" * 50
    remote.delete("entries/07")
    assert store.read_range("entries/07", 10, 50) == b"\x07" * 50
    assert cached(remote, tmp_path).read_range("entries/07", 10, 50) == b"\x07" * 50
    assert (store.hits, store.misses) == (1, 1)
    with pytest.raises(CorruptError, match="missing"):
        store.read_range("entries/07", 11, 50)


def test_entries_read_through_it_are_checked_as_ever(tmp_path):
    cache = make_cache(tmp_path / "cache")
    store = CachedStore(cache.url, tmp_path / "local", 10**7)
    snapshot = load_snapshot(store, "train")
    rows = {row["key"]: row for video in "abc" for row in [latents_row(video, start) for start in (0, 8)]}
    for _ in range(2):
        for index in range(snapshot.num_samples):
            key = snapshot.table["latents_key"][index].as_py()
            assert read_tensors(store, snapshot.sample(index).latents)["latents"].equal(
                entry(rows[key]).tensors["latents"]
            )
    assert (store.hits, store.misses) == (6, 6)


@pytest.mark.parametrize("damage", ["flip in data", "flip in check", "truncate", "empty"])
def test_a_damaged_copy_is_fetched_again(remote, tmp_path, damage):
    store = cached(remote, tmp_path)
    store.read_range("entries/07", 0, 1000)
    [file] = files(tmp_path)
    if damage == "flip in data":
        flip_bit(file, 500)
    elif damage == "flip in check":
        flip_bit(file, 1)
    else:
        file.write_bytes(file.read_bytes()[:500] if damage == "truncate" else b"")
    assert store.read_range("entries/07", 0, 1000) == b"\x07" * 1000
    assert store.misses == 2
    assert store.read_range("entries/07", 0, 1000) == b"\x07" * 1000
    assert store.hits == 1


def test_the_folder_stays_within_its_limit_and_keeps_what_was_used_last(remote, tmp_path):
    store = cached(remote, tmp_path, limit=20_000)
    for number in range(40):
        store.read_range(f"entries/{number:02d}", 0, 1000)
        store.read_range("entries/00", 0, 1000)
        assert sum(file.stat().st_size for file in files(tmp_path)) <= 20_000
        time.sleep(0.002)
    assert len(files(tmp_path)) >= 15
    remote.delete("entries/00")
    remote.delete("entries/39")
    assert store.read_range("entries/00", 0, 1000) == bytes(1000)
    assert store.read_range("entries/39", 0, 1000) == b"\x27" * 1000


def test_a_smaller_limit_applies_at_once(remote, tmp_path):
    store = cached(remote, tmp_path)
    for number in range(40):
        store.read_range(f"entries/{number:02d}", 0, 1000)
    cached(remote, tmp_path, limit=10_000)
    assert sum(file.stat().st_size for file in files(tmp_path)) <= 10_000


def test_what_would_push_everything_out_is_not_kept(remote, tmp_path):
    store = cached(remote, tmp_path, limit=5000)
    assert store.read_range("entries/01", 0, 1000) == b"\x01" * 1000
    assert files(tmp_path) == []


_READER = """
import sys, random
from manifests.local_cache import CachedStore
store = CachedStore(sys.argv[1], sys.argv[2], 15_000)
random.seed(int(sys.argv[3]))
for _ in range(2000):
    number, part = random.randrange(40), random.randrange(10)
    assert store.read_range(f"entries/{number:02d}", part * 100, 100) == bytes([number]) * 100
print(store.hits)
"""


def test_many_processes_share_a_folder(remote, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", _READER, remote.url, str(tmp_path / "local")]
    readers = [
        subprocess.Popen([*command, str(seed)], env=environment, stdout=subprocess.PIPE, text=True) for seed in range(4)
    ]
    while any(reader.poll() is None for reader in readers):
        assert _bytes_kept(tmp_path) <= 15_000
        time.sleep(0.02)
    assert all(reader.returncode == 0 for reader in readers)
    assert all(int(reader.communicate()[0]) > 50 for reader in readers)


def _bytes_kept(tmp_path: Path) -> int:
    """At one moment: nobody reserves or evicts while the count is locked."""
    total = 0
    (tmp_path / "local").mkdir(exist_ok=True)
    with (tmp_path / "local" / ".bytes").open("a+b") as count:
        fcntl.flock(count, fcntl.LOCK_EX)
        for file in files(tmp_path):
            with contextlib.suppress(FileNotFoundError):
                total += file.stat().st_size
    return total


def test_a_full_disk_costs_a_warning_and_no_read(remote, tmp_path, caplog):
    folder = tmp_path / "local"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "none", str(folder)]
    mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"a full disk needs the right to mount a small tmpfs: {mounted.stderr.strip()}")
    try:
        store = cached(remote, tmp_path)
        for number in range(40):
            assert store.read_range(f"entries/{number:02d}", 0, 1000) == bytes([number]) * 1000
        assert len([record for record in caplog.records if "No space left" in record.message]) == 1
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_files_of_killed_writers_are_cleaned_up(remote, tmp_path):
    store = cached(remote, tmp_path)
    store.read_range("entries/07", 0, 1000)
    left = files(tmp_path)[0].parent / ".part-abc"
    left.write_bytes(b"half")
    os.utime(left, (time.time() - 7200,) * 2)
    cached(remote, tmp_path)
    assert not left.exists()
    assert len(files(tmp_path)) == 1


def test_it_travels_to_other_processes_and_refuses_a_folder_that_cannot_be(remote, tmp_path):
    store = pickle.loads(pickle.dumps(cached(remote, tmp_path)))
    assert store.read_range("entries/03", 0, 4) == b"\x03" * 4
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"train\.local_cache"):
        CachedStore(remote.url, tmp_path / "file", 10)
