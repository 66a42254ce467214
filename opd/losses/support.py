"""Distributions over the ids of a support and one more bucket, the tail: all other ids together."""

import math

import torch
from torch.nn.functional import pad

from opd.batch import Batch

MAX_LOG_RATIO = 1e4  # nats; exp(-1e4) is 0, so 0 * log 0 is 0 and no infinity meets a zero
FOREIGN = -2  # stands for an id that belongs to the tail
UNSEEN_TAIL = math.log(2.0**-24)  # float32 cannot distinguish 1 - sum(p) below this from zero


def within_engine_ids(batch: Batch) -> torch.Tensor:
    """Support ids [N, K] that are among the engine's likeliest too; others are ``FOREIGN``."""
    ids_NK, engine_NK = batch.support_ids_NK, batch.engine_ids_NK
    assert ids_NK is not None, "an intersection needs the teacher's ids"
    assert engine_NK is not None, "an intersection needs the engine's ids: Sampling.support_k"
    shared_NK = (ids_NK[:, :, None] == engine_NK[:, None, :]).any(dim=-1)
    return ids_NK.masked_fill(~shared_NK & (ids_NK >= 0), FOREIGN)


def teacher_buckets(batch: Batch, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [N, K], -1 where unused, and log-probs [N, K + 1], the tail last.

    Ids that the student lacks (``vocab_size`` and above) and ``FOREIGN`` ones belong to the tail.
    Float32's rounding of a teacher's 1 - sum is corrected: a tail of -inf of an incomplete support
    counts as 2^-24, and any tail of a support of the whole vocabulary as zero.
    """
    ids_NK, logp_NK, tail_N = batch.support_ids_NK, batch.support_logp_NK, batch.support_tail_N
    assert ids_NK is not None, "a divergence needs the teacher's full distribution or a support"
    assert logp_NK is not None, "a support comes with its log-probs"
    assert tail_N is not None, "a support comes with its tail"
    used_NK = (ids_NK >= 0) & (ids_NK < vocab_size)
    foreign_NK = (ids_NK >= vocab_size) | (ids_NK == FOREIGN)
    folded_NK = logp_NK.masked_fill(~foreign_NK, -torch.inf)
    tail_N = torch.where(
        foreign_NK.any(dim=-1),
        torch.cat([tail_N[:, None], folded_NK], dim=-1).logsumexp(dim=-1),
        tail_N,
    )
    whole_N = used_NK.sum(dim=-1) == vocab_size
    tail_N = tail_N.masked_fill(tail_N.isneginf() & ~whole_N, UNSEEN_TAIL)
    tail_N = tail_N.masked_fill(whole_N, -torch.inf)
    logp_NK = logp_NK.masked_fill(~used_NK, -torch.inf)
    teacher_NJ = torch.cat([logp_NK, tail_N[:, None]], dim=-1).clamp_(min=-MAX_LOG_RATIO)
    return ids_NK.masked_fill(~used_NK, -1), teacher_NJ


def student_buckets(student_logp_NV: torch.Tensor, ids_NK: torch.Tensor) -> torch.Tensor:
    """Log-probs [N, K + 1] of the support ids and of all others together.

    The tail is a logsumexp over the other ids, not log(1 - sum), so its gradient reaches all of them.
    """
    unused_NK = ids_NK < 0
    support_NK = student_logp_NV.gather(-1, ids_NK.clamp(min=0)).masked_fill(unused_NK, -torch.inf)
    some_N1 = ids_NK.amax(dim=-1, keepdim=True)  # replaces the unused entries of its row
    inside_NK = ids_NK.where(~unused_NK, some_N1).clamp(min=0)
    tail_N1 = student_logp_NV.scatter(-1, inside_NK, -torch.inf).logsumexp(dim=-1, keepdim=True)
    tail_N1 = tail_N1.masked_fill(some_N1 < 0, 0.0)
    return torch.cat([support_NK, tail_N1], dim=-1).clamp_(min=-MAX_LOG_RATIO)


def spread(
    slope_NJ: torch.Tensor,
    tail_N1: torch.Tensor,
    student_logp_NV: torch.Tensor,
    ids_NK: torch.Tensor,
) -> torch.Tensor:
    """The slope of each id from those of the buckets: the tail's in proportion to probability."""
    padded = pad(student_logp_NV, (0, 1)).sub_(tail_N1).exp_().mul_(slope_NJ[:, -1:])
    # columns of a [N, V + 1] tensor; unused entries point at the last column, which is dropped
    columns_NK = ids_NK.masked_fill(ids_NK < 0, student_logp_NV.shape[-1])
    return padded.scatter_(-1, columns_NK, slope_NJ[:, :-1])[:, :-1]
