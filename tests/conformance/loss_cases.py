"""Batches that the conformance tests share, each with its float64 double."""

from dataclasses import replace
from typing import Any

import torch

from opd.batch import Batch
from opd.teacher.scoring import tail_logps, union_ids
from opd.train.student import with_sequence_gaps
from opd.types import Correction, DivergenceKind, Weighting
from tests.conformance.dense64 import Choice, Tokens

N, V, K = 14, 19, 5
LENGTHS = [5, 1, 4, 3, 1]  # completions; the fourth was read from a data set
SUPPORTS = ("full", "teacher_top_k", "student_top_k", "union", "intersection")
KINDS = tuple(kind.value for kind in DivergenceKind)
CHOICES = [
    Choice(weighting=weighting, correction=correction, clip=clip)
    for weighting in Weighting
    for correction in Correction
    for clip in (None, 0.15)
]


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def logits() -> torch.Tensor:
    """The student's."""
    return 1.5 * randn(N, V, seed=0)


def teacher_logp() -> torch.Tensor:
    return (logits() + randn(N, V, seed=1)).log_softmax(-1)


def token_settings(choice: Choice) -> dict[str, Any]:
    """The settings of a loss that say how its tokens are weighted and corrected."""
    correction_min, correction_max = choice.band
    return {
        "weighting": Weighting(choice.weighting),
        "gap_clip": choice.gap_clip,
        "correction": Correction(choice.correction),
        "correction_cap": choice.cap,
        "correction_min": correction_min,
        "correction_max": correction_max,
    }


def case(
    support: str, student: torch.Tensor | None = None, teacher: torch.Tensor | None = None
) -> tuple[Batch, Tokens]:
    """What collate and a teacher server would hand to a loss, and the same for the reference."""
    student = logits() if student is None else student
    teacher = teacher_logp() if teacher is None else teacher
    rows = torch.arange(N)
    engine = (student.nan_to_num(neginf=-1e4) + 0.5 * randn(N, V, seed=2)).log_softmax(-1)
    target = torch.multinomial(engine.exp(), 1, generator=torch.Generator().manual_seed(3))[:, 0]
    sequence = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    engine_N = engine[rows, target].masked_fill(sequence == 3, torch.nan)
    ids_BT = torch.zeros(len(LENGTHS), 1, dtype=torch.int64)
    batch = Batch(
        input_ids_BT=ids_BT,
        attention_mask_BT=ids_BT,
        positions_N=rows,
        target_N=target,
        engine_logp_N=engine_N,
        engine_ids_NK=engine.topk(K).indices,
        weight_N=0.5 + randn(N, seed=4).abs(),
        sequence_N=sequence,
        teacher_logp_N=teacher[rows, target],
        future_N=0.3 * randn(N, seed=5),
        advantage_N=randn(len(LENGTHS), seed=6)[sequence],
    )
    batch = with_sequence_gaps(batch, student.log_softmax(-1)[rows, target])
    batch, inside = _supported(batch, support, teacher)
    return batch, Tokens(
        target_N=target,
        engine_N=engine_N.double(),
        sequence_N=sequence,
        weight_N=_double(batch.weight_N),
        teacher_NV=teacher.double(),
        inside_NV=inside,
        advantage_N=_double(batch.advantage_N),
        future_N=_double(batch.future_N),
    )


def _supported(
    batch: Batch, support: str, teacher: torch.Tensor
) -> tuple[Batch, torch.Tensor | None]:
    if support == "full":
        return replace(batch, teacher_logp_NV=teacher), None
    assert batch.engine_ids_NK is not None
    teacher_ids, engine_ids = _inside(teacher.topk(K).indices), _inside(batch.engine_ids_NK)
    inside = {
        "teacher_top_k": teacher_ids,
        "student_top_k": engine_ids,
        "union": teacher_ids | engine_ids,
        "intersection": teacher_ids & engine_ids,
    }[support]
    requested = {
        "teacher_top_k": [teacher.topk(K).indices],
        "student_top_k": [batch.engine_ids_NK],
        "union": [teacher.topk(K).indices, batch.engine_ids_NK],
        "intersection": [teacher.topk(K).indices],
    }[support]
    ids = union_ids(requested)
    return replace(
        batch,
        support_ids_NK=ids,
        support_logp_NK=teacher.gather(1, ids.clamp(min=0)).masked_fill(ids < 0, -torch.inf),
        support_tail_N=tail_logps(teacher, ids),
    ), inside


def _inside(ids: torch.Tensor) -> torch.Tensor:
    return torch.zeros(N, V, dtype=torch.bool).scatter(1, ids, True)


def _double(values: torch.Tensor | None) -> torch.Tensor:
    assert values is not None
    return values.double()
