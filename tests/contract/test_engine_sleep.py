"""A colocated engine that sleeps between steps changes no result, and never generates from freed weights.

The sleep of a CUDA worker, on the CPU: freed memory is NaN (``tests.support.sleeping_worker``).
"""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import LLM

from opd.assembly import rollout as assembly
from opd.assembly.training import Training, build_training
from opd.config.rollout import VllmEngineConfig
from opd.config.student import DType
from opd.rollout.sleep import EngineSleep, SleepLevel
from opd.rollout.vllm import VllmRollouts, start_llm
from opd.run.recipe import load_recipe
from opd.run.self_check import compare_at_start
from opd.sync.verify import SyncMismatch
from tests.support import sleeping_worker

STUDENT = Path(__file__).parents[2] / "recipes" / "quickstart" / "student"
MAX_LENGTH = 128
SMALL = [
    "launch.engine=torch", "launch.processes=1", "teacher=local", "train.steps=3",
    "train.prompts_per_step=4", "rollout.max_tokens=12", "eval.every=1", "sync.verify_every=1",
    "eval.kl_prompts=4", "data.eval_limit=4", "eval.teacher_accuracy=false",
]  # fmt: skip
MIXED = [
    "rollout.on_policy=0.5",
    "rollout.max_tokens=48",
    f"data.train={STUDENT.parent / 'written.jsonl.gz'}",
    "data.completion_field=completion",
]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    """One engine for every run: each replaces all of its weights first."""
    with pytest.MonkeyPatch.context() as patch:
        sleeping_worker.install(patch)
        yield start_llm(
            str(STUDENT),
            VllmEngineConfig(kv_cache_memory_bytes=32 << 20),
            dtype=DType.float32,
            max_model_len=MAX_LENGTH,
            seed=0,
            sleeps=False,
            device=torch.device("cpu"),
        )


@pytest.fixture
def levels(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[SleepLevel]]:
    """Runs use ``llm`` and sleep; the levels at which they slept, in order."""
    slept: list[SleepLevel] = []
    sleep = EngineSleep.sleep

    def counted(self: EngineSleep, level: SleepLevel) -> None:
        slept.append(level)
        sleep(self, level)

    monkeypatch.setattr(EngineSleep, "sleep", counted)
    monkeypatch.setattr(assembly, "start_llm", lambda *args, **kwargs: llm)
    monkeypatch.setattr(assembly, "engine_sleeps", lambda rollout, world: True)
    yield slept
    llm.wake_up()  # after a run that was ended on purpose


def build(folder: Path, *overrides: str) -> Training:
    recipe = load_recipe("quickstart", *SMALL, *overrides)
    folder.mkdir()
    training = build_training(recipe.config, folder, recipe.plain, io.StringIO(), None)
    compare_at_start(recipe.config, training)
    return training


def run(folder: Path, *overrides: str) -> list[dict[str, Any]]:
    """The metrics of a run without those that measure time."""
    training = build(folder, *overrides)
    training.loop.run(training.start)
    training.loop.tracker.close()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("time")} for row in rows]


@pytest.mark.parametrize("overrides", [[], MIXED], ids=["on_policy", "mixed"])
def test_a_sleeping_engine_changes_no_metric(
    llm: LLM,
    levels: list[SleepLevel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    overrides: list[str],
) -> None:
    sleeping = run(tmp_path / "sleeping", *overrides)
    slept = levels.copy()
    llm.wake_up()
    monkeypatch.setattr(assembly, "engine_sleeps", lambda rollout, world: False)
    awake = run(tmp_path / "awake", *overrides)
    assert [row["step"] for row in sleeping] == [0, 1, 2, 3]
    assert all(row["sync/gap"] < 1e-5 for row in sleeping)
    assert sleeping == awake
    keep, discard = SleepLevel.keep_weights, SleepLevel.discard_weights
    # built; the first check; then sync check, greedy evaluation and divergence of each version
    version = [keep] * 3
    assert slept == [discard, keep, *version, *([discard, *version] * 3)]


def test_weights_are_discarded_before_the_learner_is_built(
    levels: list[SleepLevel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def model(*args: Any) -> None:
        raise InterruptedError(repr(levels))

    monkeypatch.setattr("opd.assembly.training.build_model", model)
    with pytest.raises(InterruptedError, match="discard_weights"):
        build(tmp_path / "run")


def test_an_evaluation_that_discards_weights_ends_the_run(
    levels: list[SleepLevel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = build(tmp_path / "run")
    monkeypatch.setattr(
        VllmRollouts,
        "generate",
        lambda self, prompts, sampling: self._generate(
            prompts, sampling, SleepLevel.discard_weights
        ),
    )
    with pytest.raises(AssertionError, match="none were pushed since"):
        training.loop.run(training.start)
    assert levels[-1] == SleepLevel.discard_weights


def test_without_that_check_the_engine_would_compute_nan(
    levels: list[SleepLevel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = build(tmp_path / "run")
    check = training.sync_check
    assert check is not None
    training.loop.sync.push(training.learner.weights(), 0)
    assert check.verify()["sync/gap"] < 1e-5
    training.writer.engine.generate(training.writer.prompts.take(0), training.writer.sampling)
    monkeypatch.setattr(EngineSleep, "_require_weights", lambda self: None)
    with pytest.raises(SyncMismatch, match="nan"):
        check.verify()


def test_a_tensor_that_a_push_does_not_reach_is_seen_after_a_sleep(
    levels: list[SleepLevel], tmp_path: Path
) -> None:
    training = build(tmp_path / "run")
    check, loop = training.sync_check, training.loop
    assert check is not None
    loop.sync.push(training.learner.weights(), 0)
    training.writer.engine.generate(training.writer.prompts.take(0), training.writer.sampling)
    norm = "model.layers.0.input_layernorm.weight"
    weights = dict(training.learner.weights())
    assert weights.pop(norm) is not None
    loop.sync.push(iter(weights.items()), 0)
    with pytest.raises(SyncMismatch, match="nan"):
        check.verify()
