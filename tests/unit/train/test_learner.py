"""Metrics of micro-batches add up, for all teachers and for each."""

import pytest
import torch

from opd.batch import Batch, LossOutput
from opd.train.totals import Totals
from opd.world import World

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))


def batch(teacher: str, tokens: int) -> Batch:
    some = torch.zeros(tokens, dtype=torch.long)
    return Batch(
        input_ids_BT=some[None],
        attention_mask_BT=some[None],
        positions_N=some,
        target_N=some,
        engine_logp_N=some.float(),
        teacher=teacher,
    )


def output(outside: int, **sums: float) -> LossOutput:
    return LossOutput(
        total=torch.tensor(1.0),
        sums={name.replace("__", "/"): torch.tensor(value) for name, value in sums.items()},
        counts={"teacher/outside_mass": torch.tensor(float(outside))},
    )


def test_each_teacher_has_means_over_its_own_tokens() -> None:
    totals = Totals(["maths", "spelling"])
    shared = {"teacher__outside_mass": 0.0, "student__entropy": 1.0}
    totals.add(output(0, loss__reverse_kl=6.0, **shared), batch("maths", 3))
    totals.add(output(0, loss__reverse_kl=1.0, **shared), batch("spelling", 4))
    totals.add(output(0, loss__reverse_kl=2.0, **shared), batch("spelling", 2))
    means = totals.per_token(ALONE, tokens=9, denominator=9)
    assert means["loss/reverse_kl"] == pytest.approx(1.0)
    assert means["teacher/maths/reverse_kl"] == pytest.approx(2.0)
    assert means["teacher/spelling/reverse_kl"] == pytest.approx(0.5)
    assert not any(name.endswith("outside_mass") for name in means), "no teacher has ids outside"


def test_mass_outside_the_common_ids_is_per_token_where_it_was_measured() -> None:
    totals = Totals(["maths", "spelling"])
    totals.add(output(2, teacher__outside_mass=0.5), batch("maths", 4))
    totals.add(output(0, teacher__outside_mass=0.0), batch("spelling", 4))
    means = totals.per_token(ALONE, tokens=8, denominator=8)
    assert means["teacher/maths/outside_mass"] == pytest.approx(0.25)
    assert "teacher/spelling/outside_mass" not in means
