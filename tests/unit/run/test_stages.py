"""A stage names itself when it starts, and its seconds when it has ended."""

import pytest

from opd.run.stages import stage


def test_a_stage_is_named_at_its_start_and_timed_at_its_end(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with stage("evaluate the teacher"):
        assert capsys.readouterr().err == "opd: evaluate the teacher ...\n"
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("opd: evaluate the teacher: ")
    assert printed.err.endswith(" s\n")


def test_a_stage_that_fails_is_not_reported_as_done(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="wrong"), stage("check the recipe"):
        raise ValueError("wrong")
    assert capsys.readouterr().err == "opd: check the recipe ...\n"
