"""The order of prompts is a function of seed and step, whatever the number of ranks."""

import itertools

import numpy as np
import pytest

from opd.data.stream import ShuffledPrompts
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
