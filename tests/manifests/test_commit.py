import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from manifests.cache import Cache
from manifests.errors import CorruptError
from manifests.places import Location
from manifests.shards import read_payload
from manifests.store import Store
from tests.manifests.filled import commit, fill, latents_row, wanted_table

ROWS = [latents_row("a", start) for start in (0, 4, 8)]
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def cache(tmp_path):
    return Cache(str(tmp_path / "cache"), create=True)


def tars(cache: Cache) -> list[Path]:
    return sorted(cache.store.root.rglob("*.tar"))


def locations(cache: Cache) -> list[Location]:
    rows = cache.index("latents").to_pylist()
    return [Location(row["shard"], row["offset"], row["size"], row["checksum"]) for row in rows]


def test_a_committed_shard_is_whole_and_readable(cache):
    assert commit(cache, "5" * 40, ROWS)
    rows = cache.rows("latents").to_pylist()
    assert [row["key"] for row in rows] == [row["key"] for row in ROWS]
    assert {row["status"] for row in rows} == {"ok"}
    for where in locations(cache):
        assert read_payload(cache.store, where)
    assert len(tars(cache)) == 1


def test_what_could_not_be_encoded_is_quarantined_with_its_reason(cache):
    rows = [ROWS[0], ROWS[1] | {"error": "cannot be decoded"}]
    commit(cache, "5" * 40, rows)
    assert [(row["status"], row["error"]) for row in cache.rows("latents").to_pylist()] == [
        ("ok", None),
        ("quarantined", "cannot be decoded"),
    ]


def test_a_shard_of_nothing_but_quarantined_rows_has_no_tar(cache):
    assert commit(cache, "5" * 40, [row | {"error": "broken"} for row in ROWS])
    assert tars(cache) == []
    assert cache.summary("latents").quarantined == 3


def test_a_row_with_neither_entry_nor_error_is_a_bug(cache):
    with pytest.raises(ValueError, match="neither"):
        commit(cache, "5" * 40, ROWS, entries={}, errors={})
    assert list(cache.shard_ids("latents")) == []


def test_of_many_writers_of_a_shard_one_wins_and_the_losers_leave_nothing(cache):
    barrier = threading.Barrier(6)
    won = []

    def write() -> None:
        barrier.wait()
        won.append(commit(cache, "5" * 40, ROWS))

    threads = [threading.Thread(target=write) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won) == [False] * 5 + [True]
    assert len(tars(cache)) == 1
    for where in locations(cache):
        assert read_payload(cache.store, where)


def test_a_writer_whose_commit_got_through_unanswered_keeps_its_tar(cache):
    class Forgetful(Store):
        """What a remote store does when the answer to a put is lost: it tries again and meets its own object."""

        def write_if_absent(self, path: str, data: bytes) -> bool:
            super().write_if_absent(path, data)
            return super().write_if_absent(path, data)

    cache.store = Forgetful(cache.url)
    assert commit(cache, "5" * 40, ROWS)
    for where in locations(cache):
        assert read_payload(cache.store, where)


_KILLED = """
import os, signal, sys
from manifests.cache import Cache
from manifests.store import Store
from tests.manifests.filled import commit, latents_row

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

point = sys.argv[2]
if point == "during tar":
    class Dying(Store):
        def write(self, path, data):
            with open(self.root / (path + "#1"), "wb") as staged:
                staged.write(data[: len(data) // 2]); staged.flush()
                die()
elif point == "before commit":
    class Dying(Store):
        def write_if_absent(self, path, data):
            die()
else:
    class Dying(Store):
        def write_if_absent(self, path, data):
            super().write_if_absent(path, data)
            die()
cache = Cache(sys.argv[1])
os.makedirs(cache.store.root / "entries/latents", exist_ok=True)
cache.store = Dying(sys.argv[1])
commit(cache, "5" * 40, [latents_row("a", start) for start in (0, 4, 8)])
"""


@pytest.mark.parametrize(("point", "committed"), [("during tar", 0), ("before commit", 0), ("after commit", 3)])
def test_a_writer_killed_anywhere_loses_at_most_its_uncommitted_shard(cache, point, committed):
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    killed = subprocess.run([sys.executable, "-c", _KILLED, cache.url, point], env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(cache.index("latents")) == committed
    assert commit(cache, "5" * 40, ROWS) == (committed == 0)
    assert sorted(row["key"] for row in cache.rows("latents").to_pylist()) == sorted(row["key"] for row in ROWS)
    for where in locations(cache):
        assert read_payload(cache.store, where)


def test_a_tar_that_does_not_read_back_as_written_is_not_committed(cache):
    class Rotten(Store):
        def write(self, path: str, data: bytes) -> None:
            flipped = bytearray(data)
            flipped[-3000] ^= 1
            flipped[1600] ^= 1
            super().write(path, bytes(flipped))

    cache.store = Rotten(cache.url)
    with pytest.raises(CorruptError, match="read back"):
        commit(cache, "5" * 40, ROWS)
    assert len(cache.shard_ids("latents")) == 0


def test_the_same_plan_gives_the_same_tar_bytes_anywhere(tmp_path):
    found = []
    for place in ("one", "two"):
        cache = Cache(str(tmp_path / place), create=True)
        fill(cache, wanted_table(["a", "b"], [0, 8]))
        found.append({path.name.split(".")[0]: path.read_bytes() for path in tars(cache)})
    assert found[0] == found[1]
    assert len(found[0]) == 4
