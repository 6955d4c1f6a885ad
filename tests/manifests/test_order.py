import itertools
import resource
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manifests.order import Order

SIZES = st.integers(1, 300)
SEEDS = st.integers(0, 2**63)


def take(order: Order, begin: int, count: int, world_size: int) -> list[tuple[int, int]]:
    """What `world_size` ranks see of `count` positions, each reading its own stripe."""
    return [order[p] for rank in range(world_size) for p in range(begin + rank, begin + count, world_size)]


@given(num_samples=SIZES, seed=SEEDS, epochs=st.integers(1, 3), data=st.data())
def test_every_sample_once_an_epoch_for_any_world_sizes_and_interruptions(num_samples, seed, epochs, data):
    total = num_samples * epochs
    cuts = sorted(data.draw(st.lists(st.integers(0, total), max_size=4)))
    seen: Counter[tuple[int, int]] = Counter()
    for begin, end in zip([0, *cuts], [*cuts, total], strict=True):
        world_size = data.draw(st.integers(1, 8))
        # A restart has nothing but the snapshot, the seed and how far the run was.
        seen.update(take(Order("snapshot", seed, num_samples), begin, end - begin, world_size))
    assert seen == Counter((epoch, sample) for epoch in range(epochs) for sample in range(num_samples))


@given(num_samples=st.integers(20, 300), seed=SEEDS)
def test_epochs_seeds_and_snapshots_have_orders_of_their_own(num_samples, seed):
    def epoch(order: Order, number: int) -> list[int]:
        return [order[number * num_samples + p][1] for p in range(num_samples)]

    first = epoch(Order("a", seed, num_samples), 0)
    assert first == epoch(Order("a", seed, num_samples), 0)
    assert first != epoch(Order("a", seed, num_samples), 1)
    assert first != epoch(Order("a", seed + 1, num_samples), 0)
    assert first != epoch(Order("b", seed, num_samples), 0)


@settings(max_examples=20)
@given(position=st.integers(0, 10**12), seed=SEEDS)
def test_a_hundred_million_samples_are_ordered_index_by_index(position, seed):
    epoch, sample = Order("snapshot", seed, 10**8)[position]
    assert epoch == position // 10**8
    assert 0 <= sample < 10**8


def test_a_hundred_million_samples_cost_no_memory():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    order = Order("snapshot", 1, 10**8)
    stretch = [order[10**8 + p * 997][1] for p in range(20_000)]
    assert len(set(stretch)) == len(stretch)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 16 * 1024


def test_first_and_last_places_are_fair():
    num_samples, draws = 7, 7000
    for place in (0, num_samples - 1):
        counts = Counter(Order("snapshot", seed, num_samples)[place][1] for seed in range(draws))
        expected = draws / num_samples
        chi_squared = sum((counts[sample] - expected) ** 2 / expected for sample in range(num_samples))
        assert chi_squared < 25  # 6 degrees of freedom: exceeded once in 3,000 fair tables


def test_neighbours_do_not_stay_neighbours():
    order = Order("snapshot", 3, 10_000)
    samples = [order[p][1] for p in range(10_000)]
    close = sum(abs(a - b) == 1 for a, b in itertools.pairwise(samples))
    assert close < 15  # 2 expected


def test_one_sample_is_an_order_and_none_is_not():
    assert [Order("snapshot", 0, 1)[p] for p in range(3)] == [(0, 0), (1, 0), (2, 0)]
    with pytest.raises(ValueError, match="at least one"):
        Order("snapshot", 0, 0)
    with pytest.raises(IndexError):
        Order("snapshot", 0, 3)[-1]
