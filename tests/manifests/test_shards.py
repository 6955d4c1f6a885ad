import io
import json
import tarfile

import pytest
import safetensors.torch
import torch
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from manifests.errors import CorruptError
from manifests.places import Location
from manifests.shards import Entry, pack, read_payload, read_tensors
from manifests.store import Store
from tests.manifests.filled import flip_bit

KEYS = st.lists(st.text("abcXYZ019_-", min_size=1, max_size=40), min_size=1, max_size=5, unique=True)


def entries(keys: list[str], shape: tuple[int, ...] = (3, 4)) -> list[Entry]:
    return [Entry(key, {"latents": torch.full(shape, i + 0.5)}, {"start": i}) for i, key in enumerate(keys)]


@pytest.fixture
def shard(tmp_path):
    """(store, path in it, members) of a shard of three entries."""
    store = Store(tmp_path, create=True)
    data, members = pack(entries(["a", "b", "c"], (40, 40)))
    store.write("entries/latents/s.0.tar", data)
    return store, tmp_path / "entries/latents/s.0.tar", members


def location(member) -> Location:
    return Location("entries/latents/s.0.tar", member.offset, member.size, member.checksum)


@settings(max_examples=25)
@given(keys=KEYS)
def test_equal_entries_give_equal_bytes(keys):
    assert pack(entries(keys)) == pack(entries(keys))


@settings(max_examples=25)
@given(keys=KEYS)
def test_members_are_where_they_are_said_to_be(keys):
    data, members = pack(entries(keys))
    for index, member in enumerate(members):
        tensors = safetensors.torch.load(data[member.offset : member.offset + member.size])
        assert member.key == keys[index]
        assert (member.shape, member.dtype) == ((3, 4), "float32")
        assert member.offset % 512 == 0
        assert torch.equal(tensors["latents"], torch.full((3, 4), index + 0.5))


def test_stock_webdataset_reads_a_shard(tmp_path):
    path = tmp_path / "shard.tar"
    path.write_bytes(pack(entries(["a1", "b-2", "c_3"]))[0])
    samples = list(webdataset.WebDataset(str(path), shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == ["a1", "b-2", "c_3"]
    assert [json.loads(sample["json"]) for sample in samples] == [{"start": i} for i in range(3)]
    for index, sample in enumerate(samples):
        assert torch.equal(safetensors.torch.load(sample["safetensors"])["latents"], torch.full((3, 4), index + 0.5))


def test_a_shard_is_a_plain_tar_without_times_or_owners():
    with tarfile.open(fileobj=io.BytesIO(pack(entries(["a"]))[0])) as tar:
        assert {(member.mtime, member.isreg()) for member in tar} == {(0, True)}


@pytest.mark.parametrize("key", ["", "a.b", "a/b", "../a", "ä", "a b"])
def test_a_key_that_a_tar_reader_would_cut_or_move_is_refused(key):
    with pytest.raises(ValueError, match="malformed"):
        pack([Entry(key, {"x": torch.zeros(1)}, {})])


def test_a_repeated_key_is_refused():
    with pytest.raises(ValueError, match="repeated"):
        pack(entries(["a", "a"]))


def test_entries_are_read_back_bit_for_bit(shard):
    store, _, members = shard
    for index, member in enumerate(members):
        assert torch.equal(read_tensors(store, location(member))["latents"], torch.full((40, 40), index + 0.5))


@pytest.mark.parametrize("where", ["member boundary", "next header", "payload"])
def test_a_truncated_shard_gives_the_entries_before_the_cut_and_an_error_after(shard, where):
    store, path, members = shard
    # Each entry is a header, its json, a header, its safetensors: the third begins two blocks before its payload.
    cut = {
        "member boundary": members[2].offset - 512 * 3,
        "next header": members[2].offset - 100,
        "payload": members[2].offset + members[2].size // 2,
    }[where]
    path.write_bytes(path.read_bytes()[:cut])
    assert read_payload(store, location(members[1]))
    with pytest.raises(CorruptError, match="ends") as caught:
        read_payload(store, location(members[2]))
    assert "s.0.tar" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("offset", [0, 7, 8, 40, 1000, 6000])
def test_one_flipped_bit_in_a_payload_is_caught(shard, offset):
    store, path, members = shard
    flip_bit(path, members[1].offset + offset)
    with pytest.raises(CorruptError, match="checksum"):
        read_payload(store, location(members[1]))
    assert read_payload(store, location(members[0]))


def test_a_flipped_bit_in_a_tar_header_loses_nothing_since_entries_are_read_by_offset(shard):
    store, path, members = shard
    flip_bit(path, members[1].offset - 512 + 124)
    for index, member in enumerate(members):
        assert torch.equal(read_tensors(store, location(member))["latents"], torch.full((40, 40), index + 0.5))


def test_a_missing_shard_is_an_error_that_names_it(shard):
    store, path, members = shard
    path.unlink()
    with pytest.raises(CorruptError, match=r"s\.0\.tar: missing"):
        read_payload(store, location(members[0]))
