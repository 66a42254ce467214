"""A copy that follows the student, and weights that travel only when somebody reads them."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from opd.sync.ema import EMASync, EMAWeights
from opd.sync.periodic import NoSync, PeriodicSync


class Engine:
    """Takes every weight and remembers the version."""

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


def test_the_average_is_the_recursion_and_the_engine_gets_what_was_sent() -> None:
    copy, engine = module(), Engine()
    sync = EMASync(engine, EMAWeights(copy, decay=0.9))
    expected = 0.0
    for step in range(6):
        assert sync.push(weights(float(step)), step) == {"sync/bytes": 1.0}
        expected = 0.9 * expected + 0.1 * step if step else 0.0
        torch.testing.assert_close(copy.weight, torch.full((2, 3), expected))
        torch.testing.assert_close(copy.bias, torch.full((2,), -expected))
        assert torch.equal(engine.seen["weight"], torch.full((2, 3), float(step)))


def test_a_version_counts_once_and_a_resumed_average_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole, cut = module(), module()
    average = EMAWeights(whole, decay=0.7)
    for step in range(1, 5):
        for _ in average.passing(weights(1 / step), step):
            pass
    before = EMAWeights(cut, decay=0.7)
    for step in (1, 2):
        for _ in before.passing(weights(1 / step), step):
            pass
    before.save(str(tmp_path))
    resumed = module()
    after = EMAWeights(resumed, decay=0.7)
    after.load(str(tmp_path), 2)
    for step in (2, 3, 4):  # a resumed run hands over its checkpoint's weights first
        for _ in after.passing(weights(1 / step), step):
            pass
    assert torch.equal(resumed.weight, whole.weight)


def test_latest_is_the_student_itself() -> None:
    copy = module()
    for _ in EMAWeights(copy, decay=0.0).passing(weights(0.3), 1):
        pass
    assert torch.equal(copy.weight, torch.full((2, 3), 0.3))


def test_the_average_sees_weights_that_no_engine_wants() -> None:
    copy = module()
    sync = EMASync(NoSync(), EMAWeights(copy, decay=0.0))
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
