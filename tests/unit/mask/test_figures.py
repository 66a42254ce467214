"""Figures of masks are drawn."""

from pathlib import Path

from opd.config.mask import MaskRule, RuleConfig
from opd.mask.compare import compare
from opd.mask.describe import describe
from opd.mask.figures import heat_map, overlap_bars, prune_curve
from tests.unit.mask.models import discovered, stored, weights


def test_pictures_are_drawn(tmp_path: Path) -> None:
    base = stored(tmp_path / "base", weights())
    mask = discovered(base, RuleConfig(rule=MaskRule.near_zero, density=0.2), tmp_path / "m")[0]
    heat_map(describe(mask), "a title", tmp_path / "new" / "density.png")
    overlap_bars(compare(mask, mask), ("a", "b"), tmp_path / "new" / "overlap.png")
    for picture in (tmp_path / "new").iterdir():
        assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_curve_is_drawn(tmp_path: Path) -> None:
    points = [
        {"share": s, "reverted": 10 * s, "accuracy": 0.9 - s, "low": 0.8 - s, "high": 1.0 - s}
        for s in (0.0, 0.5)
    ]
    prune_curve({"smallest": points, "largest": points}, 10, tmp_path / "prune.png")
    assert (tmp_path / "prune.png").read_bytes().startswith(b"\x89PNG")
