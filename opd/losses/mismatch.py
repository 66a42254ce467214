"""How far the learner's log-probs are from those of the engine that wrote the tokens."""

import torch

from opd.batch import Batch, LossOutput


def mismatch_metrics(student_logp_N: torch.Tensor, batch: Batch) -> LossOutput:
    """Sums and maxima of |log-prob gap| and of the ratio learner / engine; no total, no gradient.

    Tokens that no engine wrote are left out. Both numerics and stale weights show here: with equal
    weights and equal arithmetic the gap is 0 and the ratio 1.
    """
    written_N = ~batch.engine_logp_N.isnan()
    gap_N = (student_logp_N.detach() - batch.engine_logp_N)[written_N]
    values = {"engine/logp_gap": gap_N.abs(), "engine/ratio": gap_N.exp()}
    zero = gap_N.new_zeros(1)  # both are never negative, so this is the maximum over no tokens
    sums = {name: value_N.sum() for name, value_N in values.items()}
    maxima = {f"{name}_max": torch.cat([value_N, zero]).max() for name, value_N in values.items()}
    counts = dict.fromkeys(sums, written_N.sum())
    return LossOutput(total=gap_N.new_zeros(()), sums=sums, maxima=maxima, counts=counts)
