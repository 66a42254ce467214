"""Sender and receiver, without a transport: what is acknowledged is there, bit for bit."""

import pytest
import torch

from opd.sync import replica
from opd.sync.message import read_message
from opd.sync.receiver import WeightReceiver
from opd.sync.sender import FrozenWeightsMoved, WeightSender
from opd.types import ReceiverState
from tests.unit.sync.trained import FROZEN, mask, same, state, train

Weights = dict[str, torch.Tensor]


def sender(**changed) -> WeightSender:
    return WeightSender(**{"dtype": torch.bfloat16, "snapshot_every": 1000, **changed})


def receiver() -> WeightReceiver:
    return WeightReceiver(lambda tensors, changes, version: None)


def bring(
    sends: WeightSender, takes: WeightReceiver, current: ReceiverState
) -> tuple[ReceiverState, list[str]]:
    """Until it has the version; returns its state and the kinds of message that this took."""
    kinds = []
    while (message := sends.next_for(current)) is not None:
        kinds.append(read_message(message).header.kind.value)
        current = takes.take(message)
    return current, kinds


def push(sends: WeightSender, takes: WeightReceiver, weights: Weights, version: int) -> list[str]:
    sends.prepare(weights.items(), version)
    _, kinds = bring(sends, takes, takes.state())
    sends.commit()
    return kinds


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("small_index", [2**31, 10])
def test_every_push_arrives_bit_for_bit(
    dtype: torch.dtype, masked: bool, small_index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replica, "SMALL_INDEX", small_index)
    weights = state(tied=False, dtype=dtype)
    kept = mask(weights, 0.2) if masked else None
    sends = sender(dtype=dtype, kept=kept, fingerprint="m" if masked else None, snapshot_every=7)
    takes, kinds = receiver(), []
    for version in range(20):
        if version:
            train(weights, (0.01, 0.04, 0.5, 1.0)[version % 4], version, kept)
        kinds.append(push(sends, takes, weights, version))
        assert same(dict(takes.tensors()), weights)
        assert takes.state().version == version
    assert kinds[0] == kinds[7] == kinds[14] == ["snapshot"]
    assert kinds[1] == (["mask", "patch"] if masked else ["patch"])
    assert all(kind == ["patch"] for i, kind in enumerate(kinds) if i % 7 and i > 1)


def test_nan_minus_zero_and_infinities_are_values_like_any_other() -> None:
    weights = {"w": torch.tensor([0.0, float("nan"), 1.0, -0.0, float("inf"), 2.0]).bfloat16()}
    sends, takes = sender(), receiver()
    push(sends, takes, weights, 0)
    weights["w"] = torch.tensor([-0.0, float("nan"), float("nan"), 0.0, float("-inf"), 2.0])
    assert push(sends, takes, weights, 1) == ["patch"]
    assert same(dict(takes.tensors()), {"w": weights["w"].bfloat16()})
    assert sends.changed == 4 / 6


def test_what_the_engines_format_cannot_show_does_not_travel() -> None:
    weights = {"w": torch.ones(1000)}
    sends, takes = sender(), receiver()
    push(sends, takes, weights, 0)
    weights["w"] += 1e-4
    sends.prepare(weights.items(), 1)
    message = sends.next_for(takes.state())
    assert message is not None
    assert len(message) < 250
    assert sends.changed == 0
    assert takes.take(message).version == 1
    sends.commit()


def test_a_repeated_message_changes_nothing_and_loads_nothing() -> None:
    loads = []
    takes = WeightReceiver(lambda tensors, changes, version: loads.append(version))
    sends, weights = sender(), state(tied=True)
    push(sends, takes, weights, 0)
    train(weights, 0.02, 1)
    sends.prepare(weights.items(), 1)
    message = sends.next_for(takes.state())
    assert message is not None
    assert takes.take(message) == takes.take(message)
    assert loads == [0, 1]
    assert same(dict(takes.tensors()), weights)


def test_a_skipped_and_an_old_message_are_refused_with_the_version_held() -> None:
    sends, takes, weights = sender(), receiver(), state(tied=True)
    push(sends, takes, weights, 0)
    first = sends.next_for(ReceiverState())
    train(weights, 0.02, 1)
    sends.prepare(weights.items(), 1)
    lost = sends.next_for(takes.state())
    assert lost is not None
    sends.commit()  # as if it had arrived
    train(weights, 0.02, 2)
    sends.prepare(weights.items(), 2)
    skipping = sends.next_for(ReceiverState(run=sends.run, version=1))
    assert first is not None
    assert skipping is not None
    refusal = takes.take(skipping)
    assert refusal.version == 0
    assert refusal.refused is not None
    assert "goes from version 1" in refusal.refused
    assert bring(sends, takes, refusal)[1] == ["snapshot"]
    assert same(dict(takes.tensors()), weights)
    for old in (lost, first):
        late = takes.take(old)
        assert (late.version, late.refused is not None) == (2, True)
    assert same(dict(takes.tensors()), weights)


@pytest.mark.parametrize("at", [0, 35, 41, 300, -400, -1])
def test_one_false_bit_is_refused_before_anything_is_touched(at: int) -> None:
    sends, takes, weights = sender(), receiver(), state(tied=True)
    push(sends, takes, weights, 0)
    before = {n: t.clone() for n, t in takes.tensors().items()}
    train(weights, 0.02, 1)
    sends.prepare(weights.items(), 1)
    message = bytearray(sends.next_for(takes.state()) or b"")
    message[at] ^= 4
    refusal = takes.take(bytes(message))
    assert refusal.version == 0
    assert refusal.refused is not None
    assert "checksum" in refusal.refused
    assert same(dict(takes.tensors()), before)
    assert bring(sends, takes, refusal)[1] == ["snapshot"]
    assert same(dict(takes.tensors()), weights)


@pytest.mark.parametrize("junk", [b"", b"x" * 10, b"x" * 1000])
def test_junk_is_refused(junk: bytes) -> None:
    assert receiver().take(junk).refused is not None


def test_one_receiver_of_two_that_fell_behind_gets_a_snapshot_and_the_other_a_patch() -> None:
    weights = state(tied=True)
    kept = mask(weights, 0.2)
    sends, one, two = sender(kept=kept, fingerprint="m"), receiver(), receiver()
    for version in range(4):
        if version:
            train(weights, 0.3, version, kept)
        if version == 3:
            two = receiver()  # started anew
        sends.prepare(weights.items(), version)
        kinds = [bring(sends, r, r.state())[1] for r in (one, two)]
        sends.commit()
        assert same(dict(one.tensors()), weights)
        assert same(dict(two.tensors()), weights)
    assert kinds == [["patch"], ["snapshot"]]
    train(weights, 0.3, 9, kept)
    assert push(sends, two, weights, 4) == ["mask", "patch"]


def test_a_version_that_not_everybody_took_is_not_the_base() -> None:
    sends, one, two, weights = sender(), receiver(), receiver(), state(tied=True)
    sends.prepare(weights.items(), 0)
    for r in (one, two):
        bring(sends, r, r.state())
    sends.commit()
    train(weights, 0.02, 1)
    sends.prepare(weights.items(), 1)
    bring(sends, one, one.state())  # the other one is away: no commit
    train(weights, 0.02, 2)
    sends.prepare(weights.items(), 2)
    assert bring(sends, one, one.state())[1] == ["snapshot"]
    assert bring(sends, two, two.state())[1] == ["patch"]
    sends.commit()
    assert same(dict(one.tensors()), weights)
    assert same(dict(two.tensors()), weights)


def test_an_engine_that_failed_to_load_asks_for_a_snapshot() -> None:
    fails = [False]

    def load(tensors, changes, version) -> None:
        if fails[0]:
            raise RuntimeError("out of memory")

    sends, takes, weights = sender(), WeightReceiver(load), state(tied=True)
    push(sends, takes, weights, 0)
    train(weights, 0.02, 1)
    sends.prepare(weights.items(), 1)
    message = sends.next_for(takes.state())
    assert message is not None
    fails[0] = True
    with pytest.raises(RuntimeError, match="out of memory"):
        takes.take(message)
    assert takes.state().version is None
    fails[0] = False
    assert bring(sends, takes, takes.state())[1] == ["snapshot"]
    assert same(dict(takes.tensors()), weights)


def test_a_second_sender_does_not_patch_what_the_first_one_sent() -> None:
    takes, weights = receiver(), state(tied=True)
    push(sender(), takes, weights, 0)
    other = {n: t.clone() for n, t in weights.items()}
    train(other, 0.5, 1)
    second = sender()
    assert push(second, takes, other, 0) == ["snapshot"]
    assert same(dict(takes.tensors()), other)


def test_a_mask_of_the_same_name_from_a_second_sender_is_another_mask() -> None:
    takes, weights = receiver(), state(tied=True)
    for density in (0.1, 0.3):
        kept = mask(weights, density)
        sends = sender(kept=kept, fingerprint="m")
        push(sends, takes, weights, 0)
        train(weights, 0.3, 1, kept)
        assert push(sends, takes, weights, 1) == ["mask", "patch"]
        assert same(dict(takes.tensors()), weights)


def test_a_frozen_weight_that_moves_is_found_by_the_next_snapshot() -> None:
    weights = state(tied=True)
    kept = mask(weights, 0.2)
    sends, takes = sender(kept=kept, fingerprint="m", snapshot_every=2), receiver()
    push(sends, takes, weights, 0)
    weights[FROZEN].view(-1)[5] += 1
    push(sends, takes, weights, 1)  # only kept coordinates are compared
    with pytest.raises(FrozenWeightsMoved, match=f"1 weights of {FROZEN} that the mask freezes"):
        push(sends, takes, weights, 2)


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({"nobody": torch.tensor([1])}, "nobody, which is no weight of the student"),
        ({"w": torch.tensor([1.0])}, "allowed are flat int32 or int64"),
        ({"w": torch.tensor([3, 2])}, "must rise"),
        ({"w": torch.tensor([2, 2])}, "must rise"),
        ({"w": torch.tensor([6])}, "lie within its 6 weights"),
        ({"w": torch.tensor([-1])}, "lie within its 6 weights"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(kept: Weights, message: str) -> None:
    sends = sender(kept=kept, fingerprint="m")
    sends.prepare({"w": torch.zeros(6)}.items(), 0)
    with pytest.raises(ValueError, match=message):
        sends.commit()


def large(density: float) -> tuple[Weights, Weights]:
    generator = torch.Generator().manual_seed(0)
    weights = {
        f"model.layers.{i}.weight": torch.randn(600, 700, generator=generator).bfloat16()
        for i in range(10)
    }
    kept = {
        n: (torch.rand(t.numel(), generator=generator) < density).nonzero().view(-1).int()
        for n, t in weights.items()
    }
    return weights, kept


@pytest.mark.parametrize("density", [0.02, 0.2])
@pytest.mark.parametrize("share", [0.02, 0.1, 0.4, 1.0])
def test_masked_patches_stay_within_their_bytes(density: float, share: float) -> None:
    weights, kept = large(density)
    sends, takes = sender(kept=kept, fingerprint="m"), receiver()
    push(sends, takes, weights, 0)
    train(weights, share, 1, kept)
    push(sends, takes, weights, 1)
    changed = train(weights, share, 2, kept)
    sends.prepare(weights.items(), 2)
    message = sends.next_for(takes.state())
    assert message is not None
    in_mask = sum(map(len, kept.values()))
    assert len(message) <= 1.01 * min(2.6 * changed, 2 * in_mask)


@pytest.mark.parametrize("share", [0.01, 0.02, 0.04])
def test_unmasked_patches_stay_within_their_bytes(share: float) -> None:
    weights, _ = large(1)
    sends, takes = sender(), receiver()
    push(sends, takes, weights, 0)
    changed = train(weights, share, 1)
    sends.prepare(weights.items(), 1)
    message = sends.next_for(takes.state())
    assert message is not None
    assert len(message) <= 2.6 * changed * 1.01
