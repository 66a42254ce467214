"""The terminal's lines: aligned, never wider than 80 columns, plain where there is no terminal."""

import io

import pytest
from rich.console import Console

from opd.tracking.console import ConsoleProgress, ConsoleTracker, SilentProgress
from opd.tracking.formatting import duration, evaluation_tasks, number

ROW = {
    "loss/total": 0.123456,
    "teacher/nll": 1.5,
    "rollout/length": 20.25,
    "optim/grad_norm": 12345.6,
    "optim/lr": 3e-4,
    "time/rollout": 1.2,
    "time/teacher": 0.01,
    "time/learn": 100.4,
}
EVAL = {
    "eval/addition/accuracy": 0.25,
    "eval/addition/teacher_accuracy": 1.0,
    "eval/addition/mean_at_k": 0.3,
    "eval/addition/reverse_kl": 0.84,
    "eval/addition/length": 20.0,
    "eval/addition/truncated": 0.01,
}


def printed(log, terminal=False):
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=80)
    log(ConsoleTracker(console, steps=9999), console)
    return file.getvalue()


def test_columns_are_aligned_and_fit_80_columns():
    def log(tracker, _):
        tracker.log(0, EVAL)
        tracker.log(9998, ROW | EVAL)
        tracker.log(9999, {"loss/total": -1.5e-7})

    text = printed(log)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert "\x1b" not in text
    heading = next(line for line in lines if "loss" in line)
    row = next(line for line in lines if "0.1235" in line)
    assert heading.index("loss") + 4 == row.index("0.1235") + 6
    assert len(heading) == len(row) == len(lines[-1])


def test_an_evaluation_says_what_changed_and_what_the_teacher_reaches():
    def log(tracker, _):
        tracker.log(0, EVAL)
        tracker.log(50, {"eval/addition/accuracy": 0.75})

    lines = printed(log).splitlines()
    assert "addition:  accuracy 0.250  teacher 1.000" in lines[0]
    assert lines[-1].split() == [
        *("50/9999", "addition:", "accuracy", "0.750", "(+0.500)", "teacher", "1.000")
    ]


def test_the_heading_comes_again_after_twenty_lines():
    text = printed(lambda tracker, _: [tracker.log(step, ROW) for step in range(1, 42)])
    assert text.count("loss") == 3


def test_bars_show_on_a_terminal_and_leave_no_trace_elsewhere():
    def log(tracker, console):
        progress = ConsoleProgress(console)
        with progress.track("steps", 2) as step, progress.track("rollout", 4) as advance:
            advance(4)
            step(1)

    assert printed(log) == ""
    live = printed(log, terminal=True)
    assert "rollout" in live
    assert "0/4" in live


def test_a_failing_phase_takes_its_bars_away():
    console = Console(file=io.StringIO(), force_terminal=True)
    progress = ConsoleProgress(console)
    with pytest.raises(RuntimeError), progress.track("learn", 3):
        raise RuntimeError
    with progress.track("learn", 1) as advance:
        advance(1)
    assert not console._live_stack


def test_silence_accepts_every_phase(capsys):
    with SilentProgress().track("learn", 3) as advance:
        advance(3)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (0.0, "0"),
        (float("nan"), "nan"),
        (3e-4, "3.0e-04"),
        (0.04206, "0.0421"),
        (1.0, "1.000"),
        (20.25, "20.25"),
        (99999.0, "99999"),
        (1e6, "1.0e+06"),
    ],
)
def test_a_number_takes_seven_characters_at_most(value, text):
    assert number(value) == text
    assert len(text) <= 7


def test_durations_and_tasks_are_read_from_plain_values():
    assert [duration(s) for s in (41, 125, 12000)] == ["41 s", "2 min 5 s", "3 h 20 min"]
    assert evaluation_tasks(["eval/b/accuracy", "loss/total", "eval/a/x", "eval/b/x"]) == ["b", "a"]


def test_a_resumed_run_compares_with_the_evaluation_before_training():
    earlier = [{"step": 0} | EVAL, {"step": 1, "eval/addition/accuracy": 0.5}]
    file = io.StringIO()
    tracker = ConsoleTracker(Console(file=file, width=80), steps=9, earlier=earlier)
    tracker.log(2, {"eval/addition/accuracy": 0.75})
    assert "accuracy 0.750 (+0.500)  teacher 1.000" in file.getvalue()


def test_without_a_teacher_the_lines_show_the_reward():
    row = {key: value for key, value in ROW.items() if key != "teacher/nll"} | {"reward/mean": 0.25}
    lines = printed(lambda tracker, _: tracker.log(1, row)).splitlines()
    assert lines[0].split()[:3] == ["step", "loss", "reward"]
    assert lines[-1].split()[2] == "0.2500"
    both = printed(lambda tracker, _: tracker.log(1, ROW | {"reward/mean": 0.25}))
    assert "teacher" in both.splitlines()[0]


def test_lines_have_no_blanks_at_their_end_and_no_color_means_no_escapes(monkeypatch):
    def log(tracker, _):
        tracker.log(1, ROW | EVAL)

    assert all(line == line.rstrip() for line in printed(log).splitlines())
    assert "\x1b" in printed(log, terminal=True)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in printed(log, terminal=True)


def test_a_skipped_step_is_marked_and_the_steps_after_it_are_not():
    def log(tracker, _):
        tracker.log(1, {"optim/lr": 0.1, "optim/skipped_steps": 1.0})
        tracker.log(2, ROW | {"optim/skipped_steps": 1.0})

    assert printed(log).count("skipped: its loss or gradient norm is not finite") == 1
