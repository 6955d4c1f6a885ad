"""What several tests of the cache read."""

import pytest

from manifests.store import Store


@pytest.fixture
def remote(tmp_path):
    """A store with 40 objects of 1,000 bytes."""
    store = Store(tmp_path / "remote", create=True)
    for number in range(40):
        store.write(f"entries/{number:02d}", bytes([number]) * 1000)
    return store
