"""The evaluator: right sums on any number of ranks, and transcripts that add up."""

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace

import numpy as np
import pytest

from opd.config.eval import EvalConfig
from opd.evaluate.evaluator import Evaluators, TaskEvaluator, pass_at, token_texts
from opd.evaluate.grade import grader
from opd.types import FinishReason, Prompt, Rollout, ScoredRollout


def decode(token_ids):
    return bytes(token_ids).decode("utf-8", errors="replace")


def encode(text):
    return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int32)


def prompts(count):
    return [
        Prompt(uid=str(i), token_ids=encode(f"{i}?"), answer=str(i), text=f"{i}?")
        for i in range(count)
    ]


class Parrot:
    """Answers prompt i with i when sample < i % 4 (or greedily when i is even), else "no"."""

    def __init__(self):
        self.requests = []

    def generate(self, prompts, sampling):
        self.requests.append(sampling)
        return [
            self._rollout(prompt, sample, sampling)
            for prompt, sample in itertools.product(prompts, range(sampling.n))
        ]

    def _rollout(self, prompt, sample, sampling):
        number = int(prompt.uid)
        right = number % 2 == 0 if sampling.temperature == 0 else sample < number % 4
        token_ids = encode(prompt.uid if right else "no")
        return Rollout(
            prompt=prompt,
            token_ids=token_ids,
            logps=np.full(len(token_ids), -1.0, np.float32),
            finish_reason=FinishReason.stop if right else FinishReason.length,
            version=0,
            sample=sample,
        )


class SureTeacher:
    def score(self, rollouts):
        return [ScoredRollout(rollout=r, logps=np.full_like(r.logps, -0.25)) for r in rollouts]


class Alone:
    rank, size = 0, 1

    def sum(self, values):
        return dict(values)


class Meeting:
    """Ranks as threads, meeting at a barrier as collectives do."""

    def __init__(self, rank, size, barrier, values):
        self.rank, self.size = rank, size
        self._barrier, self._values = barrier, values

    def sum(self, values):
        self._values[self.rank] = values
        self._barrier.wait()
        total = {name: sum(row[name] for row in self._values) for name in values}
        self._barrier.wait()
        return total


CONFIG_FIELDS = {field.name for field in fields(EvalConfig)} - {"teacher_accuracy"}
"""EvalConfig.teacher_accuracy asks for the number; TaskEvaluator.teacher_accuracy is the number."""


def evaluator(world=None, **changes):
    """``changes`` are fields of EvalConfig or arguments of TaskEvaluator."""
    config = EvalConfig(task="sums")
    config = replace(config, **{k: v for k, v in changes.items() if k in CONFIG_FIELDS})
    arguments = {
        "prompts": prompts(8),
        "engine": Parrot(),
        "decode": decode,
        "grade": grader("exact"),
        "world": world or Alone(),
        "max_tokens": 5,
    }
    arguments |= {k: v for k, v in changes.items() if k not in CONFIG_FIELDS}
    return TaskEvaluator(config, **arguments)


def test_greedy_metrics_count_what_was_written():
    metrics = evaluator().evaluate(3).metrics
    assert metrics == {
        "eval/sums/accuracy": 0.5,
        "eval/sums/length": 1.5,
        "eval/sums/truncated": 0.5,
    }


def test_mean_at_k_and_pass_at_j_come_from_k_samples():
    metrics = evaluator(k=4, temperature=0.7).evaluate(3).metrics
    assert metrics["eval/sums/mean_at_k"] == pytest.approx((0 + 1 + 2 + 3) / 16)
    assert metrics["eval/sums/pass_at_2"] == pytest.approx((0 + 1 / 2 + 5 / 6 + 1) / 4)
    assert metrics["eval/sums/pass_at_4"] == pytest.approx(3 / 4)


def test_pass_at_j_is_the_share_of_draws_with_a_right_answer():
    answers = [True, True, False, False, False, False]
    draws = list(itertools.combinations(answers, 3))
    assert pass_at(3, 6, 2) == pytest.approx(sum(map(any, draws)) / len(draws))


@pytest.mark.parametrize("size", [2, 3, 11])
def test_the_metrics_do_not_depend_on_the_number_of_ranks(size):
    barrier, values = threading.Barrier(size), [{} for _ in range(size)]
    with ThreadPoolExecutor(size) as pool:
        evaluations = list(
            pool.map(
                lambda rank: evaluator(Meeting(rank, size, barrier, values), k=2).evaluate(0),
                range(size),
            )
        )
    alone = evaluator(k=2).evaluate(0)
    assert all(evaluation.metrics == alone.metrics for evaluation in evaluations)
    assert evaluations[0].samples
    assert not any(evaluation.samples for evaluation in evaluations[1:])


def test_a_transcript_carries_tokens_and_the_teachers_gap():
    samples = evaluator(samples=2, teacher=SureTeacher()).evaluate(0).samples
    assert [sample["correct"] for sample in samples] == [True, False]
    assert samples[1] == {
        "task": "sums",
        "uid": "1",
        "prompt": "1?",
        "completion": "no",
        "answer": "1",
        "correct": False,
        "finish_reason": "length",
        "tokens": ["n", "o"],
        "gap": [0.75, 0.75],
    }


def test_a_transcript_shows_every_alternative_of_an_answer():
    several = [replace(prompt, answer=("x", prompt.uid)) for prompt in prompts(8)]
    sample = evaluator(prompts=several).evaluate(0).samples[0]
    assert (sample["answer"], sample["correct"]) == ("x | 0", True)


def test_without_a_teacher_a_transcript_has_no_gap():
    assert "gap" not in evaluator().evaluate(0).samples[0]


def test_the_teachers_accuracy_is_logged_once_at_step_zero():
    task = evaluator(teacher_accuracy=0.9)
    assert task.evaluate(0).metrics["eval/sums/teacher_accuracy"] == 0.9
    assert "eval/sums/teacher_accuracy" not in task.evaluate(1).metrics


def test_two_tasks_are_one_evaluator():
    both = Evaluators(tasks=[evaluator(), evaluator(task="other")]).evaluate(1)
    assert {"eval/sums/accuracy", "eval/other/accuracy"} <= set(both.metrics)
    assert {sample["task"] for sample in both.samples} == {"sums", "other"}


def test_a_task_that_cannot_be_graded_is_refused():
    unanswered = Prompt(uid="7", token_ids=encode("x"))
    with pytest.raises(ValueError, match="prompt 7 has no answer"):
        evaluator(prompts=[unanswered])
    with pytest.raises(ValueError, match="found no prompts"):
        evaluator(prompts=[])


def test_token_texts_join_to_the_completion_even_within_a_character():
    token_ids = encode("a é 漢字!").tolist()
    texts = token_texts(token_ids, decode)
    assert len(texts) == len(token_ids)
    assert "".join(texts) == "a é 漢字!"
    assert texts[2:5] == ["", "é", " "]
