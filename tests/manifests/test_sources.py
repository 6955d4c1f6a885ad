from manifests.cache import Cache
from manifests.sources import SourceFacts, SourceMemory


def facts(name: str, **other) -> SourceFacts:
    known = {"location": f"/videos/{name}", "size": 10, "modified_ns": 1, "source_hash": "a" * 40}
    return SourceFacts(**(known | {"source_frames": 17, "source_fps": 16.0, "height": 64, "width": 96} | other))


def remembered(cache: Cache, fact: SourceFacts) -> SourceFacts | None:
    return SourceMemory(cache).get(fact.location, fact.size, fact.modified_ns)


def test_facts_are_remembered_by_location_size_and_time_of_change(tmp_path):
    cache = Cache(str(tmp_path / "cache"), create=True)
    steady, varying = facts("a"), facts("b", frame_times=[0.0, 0.04, 0.1])
    broken = facts("c", source_frames=None, source_fps=None, height=None, width=None, error="no video stream")
    memory = SourceMemory(cache)
    for fact in (steady, varying, broken):
        assert memory.get(fact.location, fact.size, fact.modified_ns) is None
        memory.add(fact)
        assert memory.get(fact.location, fact.size, fact.modified_ns) == fact
    memory.save()
    for fact in (steady, varying, broken):
        assert remembered(cache, fact) == fact
    assert SourceMemory(cache).get("/videos/a", 11, 1) is None
    assert SourceMemory(cache).get("/videos/a", 10, 2) is None


def test_nothing_new_writes_nothing(tmp_path):
    cache = Cache(str(tmp_path / "cache"), create=True)
    for _ in range(3):
        memory = SourceMemory(cache)
        memory.add(facts("a"))
        memory.save()
        memory.save()
    assert len(cache.store.list("sources")) == 1


def test_drivers_at_work_together_lose_nothing_of_each_other(tmp_path):
    cache = Cache(str(tmp_path / "cache"), create=True)
    one, two = SourceMemory(cache), SourceMemory(cache)
    one.add(facts("a"))
    two.add(facts("b"))
    two.add(facts("a"))
    one.save()
    two.save()
    assert remembered(cache, facts("a")) == facts("a")
    assert remembered(cache, facts("b")) == facts("b")


def test_a_changed_file_is_known_in_its_latest_form(tmp_path):
    cache = Cache(str(tmp_path / "cache"), create=True)
    for modified, value in ((1, "a"), (2, "b")):
        memory = SourceMemory(cache)
        memory.add(facts("a", modified_ns=modified, source_hash=value * 40))
        memory.save()
    assert remembered(cache, facts("a", modified_ns=2)).source_hash == "b" * 40


def test_without_a_cache_nothing_is_kept():
    memory = SourceMemory(None)
    memory.add(facts("a"))
    assert memory.get("/videos/a", 10, 1) == facts("a")
    memory.save()
