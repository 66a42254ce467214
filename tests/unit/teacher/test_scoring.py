"""The scores against their definitions, computed directly."""

import pytest
import torch

from opd.head import HeadSpec
from opd.teacher import scoring
from opd.teacher.scoring import ScoreOptions, folded_head, score_hidden, tail_logps, union_ids

N, D, V = 23, 8, 31


@pytest.fixture
def hidden_ND() -> torch.Tensor:
    return torch.randn(N, D, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def weight_VD() -> torch.Tensor:
    return torch.randn(V + 5, D, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def target_N() -> torch.Tensor:
    return torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_scores_do_not_depend_on_the_chunk(
    rows: int,
    monkeypatch: pytest.MonkeyPatch,
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    target_N: torch.Tensor,
) -> None:
    monkeypatch.setattr(scoring, "chunk_rows", lambda *_: rows)
    spec = HeadSpec(vocab_size=V, softcap=3.0, scale=0.5)
    named_NK = torch.randint(-1, V, (N, 4), generator=torch.Generator().manual_seed(3))
    options = ScoreOptions(top_k=3, named_ids_NK=named_NK, full_logps=True, temperature=0.7)
    scores = score_hidden(hidden_ND, weight_VD, spec, target_N, options)
    logits_NV = 3.0 * torch.tanh(0.5 * hidden_ND @ weight_VD[:V].T / 3.0)
    true_NV = torch.log_softmax(logits_NV / 0.7, dim=-1)
    torch.testing.assert_close(scores.full_logp_NV, true_NV)
    torch.testing.assert_close(scores.logp_N, true_NV[torch.arange(N), target_N])
    for n in range(N):
        expected = set(true_NV[n].topk(3).indices.tolist()) | set(named_NK[n].tolist()) - {-1}
        ids = scores.support_ids_NK[n]
        assert sorted(ids[ids >= 0].tolist()) == sorted(expected)
        torch.testing.assert_close(scores.support_logp_NK[n][ids >= 0], true_NV[n][ids[ids >= 0]])
        inside = true_NV[n][list(expected)].exp().sum()
        torch.testing.assert_close(scores.support_tail_N[n].exp() + inside, torch.tensor(1.0))


def test_hidden_and_folded_head_give_the_full_distribution(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, target_N: torch.Tensor
) -> None:
    spec = HeadSpec(vocab_size=V, scale=0.25)
    scores = score_hidden(
        hidden_ND,
        weight_VD,
        spec,
        target_N,
        ScoreOptions(full_logps=True, hidden=True, temperature=2.0),
    )
    again_NV = scores.hidden_ND @ folded_head(weight_VD, spec).T / 2.0
    torch.testing.assert_close(torch.log_softmax(again_NV, dim=-1), scores.full_logp_NV)


def test_a_confident_teacher_keeps_its_tail() -> None:
    logp_NV = torch.log_softmax(torch.tensor([[60.0, 0.0, 0.0, 1.0]]), dim=-1)
    tail = tail_logps(logp_NV, torch.tensor([[0, -1]]))
    assert tail.item() == pytest.approx(-60 + torch.tensor([0.0, 0.0, 1.0]).logsumexp(0).item())


def test_nothing_lies_outside_the_whole_vocabulary() -> None:
    logp_NV = torch.log_softmax(torch.randn(2, 5), dim=-1)
    assert torch.isneginf(tail_logps(logp_NV, torch.arange(5).expand(2, 5))).all()
    assert tail_logps(logp_NV, torch.full((2, 3), -1)).tolist() == [0.0, 0.0]


def test_a_union_keeps_each_id_once_and_unused_columns_unused() -> None:
    first_NK = torch.tensor([[4, 2], [0, 1]])
    second_NK = torch.tensor([[2, -1, 4, 7], [-1, -1, 3, 3]])
    united_NK = union_ids([first_NK, second_NK])
    assert united_NK.tolist() == [[4, 2, -1, -1, -1, 7], [0, 1, -1, -1, 3, -1]]
