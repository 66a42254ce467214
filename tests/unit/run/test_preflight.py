"""Checks before a run: settings that are used otherwise than written are reported."""

from pathlib import Path

import numpy as np
import pytest

from opd.cli.main import run
from opd.config.optim import clipped_warmup
from opd.config.schema import problems
from opd.data.prompt_sets import PromptSets
from opd.run import engine_limits, preflight
from opd.run.attempts import EveryError
from opd.run.engine_limits import require_head_sizes
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


def test_a_dry_run_names_every_error_and_a_run_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "mine.txt").touch()
    (tmp_path / "eval.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\nbroken\n')
    recipe = short_trial("loss=function", "loss.path=none.py:f", "data.eval=eval.jsonl")
    with pytest.raises(ValueError, match=r"holds files but no config\.yaml") as every:
        check(recipe, occupied, EveryError())
    for words in ("there is no file", "eval.jsonl:2: malformed JSON"):
        assert words in str(every.value)
    with pytest.raises(ValueError, match=r"holds files but no config\.yaml") as first:
        check(recipe, occupied)
    assert "\n" not in str(first.value)


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


def test_a_head_size_that_vllm_lacks_on_a_cpu_is_named_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = short_trial("teacher=local").config
    monkeypatch.setattr(engine_limits, "cpu_head_sizes", lambda: (64, 128))
    with pytest.raises(
        ValueError, match=r"heads of size 32, .* 64, 128 on a CPU: use rollout=trans"
    ):
        require_head_sizes(config, Cards(count=0))
    monkeypatch.setattr(engine_limits, "cpu_head_sizes", lambda: (32,))
    require_head_sizes(config, Cards(count=0))


def test_head_sizes_are_read_from_the_source_of_vllm() -> None:
    source = (
        "class A:\n    def get_supported_head_sizes(cls) -> list[int]:\n        return [32, 64]\n"
    )
    assert engine_limits.returned_list(source) == (32, 64)
    assert engine_limits.returned_list("x = 1") is None
