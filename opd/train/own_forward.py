"""Checks that the learner computes the model that transformers computes, before anything is trained."""

from collections.abc import Sequence

import numpy as np
import torch

from opd.batch import Batch, LossOutput, collate
from opd.reference import OwnForward
from opd.train.float32 import float32_layers
from opd.train.student import Student, TeacherHeads, causal_lm
from opd.types import FinishReason, IntArray, Prompt, Rollout, ScoredRollout


def require_learner_forward(student: Student, own: OwnForward, *, pad_id: int, who: str) -> float:
    """The gap in nats between the log-probs that losses get and those of the model as it was loaded.

    The sequences are padded into one micro-batch, in the mode that ``student`` is in, and computed in
    float32 like ``own``. ``who`` names the student in an error. Raises ValueError for a gap above the bound.
    """
    alone = Student(
        student.model,
        spec=student.spec,
        temperature=1.0,
        chunk_bytes=student.chunk_bytes,
        teacher_head=TeacherHeads(None, 1, next(student.parameters()).device),
    ).train(student.training)
    head = causal_lm(student.model).get_output_embeddings()
    with float32_layers(student.model, head.parameters()):
        return own.require(lambda sequences: _log_probs(alone, sequences, pad_id), who)


def _log_probs(student: Student, sequences: Sequence[IntArray], pad_id: int) -> list[torch.Tensor]:
    """The log-probs [T - 1, V] of each sequence's tokens after the first, as a loss receives them."""
    chunks: list[torch.Tensor] = []

    def keep(student_logp_NV: torch.Tensor, batch: Batch) -> LossOutput:
        chunks.append(student_logp_NV.detach())
        return LossOutput(total=student_logp_NV.sum() * 0)

    batch = collate([_scored(ids) for ids in sequences], pad_id=pad_id)
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
