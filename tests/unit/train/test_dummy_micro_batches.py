"""Ranks run as many forward passes as the busiest one, or their collectives would not match."""

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch

from opd.batch import Batch, LossOutput
from opd.config.optim import AdamWConfig
from opd.config.train import TrainConfig
from opd.tracking.console import SilentProgress
from opd.train.learner import StudentLearner
from opd.train.optimizers import LearningRate
from opd.types import FinishReason, Prompt, Rollout


class CountingEngine:
    """Gives minus the token id as its log-prob, and keeps the sizes of its batches."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def forward(self, batch: Batch, loss: None) -> LossOutput:
        self.sizes.append(batch.tokens)
        return LossOutput(total=-batch.target_N.float())


class BusyWorld:
    """Another rank has three micro-batches."""

    def max(self, values: Mapping[str, float]) -> dict[str, float]:
        return {name: max(3.0, value) for name, value in values.items()}


def rollout(uid: str, tokens: list[int], teacher: str) -> Rollout:
    return Rollout(
        prompt=Prompt(uid=uid, token_ids=np.array([1], np.int32), teacher=teacher),
        token_ids=np.array(tokens, np.int32),
        logps=np.zeros(len(tokens), np.float32),
        finish_reason=FinishReason.stop,
        version=0,
    )


def test_log_probs_run_dummy_micro_batches_too_and_keep_their_order() -> None:
    engine = CountingEngine()
    learner = StudentLearner(
        cast(Any, engine),
        torch.nn.Linear(1, 1),
        cast(Any, None),
        TrainConfig(max_tokens_per_micro_batch=100),
        parameter_mask=cast(Any, None),
        learning_rate=LearningRate(AdamWConfig(), steps=1, warmup_steps=0),
        pad_id=0,
        discount=0.0,
        world=cast(Any, BusyWorld()),
        progress=SilentProgress(),
    )
    found = learner.logps(
        [rollout("p", [5, 6], "a"), rollout("q", [7], "b"), rollout("r", [8, 9], "a")]
    )
    assert [logps.tolist() for logps in found] == [[-5.0, -6.0], [-7.0], [-8.0, -9.0]]
    assert engine.sizes == [4, 1, 0]
