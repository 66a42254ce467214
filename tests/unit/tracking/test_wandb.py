"""A real wandb run without network."""

from opd.config.tracking import WandbConfig, WandbMode
from opd.tracking.wandb import RUN_ID, WandbTracker


def test_an_offline_run_is_written_and_resumed_under_one_id(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    for step in (0, 1):
        tracker = WandbTracker(
            WandbConfig(mode=WandbMode.offline),
            name="test",
            folder=tmp_path,
            resolved={"seed": 1},
        )
        tracker.log(step, {"loss/total": 0.5, "eval/sums/accuracy": 0.25})
        tracker.log_samples(step, [{"uid": "a", "completion": "x", "correct": True}])
        tracker.close()
    run_id = (tmp_path / RUN_ID).read_text().strip()
    written = list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert {path.stem for path in written} == {f"run-{run_id}"}
    assert any(b"eval/sums/accuracy" in path.read_bytes() for path in written)
