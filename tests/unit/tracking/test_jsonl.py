"""The run's own record survives crashes and resumes."""

import json

import pytest

from opd.tracking.fanout import Trackers
from opd.tracking.jsonl import METRICS, JsonlTracker, read_lines


def steps(folder, name="metrics.jsonl"):
    return [row["step"] for row in read_lines(folder / name)]


def record(folder, first, last, resume_step=None):
    tracker = JsonlTracker(folder, resume_step)
    for step in range(first, last + 1):
        tracker.log(step, {"loss/total": 1 / (step + 1)})
        tracker.log_samples(step, [{"uid": "a"}, {"uid": "b"}])
    return tracker


def test_each_step_is_one_line_with_the_step_first_and_flushed(tmp_path):
    record(tmp_path, 0, 2)  # never closed, as after a kill
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert lines[1] == '{"step": 1, "loss/total": 0.5}'
    assert len(lines) == 3
    assert steps(tmp_path, "samples.jsonl") == [0, 0, 1, 1, 2, 2]


def test_a_resumed_run_drops_later_lines_and_goes_on(tmp_path):
    record(tmp_path, 0, 5).close()
    record(tmp_path, 4, 6, resume_step=3).close()
    assert steps(tmp_path) == [0, 1, 2, 3, 4, 5, 6]
    assert steps(tmp_path, "samples.jsonl") == [s for s in range(7) for _ in range(2)]
    assert not list(tmp_path.glob("*.part"))


def test_a_half_written_last_line_is_forgotten(tmp_path):
    record(tmp_path, 0, 2).close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss/to')
    assert steps(tmp_path) == [0, 1, 2]
    record(tmp_path, 3, 3, resume_step=2).close()
    assert steps(tmp_path) == [0, 1, 2, 3]


def test_a_new_run_starts_with_empty_files(tmp_path):
    record(tmp_path, 0, 2).close()
    record(tmp_path, 0, 0).close()
    assert steps(tmp_path) == [0]


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"st\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: the content is not JSON"):
        read_lines(path)
    path.write_text('{"step": 0}\n[3]\n')
    with pytest.raises(
        ValueError, match=r"metrics\.jsonl:2: the content should be an object, found \[3\]"
    ):
        read_lines(path)


def test_a_number_that_is_not_finite_stays_strict_json(tmp_path):
    JsonlTracker(tmp_path).log(0, {"loss/total": float("nan"), "optim/lr": float("inf")})
    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert row == {"step": 0, "loss/total": None, "optim/lr": None}


def test_a_step_is_logged_once_and_in_order(tmp_path):
    tracker = record(tmp_path, 0, 1)
    with pytest.raises(AssertionError, match="one line a step"):
        tracker.log(1, {})


def test_several_trackers_all_hear_everything(tmp_path):
    trackers = Trackers([JsonlTracker(tmp_path / name) for name in "ab"])
    trackers.log(0, {"x": 1.0})
    trackers.log_samples(0, [{"uid": "1"}])
    trackers.close()
    for name in "ab":
        assert steps(tmp_path / name) == steps(tmp_path / name, "samples.jsonl") == [0]


def test_a_resume_leaves_one_row_a_step_in_order(tmp_path):
    rows = [(0, 1), (2, 1), (1, 1), (2, 2), (3, 1)]
    lines = [json.dumps({"step": step, "loss/total": value}) for step, value in rows]
    (tmp_path / METRICS).write_text("\n".join(lines) + '\n{"step": 4, "lo')
    JsonlTracker(tmp_path, 2)
    found = [(row["step"], row["loss/total"]) for row in read_lines(tmp_path / METRICS)]
    assert found == [(0, 1), (1, 1), (2, 2)]
