"""Numbers that are not finite end a run before they are saved."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from opd.config.fields import require_bounds
from opd.config.optim import AdamWConfig
from opd.config.train import Precision
from opd.faults import RunError
from opd.run.ranks import WorkerFailed, _raise_failure
from opd.run.status import FAILED
from opd.train.finite import (
    first_nonfinite_weight,
    require_finite_losses,
    require_finite_norm,
    require_finite_weights,
)
from opd.train.torch_engine import TorchEngine
from opd.world import World
from tests.support.command import SMALL, opd

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
FAST = ["rollout=transformers", "teacher=local", "launch.engine=torch", "launch.processes=1"]


def engine(model: torch.nn.Module) -> TorchEngine:
    return TorchEngine(
        model,  # pyright: ignore[reportArgumentType]
        torch.optim.SGD(model.parameters(), lr=0.1),
        gradients=list,
        precision=Precision.fp32,
        max_grad_norm=0.0,
        device=ALONE.device,
    )


def spoil(value: float) -> Callable[[torch.nn.Module], None]:
    def apply(model: torch.nn.Module) -> None:
        with torch.no_grad():
            model[1].weight[2, 1] = value  # pyright: ignore

    return apply


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_first_weight_that_is_not_finite_is_named(value: float) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    assert first_nonfinite_weight(model, engine(model)) is None
    require_finite_weights(model, engine(model), ALONE, 4)
    spoil(value)(model)
    assert first_nonfinite_weight(model, engine(model)) == "1.weight"
    with pytest.raises(RunError, match=r"step 4: the weight 1\.weight is not finite"):
        require_finite_weights(model, engine(model), ALONE, 4)
    with pytest.raises(RunError, match=r"the loss is nan .* the weight 1\.weight is not finite"):
        require_finite_losses([(0.5, []), (math.nan, [])], model, engine(model), ALONE, 4)


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_a_gradient_norm_that_is_not_finite_ends_the_run(norm: float) -> None:
    require_finite_norm(1e30, 3)
    with pytest.raises(RunError, match="step 3: the gradient norm is"):
        require_finite_norm(norm, 3)


@pytest.mark.parametrize(
    ("value", "allowed"),
    [
        (math.nan, "are numbers"),
        (math.inf, "is 1000000.0 or less"),
        (-math.inf, "is more than 0"),
        (1e38, "is 1000000.0 or less"),
    ],
)
def test_a_learning_rate_that_no_optimizer_can_use_is_refused(value: float, allowed: str) -> None:
    with pytest.raises(ValueError, match=f"lr=.*: allowed {re.escape(allowed)}"):
        require_bounds(AdamWConfig(lr=value))


def test_the_sentence_of_a_rank_is_all_that_the_launcher_prints(tmp_path: Path) -> None:
    log = tmp_path / "rank_0.log"
    log.write_text("Traceback\n  File ...\nopd: step 3: the loss is nan\nlibrary noise\n")
    with pytest.raises(WorkerFailed) as error:
        _raise_failure(log, 0, FAILED)
    assert str(error.value) == f"step 3: the loss is nan (details: {log})"


def test_learning_that_explodes_ends_with_one_sentence_and_no_model(tmp_path: Path) -> None:
    done = opd(
        "train", "quickstart", *SMALL, *FAST, "run.dir=run", "train.steps=6", "optim.lr=1e6",
        "optim.warmup_steps=0", "optim.max_grad_norm=0", "save.every=1", "eval.every=0",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    (sentence,) = [line for line in done.stderr.splitlines() if line.startswith("opd: ")]
    assert "step" in sentence
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "final").exists()
    rows = [json.loads(r) for r in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(row.get("loss/total", 0.0) is not None for row in rows)
    for saved in (tmp_path / "run" / "checkpoints").glob("step_*"):
        state = torch.load(saved / "torch.pt", weights_only=True)
        assert all(bool(w.isfinite().all()) for w in state["student"].values()), saved
