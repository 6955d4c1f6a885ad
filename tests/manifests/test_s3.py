"""The cache on an object store: moto's server, with and without requests that fail."""

import os
import re
import subprocess
import sys
import threading
import uuid
from pathlib import Path

import pytest

from manifests.cache import Cache
from manifests.compact import compact
from manifests.errors import CorruptError, LatentlineError, UsageError
from manifests.places import Location
from manifests.plan import missing_entries
from manifests.shards import read_payload, read_tensors
from manifests.snapshot import load_snapshot
from manifests.store import Store
from tests.manifests.filled import commit, entry, fill, freeze, latents_row, make_cache, samples_table, wanted_table
from tests.manifests.s3 import BUCKET, environment, faulty_proxy, in_environment, moto_server

ROWS = [latents_row("a", start) for start in (0, 4, 8)]
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def port():
    with moto_server() as port:
        yield port


@pytest.fixture
def url(port):
    with in_environment(environment(port)):
        yield f"s3://{BUCKET}/{uuid.uuid4().hex}"


@pytest.fixture
def faulty(port):
    """(url, faults): the same endpoint behind a proxy that fails what the test says."""
    with faulty_proxy(port) as (proxy_port, faults), in_environment(environment(proxy_port)):
        yield f"s3://{BUCKET}/{uuid.uuid4().hex}", faults


def every(number: int):
    """True for every `number`th request."""
    seen = []

    def refuse(method: str, path: str) -> bool:
        seen.append((method, path))
        return len(seen) % number == 0

    return refuse


def check_everything(cache: Cache, videos: list[str], starts: list[int]) -> None:
    snapshot = load_snapshot(cache.store, "train")
    assert snapshot.num_samples == len(videos) * len(starts)
    rows = {row["key"]: row for video in videos for row in [latents_row(video, start) for start in starts]}
    for index in range(snapshot.num_samples):
        key = snapshot.table["latents_key"][index].as_py()
        stored = read_tensors(cache.store, snapshot.sample(index).latents)["latents"]
        assert stored.equal(entry(rows[key]).tensors["latents"])


def test_plan_commit_snapshot_and_read(url, tmp_path):
    cache = make_cache(url, ["a", "b", "c"], [0, 8])
    check_everything(Cache(url), ["a", "b", "c"], [0, 8])
    assert not len(missing_entries(Cache(url), wanted_table(["a", "b", "c"], [0, 8])))
    local = make_cache(tmp_path / "local", ["a", "b", "c"], [0, 8])
    assert load_snapshot(cache.store, "train").hash == load_snapshot(local.store, "train").hash


def test_shards_are_the_same_bytes_as_in_a_local_folder(url, tmp_path):
    found = []
    for place in (url, str(tmp_path / "local")):
        cache = make_cache(place)
        tars = [info.path for info in cache.store.list("entries") if info.path.endswith(".tar")]
        found.append({path.split(".")[0]: cache.store.read(path) for path in tars})
    assert found[0] == found[1]


def test_of_two_writers_one_wins_and_the_loser_leaves_nothing(url):
    cache = Cache(url, create=True)
    barrier = threading.Barrier(4)
    won = []

    def write() -> None:
        mine = Cache(url)
        barrier.wait()
        won.append(commit(mine, "5" * 40, ROWS))

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won) == [False, False, False, True]
    assert len([info for info in cache.store.list("entries") if info.path.endswith(".tar")]) == 1
    for row in cache.rows("latents").to_pylist():
        assert read_payload(cache.store, Location(row["shard"], row["offset"], row["size"], row["checksum"]))


_WRITER = """
import sys
from manifests.cache import Cache
from tests.manifests.filled import commit, latents_row
sys.stdin.readline()
print(commit(Cache(sys.argv[1]), "5" * 40, [latents_row("a", start) for start in (0, 4, 8)]))
"""


def test_of_two_processes_one_wins(url):
    cache = Cache(url, create=True)
    variables = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _WRITER, url]
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": variables}
    writers = [subprocess.Popen(command, **options) for _ in range(2)]
    for writer in writers:
        writer.stdin.write("go\n")
        writer.stdin.flush()
    assert sorted(writer.communicate()[0].strip() for writer in writers) == ["False", "True"]
    assert len(cache.rows("latents")) == 3
    assert len([info for info in cache.store.list("entries") if info.path.endswith(".tar")]) == 1


def test_names_of_skipped_prefixes_are_not_listed(faulty):
    url, faults = faulty
    store = Store(url, create=True)
    for name in ("aa1", "aa2", "ab1", "b0", "b1", "c"):
        store.write(f"folder/{name}", b"")
    faults.seen.clear()
    assert list(store.names("folder", skip=["aa", "b"])) == ["ab1", "c"]
    assert len(faults.seen) == 3
    assert all("start-after" in path for _, path in faults.seen[1:])


def test_a_compacted_cache_opens_without_reading_its_manifests(faulty):
    url, faults = faulty
    videos = [f"{number:02d}" for number in range(40)]
    wanted, samples = wanted_table(videos), samples_table(videos)
    cache = Cache(url, create=True)
    fill(cache, wanted, entries_per_shard=2)
    assert compact(cache, min_shards=2) == {"latents": 20, "context": 21}
    freeze(cache, samples)
    faults.seen.clear()
    assert not len(missing_entries(Cache(url), wanted))
    assert len(faults.seen) < 15
    assert not [path for _, path in faults.seen if re.search(r"entries/.*parquet", path)]


def test_every_third_request_answered_503_loses_nothing(faulty):
    url, faults = faulty
    faults.refuse = every(3)
    videos = ["a", "b"]
    cache = make_cache(url, videos, [0, 8])
    check_everything(cache, videos, [0, 8])
    assert len(faults.seen) > 20


def test_a_commit_whose_answer_was_lost_is_won_and_keeps_its_tar(faulty):
    url, faults = faulty
    cache = Cache(url, create=True)
    lost = []

    def forget(method: str, path: str) -> bool:
        if method == "PUT" and path.endswith(".parquet") and not lost:
            lost.append(path)
            return True
        return False

    faults.forget = forget
    assert commit(cache, "5" * 40, ROWS)
    assert lost
    for row in cache.rows("latents").to_pylist():
        assert read_payload(cache.store, Location(row["shard"], row["offset"], row["size"], row["checksum"]))


@pytest.mark.parametrize(
    "call", ["read", "read_range", "write", "write_if_absent", "delete", "exists", "list", "names"]
)
def test_a_store_that_stays_down_is_one_clear_line(faulty, call):
    url, faults = faulty
    store = Store(url, create=True, max_retries=1)
    store.write("a/b", b"123")
    faults.refuse = lambda method, path: True
    arguments = {"read_range": (0, 1), "write": (b"1",), "write_if_absent": (b"1",)}.get(call, ())
    with pytest.raises(LatentlineError) as caught:
        getattr(store, call)("a/b" if call not in ("list", "names") else "a", *arguments)
    message = str(caught.value)
    assert type(caught.value) is LatentlineError
    assert message.startswith(f"{url}/a")
    assert "503" in message
    assert "\n" not in message


def test_what_is_committed_survives_a_store_that_goes_down(faulty):
    url, faults = faulty
    cache = Cache(url, create=True)
    commit(cache, "1" * 40, ROWS[:1])
    cache.store = Store(url, max_retries=1)
    faults.refuse = lambda method, path: method == "PUT" and path.endswith(".parquet")
    with pytest.raises(LatentlineError, match="503"):
        commit(cache, "2" * 40, ROWS[1:])
    faults.refuse = lambda method, path: False
    assert cache.shard_ids("latents").to_pylist() == ["1" * 40]
    assert commit(cache, "2" * 40, ROWS[1:])
    assert len(cache.index("latents")) == 3


def test_damage_on_a_remote_store_is_corruption(url):
    cache = make_cache(url)
    row = cache.rows("latents").to_pylist()[0]
    where = Location(row["shard"], row["offset"], row["size"], row["checksum"])
    data = bytearray(cache.store.read(row["shard"]))
    data[row["offset"] + row["size"] - 1] ^= 1
    cache.store.write(row["shard"], bytes(data))
    with pytest.raises(CorruptError, match="checksum"):
        read_payload(cache.store, where)
    cache.store.write(row["shard"], bytes(data[: row["offset"] + 3]))
    with pytest.raises(CorruptError, match="ends"):
        read_payload(cache.store, where)
    cache.store.write(row["shard"], b"")
    with pytest.raises(CorruptError, match="ends"):
        read_payload(cache.store, where)
    cache.store.delete(row["shard"])
    with pytest.raises(CorruptError, match="missing"):
        read_payload(cache.store, where)


def test_a_missing_bucket_is_clear(port):
    with in_environment(environment(port)), pytest.raises(LatentlineError, match="the bucket or folder is not there"):
        Cache("s3://no-such-bucket/cache", create=True)


def test_a_remote_folder_that_is_no_cache_is_a_usage_error(url):
    with pytest.raises(UsageError, match="not a latentline cache"):
        Cache(url)
