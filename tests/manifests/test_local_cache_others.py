"""A local cache in a folder that has other things in it."""

import os

import pytest

from manifests.errors import UsageError
from manifests.local_cache import CachedStore


def test_files_of_the_users_are_neither_counted_nor_removed(remote, tmp_path):
    local = tmp_path / "scratch"
    mine = [
        local / "v1" / "clip.mp4",
        local / "00" / ".notes",
        local / "ab" / ("c" * 38),
        local / "ab" / "folder" / "x",
    ]
    for path in mine:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * 5000)
        os.utime(path, (0, 0))
    store = CachedStore(remote.url, local, 11_000)
    for number in range(40):
        store.read_range(f"entries/{number:02d}", 0, 1000)
    CachedStore(remote.url, local, 5000)
    assert all(path.read_bytes() == b"x" * 5000 for path in mine)
    kept = [path for path in local.glob("??/*") if path.is_file() and path not in mine]
    assert 0 < len(kept) <= 4


@pytest.mark.parametrize("inside", [".", "local"])
def test_the_cache_itself_is_refused(remote, tmp_path, inside):
    with pytest.raises(UsageError, match="choose another folder"):
        CachedStore(remote.url, tmp_path / "remote" / inside, 10_000)
    assert [path.name for path in (tmp_path / "remote").iterdir()] == ["entries"]
