"""method=NAME is a choice of who generates, who scores and which loss, wherever it is written."""

from pathlib import Path

import pytest

from opd.config.loss import NllLossConfig, PolicyGradientLossConfig
from opd.config.schema import problems
from opd.config.teacher import SelfTeacherConfig
from opd.run.recipe import composed, find_recipe, with_method

CONTRAST = find_recipe("contrast_quickstart")


@pytest.mark.parametrize(
    ("method", "loss", "on_policy"),
    [
        ("opd", "reverse_kl", 1.0),
        ("opd_pg", "policy_gradient", 1.0),
        ("self_distill", "reverse_kl", 1.0),
        ("offline", "forward_kl", 0.0),
        ("sft", "nll", 0.0),
        ("grpo", "grpo", 1.0),
    ],
)
def test_every_method_composes_and_is_sound(method: str, loss: str, on_policy: float) -> None:
    made = composed(CONTRAST, [f"method={method}"])
    assert problems(made.config) == []
    assert made.choices["loss"] == loss
    assert made.choices["method"] == method == made.config.method.value
    assert made.config.rollout.on_policy == on_policy


def test_a_method_on_the_command_line_rules_the_recipe_and_yields_to_its_neighbours() -> None:
    quickstart = find_recipe("quickstart")  # says loss: reverse_kl itself
    assert isinstance(composed(quickstart, ["method=opd_pg"]).config.loss, PolicyGradientLossConfig)
    made = composed(quickstart, ["method=offline", "loss=jsd", "data.completion_field=c"])
    assert made.choices["loss"] == "jsd"
    assert made.config.rollout.on_policy == 0.0


def test_a_method_in_a_recipe_leaves_the_recipes_settings(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "defaults:\n  - base\n  - override method: grpo\n  - _self_\n"
        "student: {model: s}\ndata: {train: t.jsonl}\nrollout: {n: 4}\n"
    )
    config = composed(recipe, []).config
    assert isinstance(config.loss, PolicyGradientLossConfig)
    assert (config.loss.teacher_weight, config.loss.reward_weight) == (0.0, 1.0)
    assert config.rollout.n == 4
    assert config.reward.scale_rewards


def test_the_overrides_of_a_composed_recipe_compose_again() -> None:
    """Workers are started with the overrides that were typed and those that a method added."""
    first = composed(CONTRAST, ["method=sft", "optim.lr=1e-3"])
    assert composed(CONTRAST, first.overrides).plain == first.plain
    assert isinstance(first.config.loss, NllLossConfig)


def test_an_unknown_method_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match="allowed are grpo, offline, opd, opd_pg"):
        with_method(["method=dpo"])


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["teacher=none"], "teacher=none, and this loss needs one"),
        (["rollout.on_policy=0.5", "loss=policy_gradient"], "tokens that the student sampled"),
        (["rollout.on_policy=0.5", "loss.support=union"], "whose ids the engine reports"),
        (["rollout=dataset"], "no engine to evaluate"),
        (["method=grpo", "rollout.n=1"], "compares the completions of a prompt"),
        (["method=grpo", "reward=none"], "learns from rewards alone"),
        (["loss.reward_weight=0.5"], "needs a reward"),
        (
            ["teacher=self", "adapter=lora", "zero=3", "launch.engine=deepspeed"],
            "zero=3 shards them",
        ),
    ],
)
def test_what_does_not_go_together_is_one_sentence(overrides: list[str], sentence: str) -> None:
    found = problems(composed(CONTRAST, overrides).config)
    assert len(found) == 1, found
    assert sentence in found[0]


def test_self_distillation_teaches_by_the_student() -> None:
    made = composed(CONTRAST, ["method=self_distill", "teacher.weights=ema"])
    assert isinstance(made.config.teacher, SelfTeacherConfig)
