"""How far the learner's log-probs are from those of the engine that wrote the tokens."""

import torch

from opd.batch import Batch


def mismatch_metrics(
    student_logp_N: torch.Tensor, batch: Batch
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Sums and maxima of |log-prob gap| and of the ratio learner / engine; no gradient.

    Numerics and staleness both show here: fresh weights and equal arithmetic give gap 0, ratio 1.
    """
    gap_N = student_logp_N.detach() - batch.engine_logp_N
    measured = {"engine/logp_gap": gap_N.abs(), "engine/ratio": gap_N.exp()}
    nothing = gap_N.new_zeros(1)  # both are positive, so this is the maximum of no tokens
    sums = {name: value_N.sum() for name, value_N in measured.items()}
    maxima = {
        f"{name}_max": torch.cat([value_N, nothing]).max() for name, value_N in measured.items()
    }
    return sums, maxima
