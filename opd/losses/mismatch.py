"""How far the learner's log-probs are from those of the engine that wrote the tokens."""

import torch

from opd.batch import Batch, LossOutput


def mismatch_metrics(student_logp_N: torch.Tensor, batch: Batch) -> LossOutput:
    """Sums and maxima of |log-prob gap| and of the ratio learner / engine; no total, no gradient.

    They are of the tokens that an engine wrote. Numerics and staleness both show here: fresh weights
    and equal arithmetic give gap 0, ratio 1.
    """
    written_N = ~batch.engine_logp_N.isnan()
    gap_N = (student_logp_N.detach() - batch.engine_logp_N)[written_N]
    measured = {"engine/logp_gap": gap_N.abs(), "engine/ratio": gap_N.exp()}
    nothing = gap_N.new_zeros(1)  # both are positive, so this is the maximum of no tokens
    sums = {name: value_N.sum() for name, value_N in measured.items()}
    maxima = {
        f"{name}_max": torch.cat([value_N, nothing]).max() for name, value_N in measured.items()
    }
    counts = dict.fromkeys(sums, written_N.sum())
    return LossOutput(total=gap_N.new_zeros(()), sums=sums, maxima=maxima, counts=counts)
