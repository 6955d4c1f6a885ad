import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manifests.errors import CorruptError
from manifests.schema import MANIFEST, PLAN, SNAPSHOT
from manifests.tables import read_table, table_bytes
from tests.manifests.filled import latents_row, make_cache

ROW = latents_row("a") | {
    "status": "ok", "error": None, "shard": "x.tar", "offset": 512, "size": 9, "checksum": "0" * 64, "shape": [1, 2],
    "dtype": "bfloat16",
}  # fmt: skip
TABLE = pa.Table.from_pylist([ROW], schema=MANIFEST)
DATA = table_bytes(TABLE, {"format": 1, "fingerprint": {"vae": "x"}})


@settings(max_examples=20)
@given(footer=st.dictionaries(st.text(), st.none() | st.integers() | st.text() | st.lists(st.text()), max_size=4))
def test_tables_and_footers_come_back_as_they_were(footer):
    table, found = read_table(table_bytes(TABLE, footer), MANIFEST, "here")
    assert table.equals(TABLE)
    assert found == footer


def test_some_columns_can_be_read_alone():
    table, _ = read_table(DATA, MANIFEST, "here", ["status", "key"])
    assert table.to_pylist() == [{"status": "ok", "key": ROW["key"]}]


def one_line(data: bytes, schema: pa.Schema = MANIFEST) -> str:
    with pytest.raises(CorruptError) as caught:
        read_table(data, schema, "cache/entries/x.parquet")
    message = str(caught.value)
    assert message.startswith("cache/entries/x.parquet: ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize("size", [0, 3, 4, 100, len(DATA) // 2, len(DATA) - 8, len(DATA) - 1])
def test_a_truncated_table_is_one_clear_line(size):
    one_line(DATA[:size])


def test_a_flipped_bit_in_the_rows_is_caught():
    position = DATA.index(ROW["key"][:8].encode()) if ROW["key"][:8].encode() in DATA else 60
    one_line(DATA[:position] + bytes([DATA[position] ^ 1]) + DATA[position + 1 :])


def test_a_foreign_parquet_file_is_refused(tmp_path):
    pq.write_table(pa.table({"key": ["a"]}), tmp_path / "a")
    assert "columns" in one_line((tmp_path / "a").read_bytes())
    pq.write_table(TABLE, tmp_path / "b")
    assert "footer" in one_line((tmp_path / "b").read_bytes())
    assert "shard_id" in one_line(DATA, PLAN)
    assert "columns" in one_line(b"".join([DATA]), SNAPSHOT)


def test_a_column_of_another_type_is_refused():
    index = MANIFEST.get_field_index("size")
    other = TABLE.set_column(index, "size", TABLE["size"].cast(pa.string()))
    assert "size" in one_line(table_bytes(other, {}))


def test_duckdb_and_pyarrow_read_a_caches_tables(tmp_path):
    root = make_cache(tmp_path / "cache").store.root
    entries, snapshots = f"'{root}/entries/latents/*.parquet'", f"'{root}/snapshots/*.parquet'"
    query = f"select count(*), count(distinct key) from {entries} where status = 'ok'"
    assert duckdb.sql(query).fetchall() == [(6, 6)]
    query = (
        f"select count(*) from {snapshots} s join {entries} e on s.latents_key = e.key and latents_offset = e.offset"
    )
    assert duckdb.sql(query).fetchall() == [(6,)]
    for path in root.glob("*/*/*.parquet"):
        assert pq.read_table(path).num_rows
