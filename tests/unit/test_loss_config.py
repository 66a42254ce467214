"""What a loss asks for, and the combinations that are refused."""

import pytest

from opd.assembly.loss import build_loss, reckoning_of, sampling_of, wanted_of, wants_sequence_gaps
from opd.config.schema import Config, problems
from opd.losses.divergence import Divergence
from opd.losses.policy_gradient import PolicyGradient
from opd.losses.with_reward import Rewarded
from opd.run.recipe import composed, packaged_recipes
from opd.types import Reduction, ScoreRequest, Surrogate


def config_of(*overrides: str) -> Config:
    return composed(packaged_recipes()["quickstart"], ["rollout.n=4", *overrides]).config


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["loss=policy_gradient", "loss.weighting=teacher_entropy"], "sampled tokens only"),
        (["loss=nll", "loss.weighting=gap"], "asks no teacher"),
        (["loss=grpo", "loss.weighting=gap"], "asks no teacher"),
        (["loss=policy_gradient", "loss.correction=mask"], "surrogate=plain"),
        (["loss=grpo", "reward=grader", "rollout.n=1"], "use 2 or more"),
        (["loss=jsd", "reward=grader", "loss.reward_weight=0.1", "rollout.n=1"], "use 2 or more"),
        (["loss=jsd", "loss.band_low=1.5"], "loss.band_low=1.5"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_what_cannot_be_is_refused(overrides: list[str], sentence: str) -> None:
    assert any(sentence in problem for problem in problems(config_of(*overrides)))


@pytest.mark.parametrize(
    ("overrides", "wanted", "support_k"),
    [
        (["loss=nll"], ScoreRequest(sampled=False), 0),
        (["loss=grpo", "reward=grader"], ScoreRequest(sampled=False), 0),
        (["loss=grpo", "reward=grader", "loss.kl=0.1", "loss.weighting=gap"], ScoreRequest(), 0),
        (["loss=jsd"], ScoreRequest(full=True), 0),
        (["loss=jsd", "loss.support=union"], ScoreRequest(top_k=32, rollout_support=True), 32),
        (["loss=jsd", "loss.support=intersection"], ScoreRequest(top_k=32), 32),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_teacher_and_engine_are_asked_for_what_the_loss_reads(
    overrides: list[str], wanted: ScoreRequest, support_k: int
) -> None:
    config = config_of(*overrides)
    assert problems(config) == []
    assert wanted_of(config.loss, 1.0) == wanted
    assert sampling_of(config).support_k == support_k


def test_a_reward_beside_a_divergence_is_corrected_once() -> None:
    plain = build_loss(config_of("loss=jsd", "loss.reward_weight=0.5").loss)
    config = config_of("loss=jsd", "loss.reward_weight=0.5", "loss.correction=sequence_mask")
    corrected = build_loss(config.loss)
    assert isinstance(plain, Rewarded)
    assert isinstance(corrected, Rewarded)
    assert isinstance(plain.loss, Divergence)
    assert plain.policy.surrogate == Surrogate.clip
    assert corrected.policy.surrogate == Surrogate.plain
    assert corrected.policy.factors.correction.correction == "sequence_mask"
    assert wants_sequence_gaps(config.loss)


def test_grpo_is_a_policy_gradient_without_a_teacher() -> None:
    config = config_of("loss=grpo", "loss.normalise=constant", "loss.first_share=0.5")
    loss = build_loss(config.loss)
    assert isinstance(loss, PolicyGradient)
    assert (loss.teacher_weight, loss.reward_weight) == (0.0, 1.0)
    reduction = reckoning_of(config)
    assert reduction.normalise == Reduction.constant
    assert reduction.first_share == 0.5
    assert reduction.max_tokens == config.rollout.max_tokens
