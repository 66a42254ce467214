"""A live model turns into the trained one and back, or stays as it was."""

import pytest
import torch

from opd.delta.apply import apply_delta, undo_delta
from tests.unit.delta.models import EMBEDDING, Folder, exported, same_bits, touched, weights


def test_a_live_model_turns_and_turns_back(folder: Folder) -> None:
    before = weights(torch.bfloat16)
    after = touched(before, EMBEDDING, "model.norm.weight")
    delta = exported(folder("base", before), folder("trained", after))
    live = {n: torch.nn.Parameter(t.clone(), t.is_floating_point()) for n, t in before.items()}
    live["model.layers.0.q.weight"] = torch.nn.Parameter(torch.ones(1))  # not among the changed
    apply_delta(live.items(), delta)
    for name in delta.changed:
        assert torch.equal(live[name], after[name])
        assert live[name].requires_grad
    undo_delta(live, delta)
    for name in delta.changed:
        assert torch.equal(live[name], before[name])


def test_transposed_memory_is_turned_too(folder: Folder) -> None:
    before = {"w": torch.randn(6, 4)}
    after = touched(before)
    delta = exported(folder("base", before), folder("trained", after))
    live = {"w": before["w"].t().contiguous().t()}
    apply_delta(live, delta)
    assert torch.equal(live["w"], after["w"])


def test_a_live_model_that_is_not_the_base_stays_as_it_was(folder: Folder) -> None:
    before = weights(torch.bfloat16)
    delta = exported(folder("base", before), folder("trained", touched(before)))
    live = {n: t.clone() for n, t in before.items()}
    live["model.steps"][1] += 1
    untouched = {n: t.clone() for n, t in live.items()}
    with pytest.raises(ValueError, match=r"model\.steps does not hold the bits of .*base"):
        apply_delta(live, delta)
    assert same_bits(live, untouched)
    with pytest.raises(ValueError, match=r"is float32 .* made for bfloat16"):
        apply_delta({n: t.float() for n, t in before.items()}, delta)
    with pytest.raises(ValueError, match="absent from the 0 given tensors"):
        apply_delta({}, delta)
