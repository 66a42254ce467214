"""Checks before a run: settings that are used otherwise than written are reported."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from opd.cli.main import run
from opd.config.optim import clipped_warmup
from opd.config.schema import problems
from opd.data.prompt_sets import PromptSets
from opd.run import preflight
from opd.run.engine_limits import require_engines_run
from opd.run.gradable import ungradable_answers
from opd.run.placement import Cards
from opd.run.preflight import check
from opd.run.recipe import Recipe, composed, find_recipe
from opd.train.optimizers import LearningRate
from opd.types import Prompt

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


def tiny_student(folder: Path, heads: int) -> Path:
    """The quickstart's student with another number of heads; its weights are not read."""
    shutil.copytree(find_recipe("quickstart").parent / "quickstart" / "student", folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"head_dim": 16, "num_attention_heads": heads, "num_key_value_heads": heads}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.usefixtures("_without_gpus")
def test_a_dry_run_reports_every_error_that_it_can_find(tmp_path: Path) -> None:
    student = tiny_student(tmp_path / "student", 8)
    occupied = tmp_path / "run"
    occupied.mkdir()
    (occupied / "notes.txt").write_text("mine")
    overrides = [
        f"student.model={student}",
        "reward=function",
        "reward.function=nowhere.py:f",
        "loss.reward_weight=1.0",
        "rollout.n=2",
        "eval.grader=number",
        "data.eval_answer_field=prompt",
    ]
    with pytest.raises(ValueError) as failure:
        check(short_trial(*overrides, "dry_run=true"), occupied)
    lines = str(failure.value).splitlines()
    assert len(lines) == 4
    assert "so it is not a run" in lines[0]
    assert "attention heads of 16" in lines[1]
    assert lines[1].endswith("use rollout=transformers")
    assert "nowhere.py" in lines[2]
    assert "the grader number compares" in lines[3]
    with pytest.raises(ValueError, match="so it is not a run") as first:
        check(short_trial(*overrides), occupied)
    assert len(str(first.value).splitlines()) == 1


@pytest.mark.usefixtures("_without_gpus")
def test_transformers_runs_heads_that_vllm_does_not(tmp_path: Path) -> None:
    student = tiny_student(tmp_path / "student", 8)
    config = short_trial(f"student.model={student}", "rollout=transformers").config
    require_engines_run(config)


@pytest.fixture
def _without_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opd.run.preflight.find_cards", lambda: Cards(count=0))


def test_a_path_that_looks_like_a_hub_id_is_named_at_once_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "hub_answers", lambda: False)
    with pytest.raises(ValueError, match=r"student\.model=models/absent: there is no such path"):
        check(short_trial("student.model=models/absent"), tmp_path / "run")


@pytest.mark.parametrize(
    ("answer", "kind", "found"),
    [
        ("so 1+1 is # 2", "after", "even a completion that gives the answer itself is wrong"),
        ("2", "after", None),
        ("First we add. " * 10, "exact", "must repeat the whole text"),
        ("2", "exact", None),
    ],
)
def test_answers_that_do_not_suit_the_grader_are_found(
    answer: str, kind: str, found: str | None
) -> None:
    prompt = Prompt(uid="a", token_ids=np.array([1], np.int32), answer=answer)
    sets = PromptSets(train=[], eval=[prompt], divergence=[], max_length=9, teacher_max_length=9)
    sentences = ungradable_answers(short_trial(f"eval.grader={kind}").config, sets)
    assert [found in sentence for sentence in sentences] == ([True] if found else [])
