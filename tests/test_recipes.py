"""Every bundled recipe composes, is valid, opens with its question, and dry-runs without a network."""

from pathlib import Path

import pytest

from opd.cli.main import run
from opd.config.schema import problems
from opd.run.recipe import bundled_recipes, composed

RECIPES = bundled_recipes()
NEEDS_FILES = {"smollm2_135m_heal"}


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_recipe_composes_and_is_valid(name: str) -> None:
    recipe = composed(RECIPES[name], [])
    assert problems(recipe.config) == []
    assert recipe.config.run.name == name


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_recipe_opens_with_question_hardware_and_expected_result(name: str) -> None:
    opening = RECIPES[name].read_text().split("defaults:")[0]
    for word in ("# Question:", "# Hardware:", "# Expected:"):
        assert word in opening


@pytest.mark.parametrize("name", sorted(set(RECIPES) - NEEDS_FILES))
def test_recipe_dry_runs(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["train", name, "dry_run=true"]) == 0
    assert "dry run" in capsys.readouterr().out
    left = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()]
    assert left == [Path("runs", name, "dry_run.yaml")]


@pytest.mark.parametrize(
    "overrides",
    [
        ["loss=forward_kl"],
        ["loss=jsd", "loss.beta=0.3"],
        ["loss=topk_reverse_kl", "loss.k=4"],
        ["loss=reverse_kl", "loss.support=union", "loss.k=4"],
        ["loss=policy_gradient", "loss.surrogate=plain", "loss.correction=truncate"],
        ["optim=sgd"],
        ["optim=sgd", "optim.lr=1e-2"],
        ["zero=3", "adapter=lora", "adapter.r=4"],
        ["rollout=transformers", "teacher=local", "launch.engine=torch", "launch.processes=1"],
        ["tracking=wandb", "tracking.mode=offline"],
        ["mask=file", "mask.path=m.safetensors", "mask.training=restore"],
        ["mask=discover", "mask.rule=early_delta", "mask.density=0.1", "mask.budget=global"],
        ["mask=study", "mask.rule=delta", "mask.threshold=1e-5", "mask.arms=[full,discovered]"],
        ["rollout=server", "rollout.servers=2"],
    ],
    ids=" ".join,
)
def test_the_advertised_overrides_compose(overrides: list[str]) -> None:
    recipe = composed(RECIPES["quickstart"], overrides)
    assert problems(recipe.config) == []


def test_a_learning_rate_comes_with_the_optimizer() -> None:
    adamw, sgd = (composed(RECIPES["quickstart"], [f"optim={o}"]) for o in ("adamw", "sgd"))
    assert sgd.config.optim.lr > 10 * adamw.config.optim.lr
