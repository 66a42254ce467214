"""Reports: what a page says, that it stands alone, and which folders are refused."""

import csv
import io
import re
import shutil
from dataclasses import fields

import pytest
import yaml
from rich.console import Console

from opd.config.schema import GROUPS, Config
from opd.tracking.compare import compare, conclusions, table
from opd.tracking.jsonl import JsonlTracker
from opd.tracking.panels import other_panels, run_panels
from opd.tracking.plots import smooth
from opd.tracking.report import compare_runs, write_report
from opd.tracking.runs import read_run
from opd.tracking.terminal import comparison_table, summary_table
from tests.unit.tracking.made_runs import make_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return {
        "adamw": make_run(root / "adamw", lr=1e-3, top=0.9),
        "slow": make_run(root / "slow", lr=1e-5, top=0.5),
        "crashed": make_run(root / "crashed", optim="sgd", lr=0.1, top=0.7, stop=50),
    }


def shown(table):
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(table)
    return console.export_text()


def assert_stands_alone(page):
    without_names = re.sub(r'xmlns(:xlink)?="[^"]*"', "", page)
    assert not re.search(r"https?://|<script|<link|<img|@import", without_names)
    assert not re.search(r"#fe0[01]", page), "every colour is the page's own"
    assert page.count("<svg") == page.count("</svg>") > 3


def test_a_report_says_before_after_and_teacher(runs):
    path = write_report(runs["adamw"])
    page = path.read_text()
    assert path == runs["adamw"] / "report.html"
    assert_stands_alone(page)
    for text in (
        "0.250 →",
        "0.868",
        "teacher 0.980",
        "85 % of the gap",
        "reverse KL 0.8500 → 0.1658",
    ):
        assert text in page
    assert "finished" in page
    assert "opd train quickstart optim=adamw" in page
    assert "student-small" in page


def test_a_transcript_shows_first_and_last_and_colours_the_gap(runs):
    page = write_report(runs["adamw"]).read_text()
    assert "step 0 · " in page
    assert "step 120 · " in page
    assert '<span class="worse" style="--a:0.83" title="teacher - student: -2.50 nats">' in page
    assert "&lt;b&gt;12+30=&lt;/b&gt;" in page, "prompts are text, never markup"


def test_every_metric_of_a_run_is_in_some_picture(runs):
    run = read_run(runs["adamw"])
    assert {panel.title for panel in run_panels(run)} >= {"Loss", "Gradient norm", "Throughput"}
    assert [panel.title for panel in other_panels(run)] == ["ratio/clipped", "tokens/trained"]


def test_the_teachers_of_a_pool_share_a_picture_of_each_thing_measured(tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"config": {"seed": 0}}))
    tracker = JsonlTracker(tmp_path)
    for step in (1, 2, 3):
        theirs = {"teacher/spelling/reverse_kl": 0.2, "teacher/maths/reverse_kl": 1 / step}
        if step > 1:  # nobody named maths in the first step
            theirs["teacher/maths/nll"] = 0.5
        tracker.log(step, {"teacher/nll": 0.4, "teacher/outside_mass": 0.0, **theirs})
    tracker.close()
    run = read_run(tmp_path)
    drawn = {panel.title: panel.lines for panel in run_panels(run)}
    assert [line.label for line in drawn["reverse_kl of each teacher"]] == ["maths", "spelling"]
    assert list(drawn["reverse_kl of each teacher"][0].ys) == [1, 1 / 2, pytest.approx(1 / 3)]
    assert [list(line.xs) for line in drawn["nll of each teacher"]] == [[2, 3]]
    assert len({line.colour for line in drawn["reverse_kl of each teacher"]}) == 2
    assert [panel.title for panel in other_panels(run)] == ["teacher/outside_mass"]
    assert "reverse_kl of each teacher" in write_report(tmp_path).read_text()


def test_a_comparison_ranks_runs_and_names_what_differs(runs, tmp_path):
    page_path, csv_path = compare_runs(list(runs.values()), tmp_path / "out")
    page = page_path.read_text()
    assert_stands_alone(page)
    assert "Held-out reverse KL on sums, nats per token" in page
    rows = list(csv.DictReader(csv_path.read_text().splitlines()))
    assert [row["run"] for row in rows] == ["adamw", "crashed", "slow"]
    assert rows[1]["status"] == "unfinished: step 50 of 120"
    assert rows[0]["optim.lr"] == "0.001"
    assert float(rows[0]["sums gap closed"]) == pytest.approx(0.846, abs=1e-3)
    assert "student.model" not in rows[0]
    assert "optim.betas" not in rows[0], "explained by the choice of optim"


def test_a_comparison_of_losses_keeps_their_names_beside_their_values(runs, tmp_path):
    for kind in ("jsd", "reverse_kl"):
        shutil.copytree(runs["adamw"], tmp_path / kind)
        about = yaml.safe_load((tmp_path / kind / "config.yaml").read_text())
        about["choices"]["loss"] = kind
        about["config"]["loss"] = {"kind": kind, "beta": 0.5 if kind == "jsd" else 0.1}
        (tmp_path / kind / "config.yaml").write_text(yaml.safe_dump(about))
    folders = [tmp_path / "jsd", tmp_path / "reverse_kl"]
    page, csv_path = compare_runs(folders, tmp_path)
    rows = {row["run"]: row for row in csv.DictReader(csv_path.read_text().splitlines())}
    assert [rows[kind]["loss"] for kind in ("jsd", "reverse_kl")] == ["jsd", "reverse_kl"]
    last = read_run(folders[0]).series("loss/total").last
    assert float(rows["jsd"]["training loss"]) == pytest.approx(last)
    assert (rows["jsd"]["loss.beta"], "loss.kind" in rows["jsd"]) == ("0.5", False)
    assert '<td class="word">jsd</td>' in page.read_text()


def test_no_metric_of_a_comparison_has_the_name_of_a_setting(runs):
    comparison = compare([runs["adamw"]])
    settings = {*GROUPS, *(field.name for field in fields(Config) if field.name != "run")}
    assert not settings & set(table(comparison)[0])


def test_conclusions_name_the_winner_its_settings_and_what_to_beware_of(runs):
    lines = conclusions(compare(list(runs.values())))
    assert lines[0] == (
        "Best sums accuracy: optim=adamw optim.lr=0.001: 0.8676 at step 120; "
        "next optim=sgd optim.lr=0.1: 0.5345."
    )
    assert lines[2].startswith("Lowest held-out reverse KL on sums: optim=adamw optim.lr=0.001")
    assert lines[-2] == (
        "Not finished, so not comparable at the end: "
        "optim=sgd optim.lr=0.1 (unfinished: step 50 of 120)."
    )
    assert lines[-1].startswith("One seed for every setting")


def test_equal_runs_share_the_first_place(runs, tmp_path):
    twin = make_run(tmp_path / "twin", lr=1e-3, top=0.9, seed=1)
    lines = conclusions(compare([runs["adamw"], twin]))
    assert lines[0] == "Best sums accuracy: 2 runs alike at 0.8676 (seed=1; seed=0)."
    assert not any("One seed" in sentence for sentence in lines)


def test_a_peak_that_was_lost_again_is_reported(tmp_path, runs):
    fallen = make_run(tmp_path / "fallen", lr=0.01, top=1.0, steps=120)
    tracker = JsonlTracker(fallen, resume_step=120)
    tracker.log(121, {"eval/sums/accuracy": 0.1})
    lines = conclusions(compare([fallen, runs["adamw"]]))
    assert lines[1] == (
        "Highest sums accuracy on the way, not kept to the end: optim.lr=0.01: 0.963 at step 120."
    )


def test_a_run_that_crashed_at_once_is_kept_in_a_comparison(runs, tmp_path):
    (tmp_path / "dead").mkdir()
    shutil.copy(runs["slow"] / "config.yaml", tmp_path / "dead")
    (tmp_path / "dead" / "metrics.jsonl").touch()
    folders = [tmp_path / "dead", runs["adamw"]]
    page, csv_path = compare_runs(folders, tmp_path)
    assert "crashed before its first step" in page.read_text()
    assert [row["run"] for row in csv.DictReader(csv_path.read_text().splitlines())] == [
        "adamw",
        "dead",
    ]
    with pytest.raises(ValueError, match="found no steps in any of 1 runs"):
        compare_runs([tmp_path / "dead"], tmp_path)
    with pytest.raises(ValueError, match="found no steps; a report needs at least one"):
        write_report(tmp_path / "dead")


def test_a_run_with_one_step_or_a_loss_that_is_not_finite_has_a_report(tmp_path):
    for name, metrics in (
        ("young", {"eval/sums/accuracy": 0.0}),
        ("lost", {"loss/total": float("nan"), "time/step": 1.0, "time/learn": 1.0}),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(yaml.safe_dump({"config": {"seed": 0}}))
        JsonlTracker(tmp_path / name).log(0, metrics)
        assert "<svg" in write_report(tmp_path / name).read_text()
    assert read_run(tmp_path / "lost").status == "diverged at step 0"
    assert compare_runs([tmp_path / "young", tmp_path / "lost"], tmp_path)[0].exists()


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"found no config\.yaml; a run folder holds"):
        write_report(tmp_path)
    (tmp_path / "config.yaml").write_text("seed: [")
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')
    with pytest.raises(ValueError, match="not readable as YAML"):
        write_report(tmp_path)
    (tmp_path / "config.yaml").write_text("seed: 0")
    with pytest.raises(ValueError, match="found no `config` section"):
        write_report(tmp_path)


def test_the_terminal_tables_say_the_same(runs):
    summary = shown(summary_table(runs["adamw"]))
    for text in ("adamw: finished", "sums", "0.250", "0.868", "0.980", "85 %"):
        assert text in summary
    compared = shown(comparison_table(list(runs.values())))
    assert compared.index("adamw") < compared.index("crashed") < compared.index("slow")
    assert "0.250 → 0.868" in compared
    assert "optim.lr=0.001" in compared


def test_smoothing_keeps_a_line_and_skips_what_is_missing():
    line = [float(x) for x in range(100)]
    assert smooth(line)[10:90] == pytest.approx(line[10:90])
    assert smooth([1.0, float("nan"), 1.0])[0::2] == [1.0, 1.0]
