"""The order of prompts is a function of seed and step, whatever the number of ranks."""

import itertools

import numpy as np
import pytest

from opd.data.stream import PromptGroup, ShuffledPrompts
from opd.types import Prompt


def prompts(count):
    return [Prompt(uid=str(i), token_ids=np.array([i], dtype=np.int32)) for i in range(count)]


def uids(stream, *steps):
    return [prompt.uid for step in steps for prompt in stream.take(step)]


def test_a_step_asked_again_gives_the_same_prompts():
    stream, again = (ShuffledPrompts(prompts(10), per_step=3, seed=1) for _ in range(2))
    late = uids(stream, 7)
    assert [uids(stream, step) for step in range(9)][7] == late == uids(again, 7)


@pytest.mark.parametrize("size", [2, 3, 5, 8])
def test_the_global_batch_does_not_depend_on_the_number_of_ranks(size):
    data = prompts(12)
    whole = ShuffledPrompts(data, per_step=7, seed=0)
    shares = [ShuffledPrompts(data, per_step=7, seed=0, rank=r, size=size) for r in range(size)]
    for step in range(5):
        parts = [uids(share, step) for share in shares]
        assert sorted(itertools.chain(*parts)) == sorted(uids(whole, step))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_an_epoch_holds_each_prompt_once_and_the_next_is_ordered_anew():
    stream = ShuffledPrompts(prompts(12), per_step=4, seed=5)
    epochs = [uids(stream, 0, 1, 2), uids(stream, 3, 4, 5)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(map(str, range(12)))
    assert epochs[0] != epochs[1]


def test_prompts_left_at_the_end_of_an_epoch_get_their_turn():
    stream = ShuffledPrompts(prompts(7), per_step=4, seed=0)
    batches = [uids(stream, step) for step in range(20)]
    assert all(len(set(batch)) == 4 for batch in batches)
    assert len(set(itertools.chain(*batches))) == 7


def test_another_seed_gives_another_order():
    first, other = (ShuffledPrompts(prompts(50), per_step=50, seed=seed) for seed in (0, 1))
    assert uids(first, 0) != uids(other, 0)


@pytest.mark.parametrize("per_step", [0, 4])
def test_a_batch_larger_than_the_data_is_refused(per_step):
    with pytest.raises(ValueError, match="allowed: 1 to 3"):
        ShuffledPrompts(prompts(3), per_step=per_step, seed=0)


def mixture(*sizes_and_weights):
    return [
        PromptGroup(name=f"g{number}", size=size, weight=weight)
        for number, (size, weight) in enumerate(sizes_and_weights)
    ]


def drawn(batch, groups):
    """How many prompts of each group are in a batch."""
    ends = np.cumsum([group.size for group in groups])
    return np.bincount(
        np.searchsorted(ends, [int(u) for u in batch], side="right"), minlength=len(ends)
    )


@pytest.mark.parametrize("weights", [(1, 1), (3, 1), (0.5, 0.3, 0.2), (1, 30), (7, 1, 1, 1)])
def test_each_source_gets_its_share_of_every_step(weights):
    groups = mixture(*((200, weight) for weight in weights))
    stream = ShuffledPrompts(prompts(200 * len(weights)), per_step=10, seed=0, groups=groups)
    share = 10 * np.array(weights) / sum(weights)
    total = np.zeros(len(weights))
    for step in range(60):
        batch = uids(stream, step)
        assert len(set(batch)) == 10, "no prompt twice in a batch"
        counts = drawn(batch, groups)
        assert np.abs(counts - share).max() < len(weights)
        total += counts
        assert np.abs(total - (step + 1) * share).max() < len(weights), (
            "the total is right at any step"
        )


def test_a_weighted_source_has_epochs_of_its_own():
    groups = mixture((6, 1), (60, 1))
    stream = ShuffledPrompts(prompts(66), per_step=6, seed=2, groups=groups)
    small = [[int(u) for u in uids(stream, step) if int(u) < 6] for step in range(8)]
    large = [u for step in range(20) for u in uids(stream, step) if int(u) >= 6]
    for first, second in zip(small[::2], small[1::2], strict=True):
        assert sorted(first + second) == list(range(6)), "two steps are an epoch of the small one"
    assert small[:2] != small[2:4]
    assert len(set(large)) == len(large) == 60, "twenty steps are one of the large one"


def test_a_mixed_step_asked_again_or_by_more_ranks_gives_the_same_prompts():
    groups = mixture((30, 2), (11, 1), (50, 1))
    whole = ShuffledPrompts(prompts(91), 9, seed=4, groups=groups)
    forward = [uids(whole, step) for step in range(25)]
    resumed = ShuffledPrompts(prompts(91), 9, seed=4, groups=groups)
    assert [uids(resumed, step) for step in (24, 7, 8, 0)] == [forward[s] for s in (24, 7, 8, 0)]
    shares = [ShuffledPrompts(prompts(91), 9, 4, rank, 2, groups) for rank in range(2)]
    for step in (0, 13):
        parts = [uids(share, step) for share in shares]
        assert sorted(parts[0] + parts[1]) == sorted(forward[step])


def test_sources_without_weights_are_one_pool():
    pool = ShuffledPrompts(prompts(40), 8, seed=1, groups=mixture((10, None), (30, None)))
    plain = ShuffledPrompts(prompts(40), 8, seed=1)
    assert [uids(pool, step) for step in range(12)] == [uids(plain, step) for step in range(12)]


def test_the_order_of_one_source_is_the_documented_permutation():
    """Runs that were saved must resume with the prompts that they would have had."""
    stream = ShuffledPrompts(prompts(7), per_step=3, seed=5)
    for step in range(6):
        epoch, batch = divmod(step, 2)
        seeded = np.random.Generator(np.random.Philox(np.random.SeedSequence([5, epoch])))
        order = seeded.permutation(7)[3 * batch : 3 * batch + 3]
        assert uids(stream, step) == [str(i) for i in order]


def test_a_weight_that_asks_for_more_prompts_than_there_are_is_refused():
    with pytest.raises(
        ValueError, match=r"the weight of g0 asks for 6 of .*=8 prompts, and it has 5"
    ):
        ShuffledPrompts(prompts(55), 8, seed=0, groups=mixture((5, 3), (50, 1)))
