import threading
from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manifests.cache import Cache
from manifests.errors import UsageError
from manifests.plan import TAG_DIGITS, adopt_plan, make_plan, missing_entries, plan_tag, read_plan, task_of
from manifests.schema import KINDS
from tests.manifests.filled import PARTS, commit, fill, wanted_table

SIZES = {"latents": 2, "context": 3}
WANTED = wanted_table(["a", "b", "c", "d"], [0, 4, 8])
FOOTER = {"fingerprints": PARTS}


@pytest.fixture
def cache(tmp_path):
    return Cache(str(tmp_path / "cache"), create=True)


def adopt(cache: Cache, wanted=WANTED):
    return adopt_plan(cache, wanted, missing_entries(cache, wanted), SIZES, FOOTER)


def keys_of(tasks) -> list[str]:
    return sorted(row["key"] for task in tasks for row in task.rows)


@given(total=st.integers(1, 8), sizes=st.fixed_dictionaries(dict.fromkeys(KINDS, st.integers(1, 7))))
@settings(max_examples=25)
def test_tasks_of_all_workers_are_every_missing_entry_once(total, sizes):
    plan = make_plan("p", WANTED, sizes, FOOTER)
    tasks = [list(plan.tasks(index=index, total=total)) for index in range(total)]
    assert keys_of(chain(*tasks)) == sorted(WANTED["key"].to_pylist())
    for index, mine in enumerate(tasks):
        assert {task_of(task.shard_id, total) for task in mine} <= {index}
    for task in plan.tasks():
        assert len(task.rows) <= sizes[task.kind]
        assert {row["kind"] for row in task.rows} == {task.kind}


def test_workers_get_even_shares():
    plan = make_plan("p", wanted_table([str(i) for i in range(400)]), {"latents": 1, "context": 1}, FOOTER)
    shares = [sum(1 for _ in plan.tasks(index=index, total=4)) for index in range(4)]
    assert min(shares) > 150


def test_contexts_come_first_and_windows_of_a_video_lie_together():
    tasks = list(make_plan("p", WANTED, {"latents": 3, "context": 9}, FOOTER).tasks())
    assert [task.kind for task in tasks] == ["context"] + ["latents"] * 4
    for task in tasks[1:]:
        assert len({row["source"] for row in task.rows}) == 1
        assert [row["start"] for row in task.rows] == [0, 4, 8]


def test_shards_of_a_plan_lie_side_by_side_in_a_listing():
    plan = make_plan("p", WANTED, SIZES, FOOTER)
    assert {task.shard_id[:TAG_DIGITS] for task in plan.tasks()} == {plan_tag("p")}
    assert len({task.shard_id for task in plan.tasks()}) == 6 + 2


def test_drivers_that_start_together_agree_on_one_plan(cache):
    barrier = threading.Barrier(4)
    plans = []

    def drive() -> None:
        mine = Cache(cache.url)
        barrier.wait()
        plans.append(adopt(mine))

    threads = [threading.Thread(target=drive) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({plan.plan_id for plan in plans}) == 1
    assert all(plan.table.equals(plans[0].table) for plan in plans)
    assert len(list(cache.store.list("plans"))) == 1


def test_a_driver_that_starts_again_finds_what_is_left_of_the_same_plan(cache):
    first = adopt(cache)
    done = list(first.tasks())[:3]
    for task in done:
        commit(cache, task.shard_id, task.rows)
    second = adopt(cache)
    assert second.plan_id == first.plan_id
    assert {task.shard_id for task in second.tasks()} == {task.shard_id for task in first.tasks()} - {
        task.shard_id for task in done
    }


def test_a_driver_whose_data_grew_makes_a_plan_of_the_new_entries_alone(cache):
    fill(cache, WANTED)
    more = wanted_table(["a", "b", "c", "d", "e"], [0, 4, 8])
    plan = adopt(cache, more)
    assert plan.num_entries == 4
    assert {row["source"] for task in plan.tasks() for row in task.rows if task.kind == "latents"} == {"/videos/e.mp4"}


def test_a_repair_is_planned_anew_in_the_shard_it_was_in(cache):
    fill(cache, WANTED)
    assert not len(missing_entries(cache, WANTED))
    shard_id = cache.shard_ids("latents")[2].as_py()
    lost = cache.manifest("latents", shard_id)[0]["key"].to_pylist()
    cache.store.delete(f"entries/latents/{shard_id}.parquet")
    plan = adopt(cache)
    assert keys_of(plan.tasks()) == sorted(lost)
    assert [task.shard_id for task in plan.tasks()] == [shard_id]


def test_quarantined_entries_are_missing_only_to_those_who_retry(cache):
    rows = [row | {"error": "broken"} for row in WANTED.slice(0, 3).to_pylist()]
    commit(cache, "5" * 40, rows)
    assert len(missing_entries(cache, WANTED)) == len(WANTED) - 3
    assert len(missing_entries(cache, WANTED, retry_quarantined=True)) == len(WANTED)


def test_an_entry_encoded_after_a_quarantine_replaces_it(cache):
    rows = WANTED.slice(0, 2).to_pylist()
    commit(cache, "1" * 40, [row | {"error": "broken"} for row in rows])
    commit(cache, "2" * 40, rows)
    assert cache.index("latents")["status"].to_pylist() == ["ok", "ok"]


def test_no_cache_lacks_everything():
    assert missing_entries(None, WANTED).equals(WANTED)


def test_an_unknown_plan_is_a_usage_error(cache):
    with pytest.raises(UsageError, match="no plan"):
        read_plan(cache, "nope")
