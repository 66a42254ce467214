"""Reverting changes: exactly as many as requested, the right ones, and honest intervals."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from opd.analysis.prune import ChangedWeights, Order, wilson_interval
from opd.checkpoint.tensors import open_checkpoint

SHAPES = {"model.a.weight": (37, 11), "model.b.weight": (64,), "model.still.weight": (5, 5)}


@pytest.fixture
def moves(tmp_path: Path) -> ChangedWeights:
    """Half of two tensors moves by sizes that all differ; a third one does not move."""
    draw = torch.Generator().manual_seed(0)
    base, trained = {}, {}
    for name, shape in SHAPES.items():
        base[name] = torch.randn(shape, generator=draw).bfloat16()
        moved = torch.rand(shape, generator=draw) < (0.0 if "still" in name else 0.5)
        size = 10 ** (-4 * torch.rand(shape, generator=draw))
        trained[name] = base[name].float() + moved * size * torch.randn(shape, generator=draw)
    for folder, tensors in (("base", base), ("trained", trained)):
        (tmp_path / folder).mkdir()
        save_file(tensors, tmp_path / folder / "model.safetensors")
        (tmp_path / folder / "config.json").write_text("{}")
    base, trained = (open_checkpoint(str(tmp_path / f)) for f in ("base", "trained"))
    return ChangedWeights(base=base, trained=trained, dtype=torch.float32)


def sizes(moves: ChangedWeights) -> torch.Tensor:
    pairs = [(moves.base[n].read().float(), moves.trained[n].read()) for n in moves.base]
    return torch.cat([(after - before).abs().flatten() for before, after in pairs])


@pytest.mark.parametrize("order", Order)
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_exactly_the_moves_asked_for_are_taken_back(
    moves: ChangedWeights, order: Order, share: float
) -> None:
    size = sizes(moves)
    assert moves.count() == int((size > 0).sum()) > 100
    count = round(share * moves.count())
    back = []
    for name, tensor in moves.revert(count, order, seed=0):
        start, end = moves.base[name].read().float(), moves.trained[name].read()
        assert ((tensor == start) | (tensor == end)).all()
        back.append(((tensor == start) & (end != start)).flatten())
    chosen = torch.cat(back)
    assert int(chosen.sum()) == count
    rest = (size > 0) & ~chosen
    if order != Order.random and 0 < share < 1:
        small, large = (chosen, rest) if order == Order.smallest else (rest, chosen)
        assert float(size[small].max()) < float(size[large].min())


def test_a_seed_draws_the_same_moves_again_and_another_draws_others(moves: ChangedWeights) -> None:
    def drawn(seed: int) -> torch.Tensor:
        return torch.cat([t.flatten() for _, t in moves.revert(60, Order.random, seed)])

    assert torch.equal(drawn(0), drawn(0))
    assert not torch.equal(drawn(0), drawn(1))


def test_moves_are_counted_in_the_format_asked_for(moves: ChangedWeights) -> None:
    seen = ChangedWeights(base=moves.base, trained=moves.trained, dtype=torch.bfloat16)
    assert 0 < seen.count() < moves.count()


def test_a_variant_is_a_folder_like_the_trained_one(moves: ChangedWeights, tmp_path: Path) -> None:
    moves.write(moves.count(), Order.smallest, 0, tmp_path / "out")
    found = open_checkpoint(str(tmp_path / "out"))
    assert (tmp_path / "out" / "config.json").is_file()
    for name in moves.base:
        assert torch.equal(found[name].read(), moves.base[name].read().float())


def test_wilson_s_interval_holds_the_share_and_its_published_values() -> None:
    # Wilson score without continuity correction: 81 of 263 (Newcombe 1998, table I)
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson_interval(20, 20)[1] == pytest.approx(1)
