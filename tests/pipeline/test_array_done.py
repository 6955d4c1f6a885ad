from __future__ import annotations

from tests.command import latentline
from tests.pipeline.places import Place


def test_an_array_task_that_comes_when_all_is_done_has_nothing_to_do(encoded: Place) -> None:
    outcome = latentline("encode", encoded.recipe, "--task", "5", "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["samples"] == 8
    assert sum(outcome.json["encoded"].values()) == 0
