"""Edges of the divergences: infinities, unused places, foreign ids, refused parameters."""

import math

import pytest
import torch

from opd.batch import Batch, LossOutput
from opd.config.loss import DivergenceLossConfig
from opd.losses.divergence import Divergence
from opd.types import DivergenceKind

V = 7
LOSSES = {kind.value: Divergence(DivergenceLossConfig(kind=kind)) for kind in DivergenceKind}
every_kind = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def run(
    loss: Divergence, logits: torch.Tensor, **scores: torch.Tensor
) -> tuple[LossOutput, torch.Tensor]:
    """The loss and its gradient with respect to the logits."""
    logits = logits.clone().requires_grad_()
    ids_BT = torch.zeros(1, 1, dtype=torch.int64)
    batch = Batch(
        input_ids_BT=ids_BT,
        attention_mask_BT=ids_BT,
        positions_N=torch.arange(len(logits)),
        target_N=torch.zeros(len(logits), dtype=torch.int64),
        engine_logp_N=torch.zeros(len(logits)),
        **scores,
    )
    out = loss(logits.log_softmax(-1), batch)
    return out, torch.autograd.grad(out.total, logits)[0]


def some_logits(rows: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, V, generator=torch.Generator().manual_seed(seed))


def support(
    ids: list[list[int]], logps: list[list[float]], tails: list[float]
) -> dict[str, torch.Tensor]:
    return {
        "support_ids_NK": torch.tensor(ids),
        "support_logp_NK": torch.tensor(logps),
        "support_tail_N": torch.tensor(tails),
    }


@every_kind
def test_teacher_that_excludes_ids_gives_finite_value_and_gradient(loss: Divergence) -> None:
    teacher = some_logits(seed=1)
    teacher[:, 2:5] = -torch.inf
    out, gradient = run(loss, some_logits(), teacher_logp_NV=teacher.log_softmax(-1))
    assert out.total.isfinite()
    assert gradient.isfinite().all()
    assert (gradient[:, 2:5] > 0).all(), "descent takes probability away from excluded ids"


@every_kind
def test_excluded_id_that_the_student_excludes_too_costs_nothing(loss: Divergence) -> None:
    student, teacher = some_logits(), some_logits(seed=1)
    without, _ = run(loss, student[:, :-1], teacher_logp_NV=teacher[:, :-1].log_softmax(-1))
    student[:, -1] = -500.0  # exp underflows to zero
    teacher[:, -1] = -torch.inf
    out, gradient = run(loss, student, teacher_logp_NV=teacher.log_softmax(-1))
    assert out.total.item() == pytest.approx(without.total.item(), rel=1e-6)
    assert (gradient[:, -1] == 0).all()


@every_kind
def test_unused_places_contribute_nothing(loss: Divergence) -> None:
    student = some_logits(rows=2)
    tight = support([[1, 4], [0, 2]], [[-1.0, -2.0], [-0.7, -1.9]], [-0.71, -1.04])
    loose = support(
        [[1, -1, 4, -1], [-1, 0, 2, -1]],
        [[-1.0, -math.inf, -2.0, -math.inf], [-math.inf, -0.7, -1.9, -math.inf]],
        [-0.71, -1.04],
    )
    (out, gradient), (padded_out, padded_gradient) = (
        run(loss, student, **s) for s in (tight, loose)
    )
    torch.testing.assert_close(padded_out.total, out.total)
    torch.testing.assert_close(padded_gradient, gradient)
    assert out.total > 0.01


@every_kind
@pytest.mark.parametrize("rounded_tail", [-math.inf, math.log(1e-7)])
def test_support_of_the_whole_vocabulary_has_no_tail_and_no_nan(
    loss: Divergence, rounded_tail: float
) -> None:
    student, teacher = some_logits(), some_logits(seed=1).log_softmax(-1)
    ids = torch.arange(V).flip(0).expand(3, V)
    out, gradient = run(
        loss,
        student,
        support_ids_NK=ids,
        support_logp_NK=teacher.flip(1),
        support_tail_N=torch.full((3,), rounded_tail),
    )
    full, full_gradient = run(loss, student, teacher_logp_NV=teacher)
    torch.testing.assert_close(out.total, full.total)
    torch.testing.assert_close(gradient, full_gradient)
    assert out.sums["loss/student_tail"] == 0
    assert out.sums["loss/teacher_tail"] == 0


@every_kind
def test_row_of_nothing_but_tail_costs_and_pulls_nothing(loss: Divergence) -> None:
    out, gradient = run(loss, some_logits(rows=1), **support([[-1, -1]], [[-math.inf] * 2], [0.0]))
    assert abs(out.total.item()) < 1e-6
    assert gradient.abs().max() < 1e-6
    assert out.sums["loss/teacher_tail"] == 1


@every_kind
def test_no_tokens_cost_nothing(loss: Divergence) -> None:
    nothing = {
        "support_ids_NK": torch.zeros(0, 2, dtype=torch.int64),
        "support_logp_NK": torch.zeros(0, 2),
        "support_tail_N": torch.zeros(0),
    }
    for scores in (nothing, {"teacher_logp_NV": torch.zeros(0, V)}):
        out, gradient = run(loss, torch.zeros(0, V), **scores)
        assert out.total == 0
        assert gradient.shape == (0, V)


def test_reverse_kl_reads_a_tail_rounded_to_nothing_as_float32_resolution() -> None:
    student = torch.zeros(1, V)
    rounded, _ = run(Divergence(), student, **support([[0]], [[0.0]], [-math.inf]))
    stated, _ = run(Divergence(), student, **support([[0]], [[0.0]], [math.log(2.0**-24)]))
    assert rounded.total == stated.total
    assert rounded.total.item() < 20


def test_teacher_ids_that_the_student_lacks_count_to_the_tail() -> None:
    student = some_logits(rows=1)
    foreign, _ = run(
        Divergence(),
        student,
        **support([[0, V + 3]], [[math.log(0.5), math.log(0.3)]], [math.log(0.2)]),
    )
    folded, _ = run(Divergence(), student, **support([[0]], [[math.log(0.5)]], [math.log(0.5)]))
    torch.testing.assert_close(foreign.total, folded.total)


def test_dropping_the_tail_would_go_negative_and_ours_does_not() -> None:
    teacher, student = torch.zeros(1, V), torch.zeros(1, V)
    teacher[0, 0] = 2.0
    student[0, 0] = 3.0  # more of the student's mass than of the teacher's lies on the top id
    p, q = teacher.log_softmax(-1), student.log_softmax(-1)
    assert (p[0, 0].exp() * (p[0, 0] - q[0, 0])) < 0
    tail = torch.log1p(-p[:, 0].exp())
    scores = {
        "support_ids_NK": torch.tensor([[0]]),
        "support_logp_NK": p[:, :1],
        "support_tail_N": tail,
    }
    assert run(LOSSES["forward_kl"], student, **scores)[0].total > 0.01


def test_teacher_nll_is_reported_when_its_sampled_log_probs_are_there() -> None:
    teacher = some_logits(seed=1).log_softmax(-1)
    out, _ = run(
        Divergence(),
        some_logits(),
        teacher_logp_NV=teacher,
        teacher_logp_N=torch.tensor([-1.0, -2, -3]),
    )
    assert out.sums["teacher/nll"] == 6.0


def test_the_loss_does_not_change_the_teachers_scores() -> None:
    teacher = some_logits(seed=1).log_softmax(-1)
    before = teacher.clone()
    for loss in LOSSES.values():
        run(loss, some_logits(), teacher_logp_NV=teacher)
    assert torch.equal(teacher, before)


@pytest.mark.parametrize(
    "wrong",
    [
        {"beta": 1.5},
        {"beta": -0.1},
        {"skew": 1.0},
        {"skew": -0.1},
        {"token_clip": 0.0},
        {"k": 0},
        {"gap_clip": 0.0},
        {"correction_cap": 0.0},
        {"correction_min": 1.5},
        {"correction_max": 0.9},
    ],
    ids=str,
)
def test_parameters_out_of_bounds_are_refused(wrong: dict[str, float]) -> None:
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=rf"^loss\.{name}={value}: allowed is "):
        Divergence(DivergenceLossConfig(**wrong))


def test_a_batch_without_a_teacher_is_refused() -> None:
    with pytest.raises(AssertionError, match="full distribution or a support"):
        run(Divergence(), some_logits())
