"""The shift by one, padding, and what belongs to which token."""

from dataclasses import fields

import numpy as np
import pytest
import torch

from opd.batch import Batch, LossReduction, collate
from opd.packing import Packing, arrange, micro_batches, padding
from opd.types import FinishReason, Prompt, Reduction, Rollout, ScoredRollout, SupportLogps


def scored(
    prompt: list[int],
    completion: list[int],
    logps: list[float] | None = None,
    engine: list[float] | None = None,
    teacher: str | None = None,
    **scores: object,
) -> ScoredRollout:
    rollout = Rollout(
        prompt=Prompt(uid="p", token_ids=np.array(prompt, np.int32), teacher=teacher),
        token_ids=np.array(completion, np.int32),
        logps=np.array(engine or [-1.0] * len(completion), np.float32),
        finish_reason=FinishReason.stop,
        version=0,
    )
    return ScoredRollout(
        rollout=rollout, logps=None if logps is None else np.array(logps, np.float32), **scores
    )


def test_each_target_is_predicted_by_the_hidden_state_one_place_before_it() -> None:
    batch = collate([scored([11, 12, 13], [21, 22]), scored([14], [23, 24, 25])], pad_id=0)
    assert batch.input_ids_BT.tolist() == [[11, 12, 13, 21, 22], [14, 23, 24, 25, 0]]
    assert batch.attention_mask_BT.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    assert batch.target_N.tolist() == [21, 22, 23, 24, 25]
    # 13 predicts 21 and 21 predicts 22; 14 predicts 23, 23 predicts 24, 24 predicts 25
    assert batch.positions_N.tolist() == [2, 3, 5, 6, 7]
    seen = batch.input_ids_BT.flatten()[batch.positions_N]
    assert seen.tolist() == [13, 21, 14, 23, 24]
    assert torch.equal(batch.input_ids_BT.flatten()[batch.positions_N + 1], batch.target_N)
    assert batch.tokens == 5


def test_row_n_of_every_field_is_about_the_same_token() -> None:
    def scored_by_token(token: int, completion: list[int]) -> ScoredRollout:
        rows = np.array(completion, np.float32)[:, None]
        return scored(
            [token],
            completion,
            logps=[-c / 10 for c in completion],
            engine=[-c / 100 for c in completion],
            support=SupportLogps(
                ids=np.array([[c, -1] for c in completion], np.int32),
                logps=np.array([[-c / 10, -np.inf] for c in completion], np.float32),
                tail_logp=-rows[:, 0],
            ),
            full_logps=np.repeat(-rows, 40, axis=1),
            hidden=np.repeat(rows, 3, axis=1),
        )

    batch = collate([scored_by_token(1, [21, 22]), scored_by_token(2, [23])], pad_id=0)
    assert batch.target_N.tolist() == [21, 22, 23]
    t = batch.target_N.float()
    torch.testing.assert_close(batch.engine_logp_N, -t / 100)
    torch.testing.assert_close(batch.teacher_logp_N, -t / 10)
    assert batch.support_ids_NK is not None
    assert batch.support_ids_NK.tolist() == [[21, -1], [22, -1], [23, -1]]
    assert batch.support_logp_NK is not None
    assert batch.support_logp_NK[:, 1].isneginf().all()
    torch.testing.assert_close(batch.support_tail_N, -t)
    torch.testing.assert_close(batch.teacher_logp_NV, -t[:, None].expand(3, 40))
    torch.testing.assert_close(batch.teacher_hidden_ND, t[:, None].expand(3, 3))
    part = batch.rows(1, 3)
    for f in fields(Batch):
        whole, cut = getattr(batch, f.name), getattr(part, f.name)
        if whole is not None:
            assert torch.equal(cut, whole if f.name.endswith("_BT") else whole[1:3]), f.name
    assert torch.equal(part.target_N, torch.tensor([22, 23]))


def test_absent_teacher_fields_stay_absent() -> None:
    batch = collate([scored([1], [2, 3])], pad_id=0)
    absent = {f.name for f in fields(Batch) if getattr(batch, f.name) is None}
    assert absent == {
        "teacher",
        "position_ids_BT",
        "advantage_N",
        "engine_ids_NK",
        "sequence_gap_N",
        "sequence_mean_gap_N",
        "teacher_logp_N",
        "support_ids_NK",
        "support_logp_NK",
        "support_tail_N",
        "teacher_logp_NV",
        "teacher_hidden_ND",
        "teacher_outside_N",
        "span_N",
        "span_target_N",
        "span_logp_N",
        "span_single_N",
        "future_N",
    }
    moved = batch.to(torch.device("meta"))
    assert moved.target_N.is_meta
    assert moved.teacher_logp_N is None


def test_sequences_scored_in_two_ways_do_not_share_a_batch() -> None:
    with pytest.raises(AssertionError, match="scored one way"):
        collate([scored([1], [2], logps=[-1.0]), scored([1], [3])], pad_id=0)


def test_future_is_the_discounted_gain_of_the_tokens_after_within_its_own_sequence() -> None:
    batch = collate(
        [
            scored([1], [2, 3, 4], logps=[-1.0, -2.0, -4.0], engine=[-1.5, -1.0, -1.0]),
            scored([1], [5], logps=[-9.0]),
        ],
        pad_id=0,
        discount=0.5,
    )
    gains = [0.5, -1.0, -3.0]
    assert batch.future_N is not None
    assert batch.future_N.tolist() == [0.5 * gains[1] + 0.25 * gains[2], 0.5 * gains[2], 0.0, 0.0]


def test_micro_batches_hold_everything_once_and_no_more_tokens_than_allowed() -> None:
    lengths = [3, 9, 4, 12, 2, 7, 7, 30]
    items = [scored([1] * (n - 1), [2]) for n in lengths]
    groups = micro_batches(items, tokens=20)
    assert sorted(id(x) for g in groups for x in g) == sorted(id(x) for x in items)
    for group in groups:
        padded = len(group) * max(len(s.rollout.sequence) for s in group)
        assert padded <= 20 or len(group) == 1
    assert [len(s.rollout.sequence) for g in groups for s in g] == sorted(lengths, reverse=True)
    assert any(len(g) > 1 for g in groups)
    assert micro_batches([], tokens=20) == []


def test_a_batch_keeps_the_first_share_of_each_completion() -> None:
    half = LossReduction(prefix_fraction=0.5)
    batch = collate([scored([1, 2], [11, 12, 13]), scored([3], [14])], pad_id=0, reduction=half)
    assert batch.target_N.tolist() == [11, 12, 14]
    assert batch.positions_N.tolist() == [1, 2, 5]
    assert batch.sequence_N is not None
    assert batch.sequence_N.tolist() == [0, 0, 1]
    assert half.denominator([scored([1, 2], [11, 12, 13]), scored([3], [14])]) == 3.0


@pytest.mark.parametrize(
    ("reduction", "weights", "denominator"),
    [
        (Reduction.token, [1.0, 1.0, 1.0, 1.0], 4.0),
        (Reduction.sequence, [1 / 3, 1 / 3, 1 / 3, 1.0], 2.0),
        (Reduction.constant, [1.0, 1.0, 1.0, 1.0], 20.0),
    ],
)
def test_reductions_weigh_tokens_and_divide_once(
    reduction: Reduction, weights: list[float], denominator: float
) -> None:
    loss_reduction = LossReduction(reduction=reduction, max_tokens=10)
    items = [scored([1, 2], [11, 12, 13]), scored([3], [14])]
    batch = collate(items, pad_id=0, reduction=loss_reduction)
    assert batch.weight_N is not None
    torch.testing.assert_close(batch.weight_N, torch.tensor(weights))
    assert loss_reduction.denominator(items) == denominator


def test_groups_have_one_teacher_and_fit() -> None:
    items = [scored([1] * n, [2], teacher=t) for n, t in [(3, "a"), (5, "b"), (2, "a"), (5, "a")]]
    groups = micro_batches(items, tokens=9)
    tags = [[s.rollout.prompt.teacher for s in g] for g in groups]
    assert sorted(tags) == [["a"], ["a", "a"], ["b"]]
    for group in groups:
        assert len(group) * max(len(s.rollout.sequence) for s in group) <= 9


def test_packed_sequences_lie_in_the_first_row_with_room_and_count_their_own_positions() -> None:
    items = [scored([1, 2, 3], [4, 5]), scored([11], [12, 13]), scored([21], [22])]
    batch = collate(items, pad_id=0, packing=Packing.rows)
    assert batch.input_ids_BT.tolist() == [[1, 2, 3, 4, 5], [11, 12, 13, 21, 22]]
    assert batch.position_ids_BT is not None
    assert batch.position_ids_BT.tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 0, 1]]
    assert batch.attention_mask_BT.all()
    assert batch.target_N.tolist() == [4, 5, 12, 13, 22]
    assert batch.input_ids_BT.flatten()[batch.positions_N + 1].tolist() == batch.target_N.tolist()
    one = collate(items, pad_id=0, packing=Packing.one_row)
    assert one.input_ids_BT.shape == (1, 10)
    assert one.input_ids_BT.flatten()[one.positions_N + 1].tolist() == batch.target_N.tolist()


@pytest.mark.parametrize("packing", Packing)
def test_micro_batches_stay_within_their_tokens_however_they_are_packed(packing: Packing) -> None:
    lengths = [9, 8, 7, 5, 4, 4, 3, 2, 2, 2]
    items = [scored([1], list(range(length - 1))) for length in lengths]
    groups = micro_batches(items, tokens=20, packing=packing)
    layouts = [arrange([len(i.rollout.sequence) for i in g], packing) for g in groups]
    assert sorted(id(item) for group in groups for item in group) == sorted(map(id, items))
    assert all(layout.height * layout.width <= 20 for layout in layouts)
    empty = sum(layout.height * layout.width for layout in layouts) - sum(lengths)
    assert padding(groups, packing) == empty == {"off": 8, "rows": 6, "one_row": 0}[packing]
