"""Scores of every weight from training: what the mask rules rank by that need a run."""

from collections.abc import Callable, Iterator, Mapping
from itertools import groupby
from typing import Any

import torch

from opd.checkpoint.tensors import Stored
from opd.config.train import MaskScores
from opd.train.checkpoint_layout import layer_key, to_checkpoint
from opd.train.engine import TrainingEngine
from opd.train.weights import checkpoint_layout, named_weights


class SquaredGradients(torch.optim.Optimizer):
    """Changes no weight: sums the squares of each step's gradient in ``state[p]["squares"]``, float32.

    After one step the square roots are the magnitudes of the first gradient. Over several steps the
    sum is the diagonal of the empirical Fisher matrix up to a factor.
    """

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "squares" not in state:
                    state["squares"] = torch.zeros_like(parameter, dtype=torch.float32)
                state["squares"].add_(parameter.grad.float().square())


def scores(
    causal: torch.nn.Module,
    engine: TrainingEngine,
    kind: MaskScores,
    base: Mapping[str, Stored],
    eps: float = 1e-12,
) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, float32 score in the weight's shape) of every weight; collective.

    early_delta: |W - W0| of the float32 masters; ``base`` gives W0. adam_saliency: |m| / (sqrt(v) +
    ``eps``), which is 1 where the gradient kept its sign and 0 where there was none. fisher: the sum
    of squared gradients. first_gradient: the root of that sum.
    """
    base = checkpoint_layout(causal).base(base)
    for _, layer in groupby(named_weights(causal), key=lambda named: layer_key(named[0])):
        scored = {name: _score(name, p, engine, kind, base, eps) for name, p in layer}
        yield from to_checkpoint(causal, scored).items()


def _score(
    name: str,
    parameter: torch.nn.Parameter,
    engine: TrainingEngine,
    kind: MaskScores,
    base: Mapping[str, Stored],
    eps: float,
) -> torch.Tensor:
    """The score of one weight, float32 on the CPU."""
    match kind:
        case MaskScores.early_delta:
            master = engine.full_state(parameter, "master").cpu()
            score = (master - base[name].read().to(torch.float32)).abs()
        case MaskScores.adam_saliency:
            first = engine.full_state(parameter, "exp_avg")
            score = first.abs() / (engine.full_state(parameter, "exp_avg_sq").sqrt() + eps)
        case MaskScores.fisher:
            score = engine.full_state(parameter, "squares")
        case MaskScores.first_gradient:
            score = engine.full_state(parameter, "squares").sqrt()
        case MaskScores.none:
            raise AssertionError("no scores were requested")
    return score.float().cpu()
