"""How a sample is shared out: which tokens, which rows of modulation, and which numbers of ranks it allows."""

import pytest
import torch

from manifests.errors import UsageError
from train.context_parallel import Context, check_divides, own_rows, own_tokens, sharing

SMALL, LARGE = (16, 24, 54, 96), (16, 24, 88, 160)
TOKENS = {SMALL: 31_104, LARGE: 84_480}


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 8])
def test_the_sizes_of_cosmos_go_to_2_to_8_ranks(ranks):
    check_divides(ranks, TOKENS)


def test_a_number_that_does_not_divide_is_refused_with_those_that_do():
    check_divides(5, {LARGE: 84_480})
    with pytest.raises(UsageError, match=r"31,104 tokens of samples of 16x24x54x96; .* allows 1, 2, 3, 4, 6, 8$"):
        check_divides(5, TOKENS)


@pytest.mark.parametrize(("frames", "frame", "ranks"), [(24, 1296, 8), (24, 3520, 3), (4, 6, 3), (3, 8, 4), (3, 7, 7)])
@pytest.mark.parametrize("times", ["per frame", "one"])
def test_every_token_keeps_the_modulation_of_its_frame(frames, frame, ranks, times):
    rows_BTC = torch.arange(frames if times == "per frame" else 1.0).reshape(1, -1, 1)
    tokens = frames * frame
    expected = rows_BTC.repeat_interleave(tokens // rows_BTC.shape[1], 1)
    shares = []
    for rank in range(ranks):
        with sharing(Context(rank, ranks, "unused")):
            own = own_tokens(expected, 1)
            rows = own_rows(rows_BTC, tokens)
        assert torch.equal(rows.repeat_interleave(own.shape[1] // rows.shape[1], 1), own)
        if frames % ranks == 0 and times == "per frame":
            assert rows.shape[1] == frames // ranks
        shares.append(own)
    assert torch.equal(torch.cat(shares, 1), expected)


def test_alone_nothing_is_shared():
    x = torch.zeros(1, 6, 2)
    with sharing(None):
        assert own_tokens(x, 1) is x
        assert own_rows(x, 6) is x
