"""The runs of the two-stage experiment: what each trains, and what it needs of the others."""

from pathlib import Path

import pytest

from opd.config.mask import (
    DiscoverMaskConfig,
    MaskRule,
    RuleConfig,
    StudyArm,
    StudyMaskConfig,
    active_mask,
    require_valid_rule,
)
from opd.config.schema import problems
from opd.run.recipe import composed, find_recipe
from opd.run.study import study_jobs

RECIPE = find_recipe("quickstart_subnetwork")


def test_every_job_is_a_valid_run_of_the_same_recipe() -> None:
    study = composed(RECIPE, ["mask.seeds=[3,4]", "mask.lr_scale=2"])
    jobs = study_jobs(study, Path("out"))
    assert [(job.seed, job.arm) for job in jobs] == [(s, a) for s in (3, 4) for a in StudyArm]
    for job in jobs:
        one = composed(RECIPE, job.overrides).config
        assert problems(one) == []
        assert isinstance(one.mask, StudyMaskConfig)
        assert one.mask.arms == []
        assert one.seed == job.seed
        masked = active_mask(one)
        scale = 1 if job.arm == StudyArm.full else 2
        assert one.optim.lr == pytest.approx(scale * study.config.optim.lr)
        if job.arm == StudyArm.full:
            assert masked is None
            continue
        assert isinstance(masked, DiscoverMaskConfig)
        names = RuleConfig.__dataclass_fields__
        require_valid_rule(RuleConfig(**{name: getattr(masked, name) for name in names}))


def test_the_mask_comes_from_the_same_seed_s_full_run_and_controls_copy_its_counts() -> None:
    jobs = study_jobs(composed(RECIPE, ["mask.seeds=[3]"]), Path("out"))
    masks = {job.arm: composed(RECIPE, job.overrides).config.mask for job in jobs}
    discovered, chance = masks[StudyArm.discovered], masks[StudyArm.random]
    assert isinstance(discovered, StudyMaskConfig)
    assert isinstance(chance, StudyMaskConfig)
    assert discovered.trained == "out/seed_3/full"
    assert discovered.density == 0.175
    assert (chance.rule, chance.seed) == (MaskRule.random, 3)
    assert chance.like == "out/seed_3/discovered/mask.safetensors"


def test_only_the_first_run_evaluates_the_teacher() -> None:
    jobs = study_jobs(composed(RECIPE, []), Path("out"))
    evaluated = [composed(RECIPE, job.overrides).config.eval.teacher_accuracy for job in jobs]
    assert evaluated == [True] + [False] * 11


@pytest.mark.parametrize(
    ("override", "words"),
    [("[discovered]", "without full"), ("[full,random]", "without discovered")],
)
def test_an_arm_without_what_it_needs_is_refused(override: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        study_jobs(composed(RECIPE, [f"mask.arms={override}"]), Path("out"))
