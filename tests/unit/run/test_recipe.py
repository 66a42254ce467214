"""A job of a sweep is named by what is particular to it."""

from opd.run.recipe import job_name


def test_only_what_was_swept_is_in_the_name() -> None:
    given = ["optim=adamw,sgd", "optim.lr=1e-3,1e-2", "eval.teacher_accuracy=false", "zero=2"]
    own = ["optim=sgd", "optim.lr=0.01", "eval.teacher_accuracy=False", "zero=2"]
    assert job_name(own, given, 3) == "optim=sgd,optim.lr=0.01"


def test_a_swept_path_makes_one_folder() -> None:
    assert job_name(["teacher.model=a/b"], ["teacher.model=a/b,c/d"], 0) == "teacher.model=a_b"


def test_a_sweep_over_nothing_still_has_a_name() -> None:
    assert job_name(["zero=1"], ["zero=1"], 0) == "job_0"
