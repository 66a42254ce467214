"""What a loss requests of teacher and engine, and the combinations that are refused."""

import pytest

from opd.config.rollout import training_sampling
from opd.config.schema import Config, problems
from opd.run.recipe import load_recipe
from opd.types import Correction, ScoreRequest


def quickstart(*overrides: str) -> Config:
    return load_recipe("quickstart", "rollout.n=4", *overrides).config


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["loss=policy_gradient", "loss.weighting=teacher_entropy"], "sampled tokens only"),
        (["loss=nll", "loss.weighting=gap"], "needs no teacher"),
        (["loss=grpo", "loss.weighting=gap"], "needs no teacher"),
        (["loss=policy_gradient", "loss.correction=mask"], "surrogate=plain"),
        (["loss=grpo", "reward=grader", "rollout.n=1"], "use 2 or more"),
        (["loss=jsd", "reward=grader", "loss.reward_weight=0.1", "rollout.n=1"], "use 2 or more"),
        (["loss=jsd", "loss.correction_min=1.5"], "loss.correction_min=1.5"),
        (
            ["loss=policy_gradient", "loss.teacher_weight=0", "loss.reward_weight=0"],
            "leave no advantage",
        ),
        (["loss=function", "loss.path=f.py:F", "loss.teacher=none", "loss.weighting=gap"], "gap"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_what_cannot_be_is_refused(overrides: list[str], sentence: str) -> None:
    assert any(sentence in problem for problem in problems(quickstart(*overrides)))


def test_a_loss_of_ones_own_without_a_file_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^loss\.path is not set: give it in the recipe or as"):
        quickstart("loss=function")


@pytest.mark.parametrize(
    ("overrides", "expected", "support_k"),
    [
        (["loss=nll"], ScoreRequest(sampled=False), 0),
        (["loss=grpo", "reward=grader"], ScoreRequest(sampled=False), 0),
        (
            ["loss=grpo", "reward=grader", "loss.kl_coef=0.1", "loss.weighting=gap"],
            ScoreRequest(),
            0,
        ),
        (["loss=policy_gradient"], ScoreRequest(), 0),
        (["loss=jsd"], ScoreRequest(full=True), 0),
        (["loss=topk_forward_kl", "loss.k=8"], ScoreRequest(top_k=8), 0),
        (["loss=jsd", "loss.support=student_top_k"], ScoreRequest(rollout_support=True), 32),
        (["loss=jsd", "loss.support=union"], ScoreRequest(top_k=32, rollout_support=True), 32),
        (["loss=jsd", "loss.support=intersection"], ScoreRequest(top_k=32), 32),
        (["loss=function", "loss.path=f.py:F"], ScoreRequest(full=True), 0),
        (
            ["loss=function", "loss.path=f.py:F", "loss.teacher=top_k", "loss.k=8"],
            ScoreRequest(top_k=8),
            0,
        ),
        (["loss=function", "loss.path=f.py:F", "loss.teacher=sampled"], ScoreRequest(), 0),
        (
            ["loss=function", "loss.path=f.py:F", "loss.teacher=none"],
            ScoreRequest(sampled=False),
            0,
        ),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_teacher_and_engine_are_asked_for_what_the_loss_reads(
    overrides: list[str], expected: ScoreRequest, support_k: int
) -> None:
    config = quickstart(*overrides)
    assert problems(config) == []
    assert config.loss.request() == expected
    assert config.loss.needs_teacher == expected.sampled
    assert training_sampling(config).support_k == support_k


def test_the_teacher_is_asked_at_the_sampling_temperature() -> None:
    for choice in ("jsd", "topk_forward_kl", "policy_gradient", "nll", "grpo"):
        assert quickstart(f"loss={choice}").loss.request(0.7).temperature == 0.7


def test_only_corrections_of_whole_completions_need_sequence_gaps() -> None:
    names = {correction.value for correction in Correction if correction.of_sequence}
    assert names == {
        "sequence_truncate",
        "sequence_mask",
        "geometric_truncate",
        "geometric_mask",
    }
