"""A configuration becomes the loss that its settings describe."""

from pathlib import Path

import pytest
import torch

from opd.assembly.loss import build_loss, build_reduction, return_discount
from opd.config.loss import CHOICES, DivergenceLossConfig, PolicyGradientLossConfig
from opd.config.schema import Config
from opd.losses.divergence import Divergence
from opd.losses.nll import NegativeLogLikelihood
from opd.losses.policy_gradient import PolicyGradient
from opd.losses.with_reward import WithReward
from opd.run.recipe import load_recipe
from opd.types import Correction, DivergenceKind, Reduction, Surrogate, Weighting
from tests.conformance.loss_cases import case, logits


def quickstart(*overrides: str) -> Config:
    return load_recipe("quickstart", "rollout.n=4", *overrides).config


@pytest.mark.parametrize("choice", sorted(CHOICES.keys() - {"function"}))
def test_every_choice_of_the_group_builds_its_loss_with_its_own_settings(choice: str) -> None:
    config = quickstart(f"loss={choice}").loss
    loss = build_loss(config)
    kinds = {
        "nll": NegativeLogLikelihood,
        "policy_gradient": PolicyGradient,
        "grpo": PolicyGradient,
    }
    assert type(loss) is kinds.get(choice, Divergence)
    assert isinstance(loss, Divergence | NegativeLogLikelihood | PolicyGradient)
    assert loss.config == config
    if isinstance(config, DivergenceLossConfig):
        assert config.kind == DivergenceKind(choice.removeprefix("topk_"))
        assert (config.support == "teacher_top_k") == choice.startswith("topk_")


def test_a_reward_beside_a_divergence_is_corrected_once() -> None:
    plain = build_loss(quickstart("loss=jsd", "loss.reward_weight=0.5").loss)
    corrected = build_loss(
        quickstart("loss=jsd", "loss.reward_weight=0.5", "loss.correction=sequence_mask").loss
    )
    assert isinstance(plain, WithReward)
    assert isinstance(corrected, WithReward)
    assert isinstance(plain.loss, Divergence)
    assert plain.policy.config.surrogate == Surrogate.clip
    assert corrected.policy.config.surrogate == Surrogate.plain
    assert corrected.policy.config.correction == Correction.sequence_mask


def test_a_reward_beside_a_divergence_takes_every_setting_but_the_weighting() -> None:
    config = quickstart(
        "loss=jsd",
        "loss.reward_weight=0.5",
        "loss.weighting=gap",
        "loss.correction=truncate",
        "loss.correction_cap=1.5",
        "loss.correction_min=0.25",
        "loss.correction_max=3",
        "loss.clip_ratio_low=0.1",
        "loss.clip_ratio_high=0.4",
    ).loss
    loss = build_loss(config)
    assert isinstance(loss, WithReward)
    policy = loss.policy.config
    assert policy.weighting == Weighting.uniform
    assert (policy.teacher_weight, policy.reward_weight) == (0.0, 0.5)
    assert (policy.clip_ratio_low, policy.clip_ratio_high) == (0.1, 0.4)
    assert policy.correction == Correction.truncate
    assert (policy.correction_cap, policy.correction_min, policy.correction_max) == (1.5, 0.25, 3.0)


def test_grpo_is_a_policy_gradient_without_a_teacher() -> None:
    config = quickstart("loss=grpo", "loss.reduction=constant", "loss.prefix_fraction=0.5")
    loss = build_loss(config.loss)
    assert isinstance(loss, PolicyGradient)
    assert (loss.config.teacher_weight, loss.config.reward_weight) == (0.0, 1.0)
    reduction = build_reduction(config)
    assert reduction.reduction == Reduction.constant
    assert reduction.prefix_fraction == 0.5
    assert reduction.max_tokens == config.rollout.max_tokens


def test_only_a_teachers_advantage_has_a_return() -> None:
    assert return_discount(PolicyGradientLossConfig(discount=0.5)) == 0.5
    assert return_discount(PolicyGradientLossConfig(discount=0.5, teacher_weight=0.0)) == 0.0
    assert return_discount(DivergenceLossConfig()) == 0.0


def test_metrics_of_a_loss_with_a_reward_are_those_of_both() -> None:
    batch, _ = case("full")
    loss = build_loss(quickstart("loss=jsd", "loss.reward_weight=0.5").loss)
    out = loss(logits().log_softmax(-1), batch)
    alone = build_loss(quickstart("loss=jsd").loss)(logits().log_softmax(-1), batch)
    assert torch.equal(out.sums["loss/jsd"], alone.sums["loss/jsd"])
    assert {
        "loss/jsd",
        "teacher/nll",
        "loss/reward_advantage",
        "loss/clip_share",
    } == out.sums.keys()


def test_the_page_of_losses_has_a_row_for_every_divergence() -> None:
    page = (Path(__file__).parent.parent.parent / "docs" / "losses.md").read_text()
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    for kind in DivergenceKind:
        assert any(f"`{kind}`" in row for row in rows), f"docs/losses.md has no formula of {kind}"
