"""Sequences packed into rows give the loss and the gradients of padded ones, or the learner pads them."""

import pytest
import torch
from torch import nn

from opd.assembly.loss import build_loss
from opd.batch import collate
from opd.config.loss import DivergenceLossConfig
from opd.model_head import head_spec
from opd.packing import Packing, micro_batches, padding
from opd.reference import OwnForward
from opd.train.own_forward import choose_packing
from opd.train.student import Student
from opd.train.weights import disable_dropout
from tests.families.models import FAMILIES, NO_PLAIN_HEAD, PADDED, tiny_family
from tests.support.learners import QUICKSTART_VOCAB, fixed_scores

TOKENS = 100
CLOSE = 1e-5


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - NO_PLAIN_HEAD))
def test_packed_sequences_give_the_loss_and_gradients_of_padded_ones(name: str) -> None:
    model = tiny_family(name, QUICKSTART_VOCAB)
    disable_dropout(model)
    student = Student(
        model.train(),
        spec=head_spec(model.config),
        temperature=1.0,
        chunk_bytes=1 << 20,
        teacher_head=lambda _: torch.empty(0),
    )
    packing, _ = choose_packing(student, OwnForward.of(model, range(3, 30)), pad_id=0)
    assert (packing == Packing.off) == (name in PADDED)
    if packing == Packing.off:
        return
    loss, gradients = _learned(student, Packing.off)
    for each in (Packing.rows, Packing.one_row):
        packed_loss, packed_gradients = _learned(student, each)
        assert abs(packed_loss - loss) <= CLOSE * abs(loss)
        assert packed_gradients.keys() == gradients.keys()
        for key, gradient in gradients.items():
            bound = CLOSE * gradient.abs().max()
            assert (packed_gradients[key] - gradient).abs().max() <= bound, key


def _learned(student: nn.Module, packing: Packing) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of eight completions of uneven length, in several micro-batches."""
    loss, total = build_loss(DivergenceLossConfig()), 0.0
    scored = fixed_scores(1, QUICKSTART_VOCAB)
    groups = micro_batches(scored, tokens=TOKENS, packing=packing)
    fewest = padding(micro_batches(scored, tokens=TOKENS), Packing.off)
    assert packing == Packing.off or padding(groups, packing) < fewest
    student.zero_grad(set_to_none=True)
    for group in groups:
        value, *_ = student(collate(group, pad_id=0, packing=packing), loss)
        value.backward()
        total += value.item()
    named = student.named_parameters()
    return total, {key: p.grad for key, p in named if p.grad is not None}
