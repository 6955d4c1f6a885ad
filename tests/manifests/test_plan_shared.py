"""Jobs that want some of the same entries, in one cache."""

from manifests.cache import Cache
from manifests.plan import adopt_plan, missing_entries
from tests.manifests.filled import PARTS, commit, fill, wanted_table

SIZES = {"latents": 2, "context": 1}


def test_what_another_job_encoded_meanwhile_is_not_encoded_again(tmp_path):
    """A job that was killed goes on with its plan, where shards of contexts may have nothing missing any more."""
    cache = Cache(str(tmp_path / "cache"), create=True)
    mine, others = wanted_table(["a", "b"], [0, 4]), wanted_table(["a", "b"], [8])

    def adopt():
        missing = missing_entries(cache, mine)
        return missing, adopt_plan(cache, mine, missing, SIZES, {"fingerprints": PARTS})

    _, plan = adopt()
    first = next(plan.tasks())
    commit(cache, first.shard_id, first.rows)
    fill(cache, others)
    missing, again = adopt()
    assert again.plan_id == plan.plan_id
    assert set(missing["kind"].to_pylist()) == {"latents"}
    assert [task.kind for task in again.tasks()] == ["latents", "latents"]
    for task in again.tasks():
        commit(cache, task.shard_id, task.rows)
    assert not len(missing_entries(cache, mine))
