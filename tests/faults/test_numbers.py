"""Numbers that are not finite end a run before they are saved."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from opd.config.fields import require_bounds
from opd.config.optim import AdamWConfig
from opd.config.train import Precision
from opd.faults import RunError
from opd.run.ranks import WorkerFailed, _raise_failure
from opd.run.status import FAILED
from opd.train.finite import (
    find_bad_input,
    find_loss_fault,
    first_nonfinite_weight,
    require_finite_weights,
)
from opd.train.torch_engine import TorchEngine
from opd.types import FinishReason, Prompt, Rollout, ScoredRollout, SupportLogps
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
        find_loss_fault([(0.5, []), (math.nan, [])], model, engine(model), ALONE, 4)


def scored(**numbers: Any) -> ScoredRollout:
    rollout = Rollout(
        prompt=Prompt(uid="row 7", token_ids=np.ones(3, np.int32), teacher="maths"),
        token_ids=np.ones(2, np.int32),
        logps=np.full(2, np.nan, np.float32),  # as a data set gives them
        finish_reason=FinishReason.stop,
        version=0,
    )
    return ScoredRollout(rollout=rollout, **numbers)


def rows(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def support(logp: float, tail: float) -> SupportLogps:
    return SupportLogps(
        ids=np.zeros((2, 1), np.int32), logps=rows(-1.0, logp)[:, None], tail_logp=rows(-1.0, tail)
    )


NAMED = "the teacher maths gave for token 1 of a completion of prompt row 7 is not finite"


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ({"logps": rows(-1.0, math.nan)}, f"the log-prob that {NAMED}"),
        ({"support": support(math.nan, -1.0)}, f"a log-prob of the support that {NAMED}"),
        ({"support": support(-1.0, math.nan)}, f"the log-prob of the tail that {NAMED}"),
        ({"full_logps": np.array([[-1, -1], [-1, np.nan]])}, f"the distribution that {NAMED}"),
        ({"hidden": np.array([[1.0, 1.0], [np.inf, 1.0]])}, f"the hidden state that {NAMED}"),
        ({"hidden": np.array([[1], [0x7F80]], np.uint16)}, f"the hidden state that {NAMED}"),
        ({"reward": math.nan}, "the reward of a completion of prompt row 7 is nan"),
        ({"advantage": math.inf}, "the advantage of a completion of prompt row 7 is inf"),
    ],
)
def test_a_number_that_no_skipped_step_mends_ends_the_run_and_is_named(
    numbers: dict[str, Any], words: str
) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3))
    fine, bad = scored(full_logps=np.array([[0, -np.inf], [-1, -1]])), scored(**numbers)
    assert find_bad_input(fine) is None
    assert find_bad_input(bad) == words
    with pytest.raises(RunError, match=f"step 4: the loss is inf .* row 7, because {words}"):
        find_loss_fault([(math.inf, [fine, bad])], model, engine(model), ALONE, 4)
    fault = find_loss_fault([(1.0, [bad]), (math.nan, [fine])], model, engine(model), ALONE, 4)
    assert fault == "the loss is nan in a micro-batch with prompt row 7"
    assert find_loss_fault([(1.0, [bad])], model, engine(model), ALONE, 4) is None


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
