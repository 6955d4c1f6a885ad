import contextlib

import duckdb
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manifests.errors import UsageError
from manifests.filters import matching

TABLE = pa.table(
    {
        "dataset": ["gr1", "gr1", "droid", None, "it's"],
        "caption": ["a robot", "A Robot arm", "two robots", None, "100%"],
        "start": pa.array([0, 8, 16, 24, None], pa.int64()),
        "fps": pa.array([16.0, None, 30.0, -0.5, 16.0], pa.float64()),
        "shape": pa.array([[1], [2], [3], [4], [5]], pa.list_(pa.int32())),
    }
)
COMPARISONS = ["=", "!=", "<>", "<", "<=", ">", ">="]
TERMS = [
    *(f"start {sign} {value}" for sign in COMPARISONS for value in (-1, 0, 8, 12, 24)),
    *(f"fps {sign} {value}" for sign in COMPARISONS for value in ("16", "-0.5", "30.0", "1.6e1")),
    *(f"dataset {sign} {value}" for sign in COMPARISONS for value in ("'gr1'", "'it''s'", "''")),
    *(f"caption {word} {value}" for word in ("like", "NOT LIKE") for value in ("'%robot%'", "'a _obot'", "'100%'")),
    *(f"start {word} (0, 16, 99)" for word in ("in", "not in")),
    *(f"{name} {word}" for name in ("start", "fps", "caption") for word in ("is null", "IS NOT NULL")),
]
CONDITION = st.recursive(
    st.sampled_from(TERMS),
    lambda inner: st.one_of(
        st.builds("{} and {}".format, inner, inner),
        st.builds("{} OR {}".format, inner, inner),
        st.builds("not ({})".format, inner),
        st.builds("({})".format, inner),
    ),
    max_leaves=5,
)


@settings(max_examples=150)
@given(where=CONDITION)
def test_conditions_choose_what_sql_does(where):
    data = TABLE
    expected = duckdb.sql(f"select start, caption from data where {where}").fetchall()
    found = matching(data, where)
    assert [(row["start"], row["caption"]) for row in found.select(["start", "caption"]).to_pylist()] == expected


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("", "expected a column"),
        ("start", "expected a comparison"),
        ("start =", "expected a value, but it ends"),
        ("start = 1 and", "expected a column, but it ends"),
        ("start = 1 dataset = 'a'", "expected and, or, or the end, but there is 'dataset'"),
        ("(start = 1", r"expected '\)'"),
        ("satrt = 1", "no column 'satrt'; did you mean 'start'"),
        ("shape = 1", "no column 'shape'"),
        ("start = 'a'", "start is a column of int64, 'a' is not"),
        ("dataset = 3", "dataset is a column of string, 3 is not"),
        ("start like 3", "like needs a pattern"),
        ("start = 1; drop table x", "cannot read it from '; drop table x'"),
        ("__import__('os')", "no column '__import__'"),
        ("start = start", "expected a value"),
        ("dataset = 'a", "cannot read it"),
        ("(" * 80 + "start = 1" + ")" * 80, "deep"),
        ("not in (1)", "expected a column"),
    ],
)
def test_what_makes_no_sense_is_one_clear_line(where, message):
    with pytest.raises(UsageError, match=message) as caught:
        matching(TABLE, where)
    assert "\n" not in str(caught.value)


@settings(max_examples=200)
@given(where=st.text("adnorti ='()<>%123;._", max_size=30) | st.text(max_size=20))
def test_no_text_does_anything_but_choose_rows_or_be_refused(where):
    with contextlib.suppress(UsageError):
        assert len(matching(TABLE, where)) <= len(TABLE)
