"""Evaluates one task: generate, grade, sum over ranks, keep a few transcripts."""

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from math import comb
from typing import Any

import numpy as np

from opd.config.eval import EvalConfig
from opd.evaluate.grade import Grade, shown_answer
from opd.interfaces import Evaluator, RolloutEngine, Teacher
from opd.types import Evaluation, FinishReason, Prompt, Rollout, Sampling
from opd.world import World

Decode = Callable[[Sequence[int]], str]
"""Token ids to text without special tokens."""


@dataclass(frozen=True, slots=True)
class TaskEvaluator:
    """An ``Evaluator`` of one task; each rank evaluates every ``world.size``-th prompt.

    Every step samples with the same ``seed``, so that two steps differ only by the weights. Metrics,
    all below ``eval/<task>/``:

    accuracy, length (tokens), truncated (share): of one greedy completion a prompt.
    mean_at_k, pass_at_<j>: of ``config.k`` completions sampled at ``config.temperature``; none for
        k = 0. pass_at_<j>, for j = 2, 4, 8, ... up to k, is the unbiased estimate ``pass_at``.
    teacher_accuracy: the given number, at step 0 only.

    The first ``config.samples`` completions of rank 0 are kept as transcripts; with a ``teacher`` they
    carry ``gap``: teacher log-prob minus student log-prob of every token (nats).
    The engine and ``teacher`` may be collective, so every rank calls both, with an empty list where
    its share is empty.
    """

    config: EvalConfig
    _: KW_ONLY
    prompts: Sequence[Prompt]
    engine: RolloutEngine
    decode: Decode
    grade: Grade
    world: World
    max_tokens: int
    seed: int = 0
    teacher: Teacher | None = None
    teacher_accuracy: float | None = None

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError(f"task {self.config.task}: found no prompts; give at least one")
        unanswered = next((prompt.uid for prompt in self.prompts if prompt.answer is None), None)
        if unanswered is not None:
            raise ValueError(
                f"task {self.config.task}: prompt {unanswered} has no answer to grade against; "
                "name the right answer_field, or add the answers"
            )

    def evaluate(self, step: int) -> Evaluation:
        """Metrics reduced over ranks; collective."""
        share = self.prompts[self.world.rank :: self.world.size]
        greedy = self._generate(share, n=1, temperature=0.0)
        correct = [self._is_correct(rollout) for rollout in greedy]
        sums = _greedy_sums(greedy, correct) | self._sampled_sums(share)
        metrics = {name: total / len(self.prompts) for name, total in self.world.sum(sums).items()}
        if step == 0 and self.teacher_accuracy is not None:
            metrics["teacher_accuracy"] = self.teacher_accuracy
        return Evaluation(
            metrics={f"eval/{self.config.task}/{name}": value for name, value in metrics.items()},
            samples=self._transcripts(greedy[: self.config.samples], correct),
        )

    def _generate(self, prompts: Sequence[Prompt], n: int, temperature: float) -> list[Rollout]:
        sampling = Sampling(
            n=n, temperature=temperature, max_tokens=self.max_tokens, seed=self.seed
        )
        return self.engine.generate(prompts, sampling)

    def _is_correct(self, rollout: Rollout) -> bool:
        assert rollout.prompt.answer is not None
        return self.grade(self.decode(rollout.token_ids.tolist()), rollout.prompt.answer)

    def _sampled_sums(self, share: Sequence[Prompt]) -> dict[str, float]:
        if not self.config.k:
            return {}
        rollouts = self._generate(share, n=self.config.k, temperature=self.config.temperature)
        correct = np.array([self._is_correct(rollout) for rollout in rollouts], dtype=bool)
        counts = correct.reshape(len(share), self.config.k).sum(axis=1).tolist()
        powers = [2**e for e in range(1, self.config.k.bit_length()) if 2**e <= self.config.k]
        return {"mean_at_k": sum(counts) / self.config.k} | {
            f"pass_at_{j}": sum(pass_at(j, self.config.k, count) for count in counts)
            for j in powers
        }

    def _transcripts(self, rollouts: list[Rollout], correct: list[bool]) -> list[dict[str, Any]]:
        gaps: list[list[float] | None] = [None] * len(rollouts)
        if self.teacher is not None:
            scored = self.teacher.score(rollouts)
            gaps = [
                None if row.logps is None else (row.logps - row.rollout.logps).tolist()
                for row in scored
            ]
        if self.world.rank != 0:
            return []
        return [
            _transcript(self.config.task, rollout, self.decode, is_correct, gap)
            for rollout, is_correct, gap in zip(rollouts, correct, gaps, strict=False)
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluators:
    """Several tasks as one ``Evaluator``, evaluated in the order given."""

    tasks: Sequence[Evaluator]

    def evaluate(self, step: int) -> Evaluation:
        """The tasks' metrics and samples together; collective."""
        metrics: dict[str, float] = {}
        samples: list[dict[str, Any]] = []
        for task in self.tasks:
            evaluation = task.evaluate(step)
            metrics |= evaluation.metrics
            samples += evaluation.samples
        return Evaluation(metrics=metrics, samples=samples)


def pass_at(j: int, n: int, correct: int) -> float:
    """Probability that at least one of ``j`` samples drawn from ``n``, of which ``correct`` are, is correct.

    1 - C(n - correct, j) / C(n, j), the unbiased estimator of pass@j (Chen et al. 2021,
    arXiv 2107.03374).
    """
    assert 0 < j <= n
    return 1.0 - comb(n - correct, j) / comb(n, j)


def token_texts(token_ids: Sequence[int], decode: Decode) -> list[str]:
    """The text that each token adds; joined, they are the decoded completion.

    A token alone may decode to less (sentencepiece drops a leading space) or to part of a character;
    the whole character is then the text of its last token.
    """
    texts: list[str] = []
    done = 0
    for end in range(1, len(token_ids) + 1):
        start = max(0, done - _CONTEXT)
        before, now = decode(token_ids[start:done]), decode(token_ids[start:end])
        if now.endswith("\ufffd") and end < len(token_ids):
            texts.append("")
            continue
        texts.append(now[len(before) :])
        done = end
    return texts


_CONTEXT = 8
"""Tokens decoded before the one whose text is wanted."""


def _greedy_sums(rollouts: Sequence[Rollout], correct: Sequence[bool]) -> dict[str, float]:
    return {
        "accuracy": float(sum(correct)),
        "length": float(sum(len(rollout.token_ids) for rollout in rollouts)),
        "truncated": float(
            sum(rollout.finish_reason is FinishReason.length for rollout in rollouts)
        ),
    }


def _transcript(
    task: str, rollout: Rollout, decode: Decode, correct: bool, gap: list[float] | None
) -> dict[str, Any]:
    token_ids = rollout.token_ids.tolist()
    assert rollout.prompt.answer is not None
    row: dict[str, Any] = {
        "task": task,
        "uid": rollout.prompt.uid,
        "prompt": rollout.prompt.text or decode(rollout.prompt.token_ids.tolist()),
        "completion": decode(token_ids),
        "answer": shown_answer(rollout.prompt.answer),
        "correct": correct,
        "finish_reason": str(rollout.finish_reason),
        "tokens": token_texts(token_ids, decode),
    }
    return row if gap is None else row | {"gap": gap}
