"""The shares of a mask add up."""

from pathlib import Path

from opd.config.mask import MaskRule, RuleConfig
from opd.mask.describe import describe
from tests.unit.mask.models import NUMEL, discovered, stored, weights


def test_a_description_adds_up(tmp_path: Path) -> None:
    base = stored(tmp_path / "base", weights())
    mask = discovered(base, RuleConfig(rule=MaskRule.near_zero, density=0.2), tmp_path / "m")[0]
    described = describe(mask)
    for shares in (described.blocks, described.modules, described.layers, described.tensors):
        assert sum(share.kept for share in shares) == described.whole.kept == round(0.2 * NUMEL)
        assert sum(share.numel for share in shares) == NUMEL
    assert [s.name for s in described.layers] == ["outside layers", "0", "1"]
    assert [s.name for s in described.blocks] == ["attention", "ffn", "embedding", "norm"]
