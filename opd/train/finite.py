"""Numbers that are not finite end a run before they reach a checkpoint or the final model."""

import math
from collections.abc import Sequence

import torch

from opd.faults import RunError
from opd.train.engine import TrainingEngine
from opd.types import ScoredRollout
from opd.world import World

ADVICE = (
    "nothing of this step is saved; the same command goes on from the last checkpoint: lower optim.lr, set "
    "optim.max_grad_norm, or look at the sample"
)


def require_finite_losses(
    losses: Sequence[tuple[float, Sequence[ScoredRollout]]],
    model: torch.nn.Module,
    engine: TrainingEngine,
    world: World,
    step: int,
) -> None:
    """RunError on every rank when the loss of a micro-batch on any rank is not finite; collective.

    ``losses`` are this rank's, each with the rollouts that it is of.
    """
    bad = [(loss, group) for loss, group in losses if not math.isfinite(loss)]
    if not world.max({"bad": float(len(bad))})["bad"]:
        return
    if not bad:
        raise RunError(
            f"step {step}: the loss of another rank, whose log names the sample, is not finite; {ADVICE}"
        )
    loss, group = bad[0]
    weight = first_nonfinite_weight(model, engine)
    cause = "" if weight is None else f", because the weight {weight} is not finite"
    prompts = ", ".join(dict.fromkeys(s.rollout.prompt.uid for s in group[:4]))
    raise RunError(
        f"step {step}: the loss is {loss} in a micro-batch with prompt {prompts}{cause}; {ADVICE}"
    )


def require_finite_norm(norm: float, step: int) -> None:
    """RunError when the gradient norm of a step, which is the same on every rank, is not finite."""
    if not math.isfinite(norm):
        raise RunError(f"step {step}: the gradient norm is {norm}; {ADVICE}")


def require_finite_weights(
    model: torch.nn.Module, engine: TrainingEngine, world: World, step: int
) -> None:
    """RunError on every rank when a weight on any rank is not finite; collective."""
    weight = first_nonfinite_weight(model, engine)
    if not world.max({"bad": float(weight is not None)})["bad"]:
        return
    where = "a weight of another rank" if weight is None else f"the weight {weight}"
    raise RunError(f"step {step}: {where} is not finite; {ADVICE}")


@torch.no_grad()
def first_nonfinite_weight(model: torch.nn.Module, engine: TrainingEngine) -> str | None:
    """The name of the first parameter with a number that is not finite in this rank's parts of it."""
    names: list[str] = []
    finite: list[torch.Tensor] = []
    for name, parameter in model.named_parameters():
        for part, _ in engine.parts(parameter):
            names.append(name)
            finite.append(part.isfinite().all())
    all_finite = torch.stack(finite).tolist() if finite else []  # one wait for the device
    return next((name for name, fine in zip(names, all_finite, strict=True) if not fine), None)
