import os
import pickle
import re
import stat
import subprocess
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manifests.cache import Cache
from manifests.errors import CorruptError, LatentlineError, UsageError
from manifests.store import Store, safe_path
from tests.manifests.filled import commit, latents_row

ROWS = [latents_row("a", start) for start in (0, 4, 8)]


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store", create=True)


def one_line(raises: type[LatentlineError], call: Callable[[], object]) -> str:
    with pytest.raises(raises) as caught:
        call()
    assert type(caught.value) is raises
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_objects_are_written_read_listed_and_deleted(store):
    store.write("a/one", b"1")
    store.write("a/one", b"11")
    store.write("a/b/two", b"22222")
    store.write("c", b"3")
    assert store.read("a/one") == b"11"
    assert store.read_range("a/b/two", 1, 3) == b"222"
    assert [(item.path, item.size) for item in store.list("a")] == [("a/b/two", 5), ("a/one", 2)]
    store.delete("a/one")
    store.delete("a/one")
    assert not store.exists("a/one")
    assert store.exists("c")
    with pytest.raises(FileNotFoundError):
        store.read("a/one")


def test_the_first_of_many_writers_wins(store):
    won = []
    barrier = threading.Barrier(8)

    def write(value: bytes) -> None:
        barrier.wait()
        won.append((store.write_if_absent("name", value), value))

    threads = [threading.Thread(target=write, args=(b"%d" % i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [value for put, value in won if put] == [store.read("name")]


def test_names_leave_out_what_is_skipped(store):
    for name in ("aa1", "aa2", "ab1", "b"):
        store.write(f"folder/{name}", b"")
    assert sorted(store.names("folder", skip=["aa", "b"])) == ["ab1"]
    assert store.names("nowhere") == []


def test_reading_past_the_end_is_corruption_with_a_place(store):
    store.write("a", b"12345")
    assert "a: ends" in one_line(CorruptError, lambda: store.read_range("a", 3, 5))
    assert "a: ends" in one_line(CorruptError, lambda: store.read_range("a", 30, 5))
    assert "missing" in one_line(CorruptError, lambda: store.read_range("b", 0, 5))


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../up", "a/../../up", "file:///etc/passwd", "s3://b/x", "a b", "", "a\\b", "a/ü", "a#1"]
)
def test_paths_that_could_leave_the_cache_are_refused(store, path):
    for call in (store.read, store.exists, store.delete, lambda p: store.read_range(p, 0, 1)):
        assert "not a path inside a cache" in one_line(CorruptError, lambda call=call: call(path))


@given(path=st.text(max_size=30))
def test_no_path_leads_out_of_the_cache(path):
    try:
        safe_path(path)
    except CorruptError:
        return
    assert os.path.realpath(f"/root/of/cache/{path}").startswith("/root/of/cache")


@pytest.mark.parametrize("url", ["http://host/x", "file:///tmp/x", "pipe:cat", "ftp://x/y"])
def test_other_schemes_are_refused(url, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = one_line(UsageError, lambda: Store(url))
    assert url in message
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_not_made_by_reading(tmp_path):
    assert "no such folder" in one_line(UsageError, lambda: Store(tmp_path / "nowhere"))
    assert not (tmp_path / "nowhere").exists()


def test_a_store_is_opened_again_from_a_pickle(store):
    store.write("a", b"1")
    assert pickle.loads(pickle.dumps(store)).read("a") == b"1"


def test_a_cache_of_a_newer_format_is_refused(tmp_path):
    Cache(str(tmp_path / "c"), create=True).store.write("format.json", b'{"format": 99}')
    assert "upgrade" in one_line(UsageError, lambda: Cache(str(tmp_path / "c")))


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"format": null}', b'{"format": "x"}'])
def test_a_torn_format_file_is_one_clear_line(tmp_path, text):
    Cache(str(tmp_path / "c"), create=True).store.write("format.json", text)
    assert "format.json" in one_line(CorruptError, lambda: Cache(str(tmp_path / "c")))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a full disk needs the right to mount a small tmpfs: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_a_clear_error_and_commits_nothing(small_disk):
    cache = Cache(str(small_disk / "cache"), create=True)
    commit(cache, "1" * 40, ROWS)
    (small_disk / "filler").write_bytes(b"0" * (os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize))
    assert "No space left" in one_line(LatentlineError, lambda: commit(cache, "2" * 40, ROWS))
    assert cache.shard_ids("latents").to_pylist() == ["1" * 40]
    assert len(cache.rows("latents")) == 3
    assert len(list(Path(cache.url).rglob("*.tar*"))) == 1
    (small_disk / "filler").unlink()
    assert commit(cache, "2" * 40, ROWS)


def test_a_read_only_cache_can_be_read_and_refuses_writing_clearly(small_disk):
    cache = Cache(str(small_disk / "cache"), create=True)
    commit(cache, "1" * 40, ROWS)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    again = Cache(str(small_disk / "cache"))
    assert len(again.rows("latents")) == 3
    message = one_line(LatentlineError, lambda: commit(again, "2" * 40, ROWS))
    assert "Read-only file system" in message
    assert "entries/latents" in message


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_write_permission_refuses_clearly(tmp_path):
    cache = Cache(str(tmp_path / "cache"), create=True)
    os.chmod(cache.store.root, stat.S_IRUSR | stat.S_IXUSR)
    try:
        assert "Permission denied" in one_line(LatentlineError, lambda: commit(cache, "2" * 40, ROWS))
    finally:
        os.chmod(cache.store.root, stat.S_IRWXU)


class _CarelessStore(BaseHTTPRequestHandler):
    """The few S3 operations a put needs, with If-None-Match ignored, as some S3-like servers do."""

    objects: dict[str, bytes]

    def do_PUT(self) -> None:
        self.objects[self.path] = self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(200)

    def do_HEAD(self) -> None:
        self._answer(200 if self.path in self.objects else 404)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        keys = re.findall("<Key>(.*?)</Key>", body)
        for key in keys:
            self.objects.pop(f"/bucket/{key}", None)
        deleted = "".join(f"<Deleted><Key>{key}</Key></Deleted>" for key in keys)
        self._answer(200, f"<DeleteResult>{deleted}</DeleteResult>".encode())

    def do_GET(self) -> None:
        self._answer(200 if self.path in self.objects else 404, self.objects.get(self.path, b""))

    def _answer(self, status: int, body: bytes = b"") -> None:
        self.send_response(status)
        self.send_header("ETag", '"1"')
        self.send_header("Last-Modified", "Sat, 01 Jan 2000 00:00:00 GMT")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        return


@pytest.mark.parametrize("objects", [{}, {"/bucket/cache/format.json": b'{"format": 1}'}], ids=["new", "copied there"])
def test_a_store_that_lets_writers_replace_each_other_is_refused_for_writing(monkeypatch, objects):
    before = dict(objects)
    handler = type("Handler", (_CarelessStore,), {"objects": objects})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name, value in {
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "y",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
        "AWS_ALLOW_HTTP": "true",
    }.items():
        monkeypatch.setenv(name, value)
    try:
        message = one_line(UsageError, lambda: Cache("s3://bucket/cache", create=True))
        assert "put-if-absent" in message
        assert handler.objects == before
    finally:
        server.shutdown()
        server.server_close()
