"""Checks before a run: settings that are used otherwise than written are reported."""

from pathlib import Path

import pytest

from opd.cli.main import run
from opd.config.optim import clipped_warmup
from opd.config.schema import problems
from opd.run.preflight import check
from opd.run.recipe import Recipe, composed, find_recipe
from opd.train.optimizers import LearningRate

QUICKSTART = find_recipe("quickstart")


def short_trial(*overrides: str) -> Recipe:
    settings = ["train.steps=5", "optim.warmup_steps=40", "launch.processes=2", *overrides]
    return composed(QUICKSTART, settings)


def test_a_warmup_longer_than_training_is_clipped_and_reported(tmp_path: Path) -> None:
    recipe = short_trial()
    assert problems(recipe.config) == []
    findings = check(recipe, tmp_path / "run").findings
    assert [finding for finding in findings if "warm" in finding] == [
        "optim.warmup_steps=40 is longer than train.steps=5: 5 steps of warm-up are used"
    ]
    assert "warm" not in " ".join(check(short_trial("train.steps=40"), tmp_path / "run").findings)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_learning_rate_of_a_clipped_warmup_reaches_its_peak(schedule: str) -> None:
    config = short_trial(f"optim.schedule={schedule}").config
    rate = LearningRate(config.optim, steps=config.train.steps, warmup_steps=clipped_warmup(config))
    rates = [rate(step) for step in range(config.train.steps)]
    assert rates == pytest.approx([config.optim.lr * share for share in (0.2, 0.4, 0.6, 0.8, 1.0)])


def test_the_plan_of_a_dry_run_shows_the_findings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["train.steps=5", "optim.warmup_steps=40", "dry_run=true"]
    assert run(["train", "quickstart", *arguments]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "optim.warmup_steps=40 is longer than train.steps=5" in printed
