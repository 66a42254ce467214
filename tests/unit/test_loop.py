"""The order of the loop: who is called when, and with what."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from opd.faults import Interrupted
from opd.loop import Loop
from opd.phases import RunPhase
from opd.schedule.synchronous import Synchronous
from opd.schedule.writing import StepWriter
from opd.types import (
    Evaluation,
    FinishReason,
    Prompt,
    Rollout,
    Sampling,
    ScoredRollout,
    StepReport,
    TeacherInfo,
)


class Everybody:
    """All the loop's clients in one, recording the calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.rows: dict[int, Mapping[str, float]] = {}
        self.seeds: list[int] = []
        self.phases: list[str] = []
        self.version = 0

    def enter(self, phase: RunPhase, step: int) -> None:
        self.phases.append(f"{phase} {step}")

    def take(self, step: int) -> list[Prompt]:
        self.calls.append(f"take {step}")
        return [Prompt(uid="a", token_ids=np.ones(1, np.int32))]

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Rollout]:
        self.calls.append("generate")
        self.seeds.append(sampling.seed)
        return [
            Rollout(
                prompt=p,
                token_ids=np.ones(3, np.int32),
                logps=np.zeros(3, np.float32),
                finish_reason=FinishReason.length,
                version=self.version,
            )
            for p in prompts
        ]

    def score(self, rollouts: Sequence[Rollout]) -> list[ScoredRollout]:
        self.calls.append("score")
        return [ScoredRollout(rollout=r) for r in rollouts]

    def info(self) -> TeacherInfo:
        raise AssertionError("the loop does not call this")

    def head(self, name: str | None = None) -> Any:
        raise AssertionError("the loop does not call this")

    def step(self, scored: Sequence[ScoredRollout]) -> StepReport:
        self.calls.append("learn")
        self.version += 1
        return StepReport(version=self.version, metrics={"loss/total": 1.0})

    def weights(self) -> Iterable[Any]:
        return [("w", self.version)]

    def load(self, folder: str) -> None:
        raise AssertionError("the loop does not load")

    def push(self, weights: Iterable[Any], version: int) -> dict[str, float]:
        assert list(weights) == [("w", self.version)]
        self.calls.append(f"push {version}")
        return {"sync/bytes": 1.0}

    def evaluate(self, step: int) -> Evaluation:
        self.calls.append(f"evaluate {step}")
        return Evaluation(metrics={"eval/t/accuracy": 0.5}, samples=[{"uid": "a"}])

    def verify(self) -> dict[str, float]:
        self.calls.append("verify")
        return {"sync/gap": 0.0}

    def watch(self, metrics: Mapping[str, float]) -> None:
        assert metrics == {"loss/total": 1.0}
        self.calls.append("watch")

    def save(self, step: int, metrics: Mapping[str, float]) -> None:
        self.calls.append(f"save {step}")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.rows[step] = metrics

    def log_samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        self.calls.append(f"samples {step}")

    def close(self) -> None: ...


def run(
    everybody: Everybody,
    *,
    start: int,
    steps: int,
    every: int,
    stop_in: int | None = None,
    best_in: int | None = None,
) -> list[str]:
    Loop(
        schedule=Synchronous(
            StepWriter(
                prompts=everybody,
                engine=everybody,
                teacher=everybody,
                sampling=Sampling(seed=3),
            ),
            everybody.enter,
        ),
        learner=everybody,
        sync=everybody,
        evaluator=everybody,
        tracker=everybody,
        verify=everybody.verify,
        watch=everybody.watch,
        save=everybody.save,
        is_best=lambda metrics: everybody.version == best_in,
        interrupted=lambda: everybody.version == stop_in,
        total=dict,
        enter=everybody.enter,
        steps=steps,
        eval_every=every,
        save_every=every,
        verify_every=every,
    ).run(start)
    return everybody.calls


STEP = ["generate", "score", "learn", "watch"]


def test_weights_go_out_before_the_first_call_and_after_every_step() -> None:
    calls = run(Everybody(), start=0, steps=3, every=2)
    assert calls == [
        "push 0", "verify", "evaluate 0", "samples 0",
        "take 0", *STEP, "push 1",
        "take 1", *STEP, "push 2", "verify", "evaluate 2", "samples 2", "save 2",
        "take 2", *STEP, "push 3", "evaluate 3", "samples 3", "save 3",
    ]  # fmt: skip


def test_a_resumed_run_takes_the_next_prompts_and_does_not_repeat_step_0() -> None:
    everybody = Everybody()
    everybody.version = 2
    calls = run(everybody, start=2, steps=3, every=0)
    assert calls == [
        "push 2",
        "verify",
        "take 2",
        *STEP,
        "push 3",
        "evaluate 3",
        "samples 3",
        "save 3",
    ]
    assert list(everybody.rows) == [3]


def test_every_step_draws_with_its_own_seed_whether_resumed_or_not() -> None:
    whole, later = Everybody(), Everybody()
    later.version = 2
    run(whole, start=0, steps=4, every=0)
    run(later, start=2, steps=4, every=0)
    assert len(set(whole.seeds)) == 4
    assert later.seeds == whole.seeds[2:]


def test_a_row_holds_lengths_tokens_times_and_bytes() -> None:
    everybody = Everybody()
    run(everybody, start=0, steps=1, every=0)
    row = everybody.rows[1]
    assert row["rollout/length"] == 3
    assert row["rollout/truncated"] == 1
    assert row["tokens/generated"] == 3
    assert {"time/rollout", "time/teacher", "time/learn", "time/sync", "time/step"} <= row.keys()
    assert everybody.rows[0].keys() >= {"eval/t/accuracy", "sync/bytes", "sync/gap"}


@pytest.mark.parametrize(("stop_in", "saved"), [(1, ["save 1"]), (2, ["save 2"])])
def test_an_interrupted_run_saves_the_step_that_it_is_in_once(
    stop_in: int, saved: list[str]
) -> None:
    everybody = Everybody()
    with pytest.raises(Interrupted, match=f"after step {stop_in}, whose checkpoint is saved"):
        run(everybody, start=0, steps=3, every=2, stop_in=stop_in)
    assert [call for call in everybody.calls if call.startswith("save")] == saved
    assert list(everybody.rows) == list(range(stop_in + 1))


def test_a_request_to_stop_in_the_last_step_changes_nothing() -> None:
    calls = run(Everybody(), start=0, steps=3, every=0, stop_in=3)
    assert calls[-1] == "save 3"


def test_every_phase_is_entered_with_its_step() -> None:
    everybody = Everybody()
    run(everybody, start=0, steps=2, every=2)
    one, two = (
        [f"{phase} {n}" for phase in ("rollout", "teacher", "learn", "sync")] for n in (1, 2)
    )
    assert everybody.phases == ["sync 0", "evaluate 0", *one, *two, "evaluate 2", "checkpoint 2"]


def test_a_step_that_is_the_best_so_far_is_saved_and_none_twice() -> None:
    for best_in, saved in ((1, ["save 1", "save 2", "save 3"]), (2, ["save 2", "save 3"])):
        calls = run(Everybody(), start=0, steps=3, every=2, best_in=best_in)
        assert [call for call in calls if call.startswith("save")] == saved
