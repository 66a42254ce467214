"""Checks that the learner computes the model that transformers computes, before anything is trained."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from opd.batch import Batch, LossOutput, collate
from opd.packing import Packing
from opd.reference import BOUND, OwnForward, largest_gap
from opd.train.float32 import float32_layers
from opd.train.student import Student, TeacherHeads, causal_lm
from opd.types import FinishReason, IntArray, Prompt, Rollout, ScoredRollout

PACKED_BOUND = 1e-5
"""Mean difference in nats that float32 allows between packed and padded sequences."""


def require_learner_forward(student: Student, own: OwnForward, *, pad_id: int, who: str) -> float:
    """The gap in nats between the log-probs that losses get and those of the model as it was loaded.

    The sequences are padded into one micro-batch, in the mode that ``student`` is in, and computed in
    float32 like ``own``. ``who`` names the student in an error. Raises ValueError for a gap above the bound.
    """
    with _alone(student) as alone:
        return own.require(lambda sequences: _log_probs(alone, sequences, pad_id), who)


def choose_packing(student: Student, own: OwnForward, *, pad_id: int) -> tuple[Packing, str]:
    """How micro-batches of this student are laid out, and a sentence that says why; collective.

    They are packed where the model's own code keeps the sequences of a row apart: log-probs of packed and
    of padded sequences are compared, in float32 except for flash attention, which computes in bfloat16.
    """
    flash = "flash" in own.attention
    packing = Packing.one_row if flash else Packing.rows
    bound = BOUND[torch.bfloat16] if flash else PACKED_BOUND
    sequences = [*own.sequences, *own.sequences[::-1]]
    with _alone(student) as alone:
        padded = _log_probs(alone, sequences, pad_id)
        try:
            packed = _log_probs(alone, sequences, pad_id, Packing.one_row)
        except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
            reason = " ".join(str(error).split())[:200]
            return (
                Packing.off,
                f"micro-batches are padded: {own.name} takes no packed rows ({reason})",
            )
    gap = largest_gap(sequences, padded, packed)
    if not gap <= bound:
        return Packing.off, (
            f"micro-batches are padded: sequences of a packed row are not independent in {own.name}, "
            f"log-probs differ by {gap:.2g} nats"
        )
    return (
        packing,
        f"micro-batches are packed: log-probs are those of padded ones within {gap:.1g} nats",
    )


@contextmanager
def _alone(student: Student) -> Iterator[Student]:
    """The student at temperature 1 without a teacher, in float32 inside."""
    alone = Student(
        student.model,
        spec=student.spec,
        temperature=1.0,
        chunk_bytes=student.chunk_bytes,
        teacher_head=TeacherHeads(None, 1, next(student.parameters()).device),
    ).train(student.training)
    head = causal_lm(student.model).get_output_embeddings()
    with float32_layers(student.model, head.parameters()):
        yield alone


def _log_probs(
    student: Student,
    sequences: Sequence[IntArray],
    pad_id: int,
    packing: Packing = Packing.off,
) -> list[torch.Tensor]:
    """The log-probs [T - 1, V] of each sequence's tokens after the first, as a loss receives them."""
    chunks: list[torch.Tensor] = []

    def keep(student_logp_NV: torch.Tensor, batch: Batch) -> LossOutput:
        chunks.append(student_logp_NV.detach())
        return LossOutput(total=student_logp_NV.sum() * 0)

    batch = collate([_scored(ids) for ids in sequences], pad_id=pad_id, packing=packing)
    with torch.no_grad():
        student(batch.to(next(student.parameters()).device), keep)
    return list(torch.cat(chunks).split([len(ids) - 1 for ids in sequences]))


def _scored(ids: IntArray) -> ScoredRollout:
    """The first token as the prompt, the others as its completion."""
    rollout = Rollout(
        prompt=Prompt(uid="probe", token_ids=ids[:1]),
        token_ids=ids[1:],
        logps=np.full(len(ids) - 1, np.nan, np.float32),
        finish_reason=FinishReason.length,
        version=0,
    )
    return ScoredRollout(rollout=rollout)
