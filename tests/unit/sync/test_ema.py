"""A moving average of the student, and weights that are pushed only when they are needed."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from opd.sync.ema import EMASync, EMAWeights
from opd.sync.periodic import NoSync, PeriodicSync


class Engine:
    """Takes every weight and records the version."""

    def __init__(self) -> None:
        self.versions: list[int] = []
        self.seen: dict[str, torch.Tensor] = {}

    def push(self, weights: Any, version: int) -> Mapping[str, float]:
        self.versions.append(version)
        self.seen = {name: tensor.clone() for name, tensor in weights}
        return {"sync/bytes": 1.0}


def weights(step: float) -> Iterator[tuple[str, torch.Tensor]]:
    yield "weight", torch.full((2, 3), step)
    yield "bias", torch.full((2,), -step)


def module() -> torch.nn.Module:
    made = torch.nn.Linear(3, 2)
    made.load_state_dict(dict(weights(0.0)))
    return made.requires_grad_(False)


def average_in(copy: torch.nn.Module, *, decay: float) -> EMAWeights:
    return EMAWeights(dict(copy.named_parameters()), decay=decay, moved=lambda: None)


def test_the_average_is_the_recursion_and_the_engine_gets_what_was_sent() -> None:
    copy, engine = module(), Engine()
    sync = EMASync(engine, average_in(copy, decay=0.9))
    expected = 0.0
    for step in range(6):
        assert sync.push(weights(float(step)), step) == {"sync/bytes": 1.0}
        expected = 0.9 * expected + 0.1 * step if step else 0.0
        torch.testing.assert_close(copy.weight, torch.full((2, 3), expected))
        torch.testing.assert_close(copy.bias, torch.full((2,), -expected))
        assert torch.equal(engine.seen["weight"], torch.full((2, 3), float(step)))


def test_a_version_counts_once_and_a_resumed_average_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole, cut = module(), module()
    average = average_in(whole, decay=0.7)
    for step in range(1, 5):
        for _ in average.averaging(weights(1 / step), step):
            pass
    before = average_in(cut, decay=0.7)
    for step in (1, 2):
        for _ in before.averaging(weights(1 / step), step):
            pass
    before.save(str(tmp_path))
    resumed = module()
    after = average_in(resumed, decay=0.7)
    after.load(str(tmp_path), 2)
    for step in (2, 3, 4):  # a resumed run hands over its checkpoint's weights first
        for _ in after.averaging(weights(1 / step), step):
            pass
    assert torch.equal(resumed.weight, whole.weight)


def test_moved_is_called_after_each_new_version_and_after_a_load(tmp_path: Path) -> None:
    copy = module()
    seen: list[float] = []
    average = EMAWeights(
        dict(copy.named_parameters()), decay=0.5, moved=lambda: seen.append(float(copy.bias[0]))
    )
    for step in (0, 1, 1, 2):  # 0 is what the module holds, 1 comes twice
        for _ in average.averaging(weights(float(step)), step):
            pass
    assert seen == [-0.5, -1.25]
    average.save(str(tmp_path))
    average.load(str(tmp_path), 2)
    assert seen == [-0.5, -1.25, -1.25]


def test_latest_is_the_student_itself() -> None:
    copy = module()
    for _ in average_in(copy, decay=0.0).averaging(weights(0.3), 1):
        pass
    assert torch.equal(copy.weight, torch.full((2, 3), 0.3))


def test_the_average_sees_weights_that_no_engine_wants() -> None:
    copy = module()
    sync = EMASync(NoSync(), average_in(copy, decay=0.0))
    assert sync.push(weights(2.0), 1) == {}
    assert torch.equal(copy.weight, torch.full((2, 3), 2.0))


def test_seldom_hands_over_first_and_when_due_and_gathers_nothing_else() -> None:
    engine, gathered = Engine(), []

    def counted(step: int) -> Iterator[tuple[str, torch.Tensor]]:
        gathered.append(step)
        yield from weights(float(step))

    sync = PeriodicSync(engine, lambda version: version % 3 == 0)
    for step in range(5, 11):
        sync.push(counted(step), step)
    assert engine.versions == [5, 6, 9]
    assert gathered == [5, 6, 9]
