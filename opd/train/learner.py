"""The student in training: one optimizer step from scored rollouts, and the student's weights.

Losses are sums over tokens; they are divided here, once, by a count over all ranks.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch

from opd.batch import TOKEN_MEAN, Batch, LossReduction, collate
from opd.checkpoint.tensors import Stored
from opd.config.train import MaskScores, TrainConfig
from opd.interfaces import Loss, Progress
from opd.packing import Packing, micro_batches, padding
from opd.timing import span
from opd.train.checkpoint_layout import stored_buffers
from opd.train.engine import TrainingEngine
from opd.train.finite import SkippedSteps, find_loss_fault, require_finite_weights
from opd.train.mask_scores import scores
from opd.train.optimizers import LearningRate
from opd.train.parameter_mask import ParameterMask
from opd.train.record import NoRecord, Recorder
from opd.train.routers import RouterLoad
from opd.train.saved_states import (
    RANK_FILE,
    random_states,
    read_rank_state,
    set_random_states,
)
from opd.train.student import causal_lm
from opd.train.totals import Totals
from opd.train.weights import flip_bit, full_weights
from opd.types import FloatArray, Rollout, ScoredRollout, StepReport
from opd.world import World


class StudentLearner:
    """Implements ``Learner`` and ``StudentScorer`` over a training engine.

    Args:
        engine: runs the student, a module around ``model``.
        model: the transformers (or peft) model inside the engine.
        train: ``max_tokens_per_micro_batch`` is used.
        parameter_mask: which coordinates of the model are trained.
        discount: of the teacher's return; fills ``Batch.future_N`` when above 0.
        reduction: which tokens count, and what a step's sum is divided by.
        teachers: names of teachers that prompts may give; each has metrics of its own.
        recorder: measures the weights before and after each optimizer step.
        packing: how sequences become rows of micro-batches; changes no result.
    """

    def __init__(
        self,
        engine: TrainingEngine,
        model: torch.nn.Module,
        loss: Loss,
        train: TrainConfig,
        *,
        parameter_mask: ParameterMask,
        learning_rate: LearningRate,
        pad_id: int,
        discount: float,
        world: World,
        progress: Progress,
        reduction: LossReduction = TOKEN_MEAN,
        teachers: Sequence[str] = (),
        recorder: Recorder | None = None,
        packing: Packing = Packing.off,
    ) -> None:
        self._engine = engine
        self._model = model
        self._loss = loss
        self._parameter_mask = parameter_mask
        self._train = train
        self._learning_rate = learning_rate
        self._pad_id = pad_id
        self._discount = discount
        self._reduction = reduction
        self._teachers = teachers
        self._packing = packing
        self._world = world
        self._progress = progress
        self._recorder = recorder or NoRecord()
        self._router_load = RouterLoad(causal_lm(model))
        self._skipped = SkippedSteps(train.on_nonfinite, world)
        self.version = 0

    def step(self, scored: Sequence[ScoredRollout]) -> StepReport:
        """One optimizer step on this rank's ``scored``; metrics are per token over all ranks. Collective.

        Where a loss or the gradient norm is not finite, ``train.on_nonfinite`` decides: RunError, or a
        version with the same bits, whose metrics lack what is not finite. RunError when a weight is not.
        """
        self._model.train()
        counts = self._token_counts(scored, self._reduction)
        totals = Totals(self._teachers)
        batches = self._batches(scored, self._reduction, discount=self._discount)
        losses: list[float] = []
        fault = None
        with self._progress.track("learn", len(batches)) as advance, self._router_load.counting():
            for number, batch in enumerate(batches, start=1):
                self._router_load.expect(batch.attention_mask_BT)
                with span("forward", tokens=batch.tokens):
                    out = self._engine.forward(batch, self._loss)
                losses.append(float(out.total.detach()))
                totals.add(out, batch)
                last = number == len(batches)
                fault = self._find_loss_fault(losses, scored) if last else None
                # gradients of NaN make every engine leave its step out
                scale = math.nan if fault else 1.0
                with span("backward", tokens=batch.tokens):
                    self._engine.backward(out.total / counts["denominator"] * scale, last=last)
                advance(1)
        lr = self._learning_rate(self.version)
        self._recorder.before_step(self.version)
        with span("optimizer"):
            norm = self._engine.step(lr)
        self.version += 1
        if fault is None and not math.isfinite(norm):
            fault = f"the gradient norm is {norm}"
        self._skipped.take(self.version, fault)
        metrics = totals.per_token(self._world, **counts)
        metrics |= {"optim/grad_norm": norm, "optim/lr": lr, "tokens/trained": counts["tokens"]}
        empty = {"tokens/padding": float(padding(self._groups(scored), self._packing))}
        metrics |= self._world.sum(empty)
        metrics |= self._rewards(scored) | self._parameter_mask.metrics()
        metrics |= self._router_load.metrics(self._world) | self._skipped.metrics()
        if fault is None:
            metrics |= self._finish_step(lr, norm)
        else:
            metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}
        return StepReport(version=self.version, metrics=metrics)

    def _finish_step(self, lr: float, norm: float) -> dict[str, float]:
        """What follows an optimizer step that changed weights; metrics of their record. Collective."""
        self._parameter_mask.write_back(self._engine)
        require_finite_weights(self._model, self._engine, self._world, self.version)
        taken = self.version - self._skipped.total
        return self._recorder.after_step(self.version, taken=taken, lr=lr, norm=norm)

    def measure(self, scored: Sequence[ScoredRollout], loss: Loss) -> dict[str, float]:
        """The loss's metrics per token over all ranks; no weight changes. Collective."""
        counts = self._token_counts(scored, TOKEN_MEAN)
        totals = Totals()
        self._model.eval()
        with torch.no_grad():
            for batch in self._batches(scored, TOKEN_MEAN):
                totals.add(self._engine.forward(batch, loss), batch)
        return totals.per_token(self._world, **counts)

    def logps(self, rollouts: Sequence[Rollout]) -> list[FloatArray]:
        """The learner's log-probs [T] of each rollout's tokens, in the order given; collective."""
        scored = [ScoredRollout(rollout=r) for r in rollouts]
        row = {id(s): number for number, s in enumerate(scored)}
        logps: list[FloatArray | None] = [None] * len(scored)
        self._model.eval()
        with torch.no_grad():
            batches = self._batches(scored, TOKEN_MEAN)
            # dummy micro-batches have no group: they run for their collectives only
            for group, batch in zip_longest(self._groups(scored), batches, fillvalue=[]):
                assert isinstance(batch, Batch)
                logp_N = self._engine.forward(batch, None).total.float().cpu().numpy()
                if not group:
                    continue
                ends = np.cumsum([len(s.rollout.token_ids) for s in group])[:-1]
                for item, part in zip(group, np.split(logp_N, ends), strict=True):
                    logps[row[id(item)]] = part
        return [part for part in logps if part is not None]

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Full tensors under their Hugging Face names, adapters merged, layer by layer; collective."""
        yield from full_weights(self._model, self._engine.gathered)

    @contextmanager
    def perturbed(self) -> Iterator[None]:
        """Inside, every weight but zeros differs by 3 to 6 %; afterwards all have their bits again.

        One bit of each number in memory is flipped, masters and moments are not touched; collective.
        """
        self._flip()
        try:
            yield
        finally:
            self._flip()

    def _flip(self) -> None:
        causal = causal_lm(self._model)
        for parameter in causal.parameters():
            for part, _ in self._engine.parts(parameter):
                flip_bit(part)
        for _, buffer in stored_buffers(causal):
            flip_bit(buffer)

    def scores(
        self, kind: MaskScores, base: Mapping[str, Stored]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, score) of every weight (see ``opd.train.mask_scores``); collective."""
        yield from scores(causal_lm(self._model), self._engine, kind, base)

    def save(self, folder: str) -> None:
        """Write weights, optimizer, version, mask, record and dropout's random state; collective."""
        self._engine.save(folder)
        state = {
            "version": self.version,
            "random": random_states(self._world.device),
            "mask": self._parameter_mask.mask,
            "record": self._recorder.state(),
            "skipped": self._skipped.state(),
            "layout": dict(self._engine.layout),
        }
        torch.save(state, Path(folder) / RANK_FILE.format(self._world.rank))

    def load(self, folder: str) -> None:
        """Restore what ``save`` wrote; collective.

        With the same engine, ranks and ZeRO settings all bits are those of the saved learner. With others
        states are the same numbers, divided anew, and dropout draws other numbers. Raises ValueError when
        another mask was trained.
        """
        state = read_rank_state(folder, self._world)
        if state["mask"] != self._parameter_mask.mask:
            raise ValueError(
                f"the checkpoint {folder} was trained with another mask: resume with the mask of the "
                "run, or use another run.dir"
            )
        self._recorder.resume(state.get("record"), folder)
        self.version = state["version"]
        layout = state.get("layout", self._engine.layout)
        if layout == self._engine.layout:
            self._engine.load(folder)
        else:
            self._engine.restore(folder, layout)
        self._parameter_mask.write_back(self._engine)
        self._skipped.load(state.get("skipped", self._skipped.state()))
        seed = self.version * 1_000_003 + self._world.rank
        set_random_states(state.get("random"), self._world.device, seed=seed)

    def _token_counts(
        self, scored: Sequence[ScoredRollout], reduction: LossReduction
    ) -> dict[str, float]:
        """Over all ranks: ``tokens`` that are learned from, ``denominator`` of the loss."""
        own = float(sum(map(reduction.kept, scored)))
        return self._world.sum({"tokens": own, "denominator": reduction.denominator(scored)})

    def _find_loss_fault(self, losses: list[float], scored: Sequence[ScoredRollout]) -> str | None:
        # dummy micro-batches have no group
        each = zip_longest(losses, self._groups(scored), fillvalue=[])
        pairs = [(loss, group) for loss, group in each if isinstance(loss, float)]
        return find_loss_fault(pairs, self._model, self._engine, self._world, self.version + 1)

    def _rewards(self, scored: Sequence[ScoredRollout]) -> dict[str, float]:
        """The mean over all ranks, if any rollout has a reward."""
        rewards = [s.reward for s in scored if s.reward is not None]
        sums = self._world.sum({"reward": math.fsum(rewards), "count": float(len(rewards))})
        return {"reward/mean": sums["reward"] / sums["count"]} if sums["count"] else {}

    def _groups(self, scored: Sequence[ScoredRollout]) -> list[list[ScoredRollout]]:
        tokens = self._train.max_tokens_per_micro_batch
        return micro_batches(scored, tokens=tokens, packing=self._packing)

    def _batches(
        self, scored: Sequence[ScoredRollout], reduction: LossReduction, *, discount: float = 0.0
    ) -> list[Batch]:
        """This rank's micro-batches, followed by dummy micro-batches of no tokens.

        Every rank runs as many as the busiest one, because collectives must match.
        """
        batches = [self._collated(group, reduction, discount) for group in self._groups(scored)]
        most = int(self._world.max({"batches": float(len(batches))})["batches"])
        dummy = self._collated(list(scored[:1]), reduction, discount).rows(0, 0)
        return batches + [dummy] * (most - len(batches))

    def _collated(
        self, scored: Sequence[ScoredRollout], reduction: LossReduction, discount: float
    ) -> Batch:
        return collate(
            scored,
            pad_id=self._pad_id,
            discount=discount,
            reduction=reduction,
            packing=self._packing,
        )
