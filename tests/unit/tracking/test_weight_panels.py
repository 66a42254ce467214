"""The pictures of recorded weights: there when something was recorded, and only then."""

import torch

from opd.checkpoint.names import place
from opd.tracking.jsonl import WEIGHTS, WeightRecord, read_lines
from opd.tracking.report import write_report
from opd.tracking.weight_panels import weight_panels
from opd.train.record_row import build_row, changes, columns
from tests.unit.tracking.made_runs import make_run

NAMES = ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight")


def made_row(step):
    """Two weights of which an eighth moves by one step of size ``step`` / 1000."""
    torch.manual_seed(0)
    measured = []
    for _ in NAMES:
        start = torch.randn(64).bfloat16().float()
        now = start.clone()
        now[:8] += step / 1000
        found, changed = changes(start, now)
        measured.append(dict.fromkeys(columns([]), 0.0) | found | {"ever": float(changed.sum())})
    return build_row([place(name) for name in NAMES], measured, None, [])


def test_a_report_shows_recorded_weights_and_is_silent_without(tmp_path):
    run = make_run(tmp_path / "run", steps=40)
    assert "<h2>Weights</h2>" not in write_report(run).read_text()
    record = WeightRecord(run)
    for step in (0, 20, 40):
        record.append(step, made_row(step))
    page = write_report(run).read_text()
    assert "<h2>Weights</h2>" in page
    titles = [panel.title for panel in weight_panels(read_lines(run / WEIGHTS))]
    assert titles == [
        "Weights that look unchanged",
        "Never, cancelled, final",
        "Size of the changes",
        "Distance from the start",
    ]
    for title in titles:
        assert title in page


def test_a_record_that_goes_on_drops_what_came_after_its_checkpoint(tmp_path):
    record = WeightRecord(tmp_path)
    for step in (0, 10, 20, 30):
        record.append(step, made_row(step))
    again = WeightRecord(tmp_path, 20)
    assert [row["step"] for row in read_lines(tmp_path / WEIGHTS)] == [0, 10, 20]
    again.append(30, made_row(30))
    assert [row["step"] for row in read_lines(tmp_path / WEIGHTS)] == [0, 10, 20, 30]
