"""Parquet tables with a JSON footer, to and from bytes."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from manifests.errors import CorruptError
from manifests.schema import OPTIONAL

TEXT = pa.dictionary(pa.int32(), pa.string())
"""Type of a column of text that holds each of its values once."""

_FOOTER = b"latentline"
_ROW_GROUP = 131_072


def table_bytes(table: pa.Table, footer: Mapping[str, Any], schema: pa.Schema | None = None) -> bytes:
    """Write a table as Parquet (zstd) with `footer` as JSON in the file's key-value metadata.

    schema: what the columns are cast to, a piece at a time; default: what they are. Columns of `OPTIONAL` without a
    value are left out.
    """
    names = [name for name in table.column_names if name not in OPTIONAL or table[name].null_count < len(table)]
    if len(names) < len(table.column_names):
        schema = schema and pa.schema([schema.field(name) for name in names])
        table = table.select(names)
    text = json.dumps(footer, sort_keys=True)
    schema = (schema or table.schema).with_metadata({_FOOTER: text.encode()})
    buffer = io.BytesIO()
    with pq.ParquetWriter(buffer, schema, compression="zstd", write_page_checksum=True) as writer:
        for begin in range(0, max(1, len(table)), _ROW_GROUP):
            writer.write_table(table.slice(begin, _ROW_GROUP).cast(schema))
    return buffer.getvalue()


def read_table(
    data: bytes,
    schema: pa.Schema,
    where: str,
    columns: Sequence[str] | None = None,
    *,
    dictionary: Sequence[str] = (),
) -> tuple[pa.Table, dict[str, Any]]:
    """Read what `table_bytes` wrote: all columns of `schema`, or the given ones, and the footer.

    dictionary: columns of text to hold each value of once, because they have few.
    `CorruptError` naming `where` if it is torn, its pages fail their checksums, or it is of another schema.
    """
    columns = schema.names if columns is None else list(columns)
    try:
        source = pa.BufferReader(data)
        file = pq.ParquetFile(source, page_checksum_verification=True, read_dictionary=list(dictionary))
        found = file.schema_arrow
        footer = (found.metadata or {}).get(_FOOTER)
        if dictionary:
            schema = pa.schema([field.with_type(TEXT) if field.name in dictionary else field for field in schema])
        wrong = [] if found.remove_metadata().equals(schema) else _wrong(found, schema)
        if not wrong and footer is not None:
            known = set(found.names)
            there = [name for name in columns if name in known]
            table = file.read(columns=there, use_threads=False).select(there).replace_schema_metadata(None)
            for place, name in enumerate(columns):
                if name not in known:
                    table = table.add_column(place, schema.field(name), pa.nulls(len(table), schema.field(name).type))
            return table, json.loads(footer)
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CorruptError(f"{where}: not a readable Parquet file: {reason}") from error
    what = f"its columns are not those expected ({', '.join(wrong)})" if wrong else "it has no latentline footer"
    raise CorruptError(f"{where}: {what}; was it written by latentline?")


def _wrong(found: pa.Schema, schema: pa.Schema) -> list[str]:
    """Names of the columns that are missing or of another type; others may be there too."""
    known = {field.name: field for field in found}
    return [
        field.name
        for field in schema
        if (known[field.name] != field if field.name in known else field.name not in OPTIONAL)
    ]
