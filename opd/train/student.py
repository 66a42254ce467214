"""The module that the training engine wraps: decoder, chunked head and loss in one forward.

The head is applied inside the module, so that ZeRO-3's gathers and the hooks on weights cover it.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from opd.batch import Batch, LossOutput
from opd.head import HeadSpec, as_operand, chunk_rows
from opd.interfaces import Loss, Teacher
from opd.model_head import decoder
from opd.train.chunked import chunked_logps, chunked_loss


class Student(nn.Module):
    """A causal language model that returns a loss instead of logits.

    Args:
        model: a transformers causal language model, plain or wrapped by peft.
        spec: its head; ids beyond ``spec.vocab_size`` get no probability.
        temperature: the rollout engine's, so that log-probs are of the same distribution.
        chunk_bytes: size of the largest float32 [C, V] tensor that exists at once.
        teacher_head: returns the head [V, D] of ``Batch.teacher``; called for batches with
            ``teacher_hidden_ND``.
        sequence_gaps: fill ``Batch.sequence_gap_N`` and its mean, which applies the head a second time.
    """

    def __init__(
        self,
        model: Any,
        *,
        spec: HeadSpec,
        temperature: float,
        chunk_bytes: int,
        teacher_head: Callable[[str | None], torch.Tensor],
        sequence_gaps: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.spec = spec
        self.temperature = temperature
        self.chunk_bytes = chunk_bytes
        self.chunk = chunk_rows(spec.vocab_size, chunk_bytes)
        self._teacher_head = teacher_head
        self._sequence_gaps = sequence_gaps

    def forward(
        self, batch: Batch, loss: Loss | None
    ) -> tuple[torch.Tensor, *tuple[dict[str, torch.Tensor], ...]]:
        """(total, sums, maxima, counts) of ``loss``; without a loss, total is the targets' log-probs [N]."""
        causal = causal_lm(self.model)
        # transformers separates the sequences of a row by their positions where no mask is given
        sequences = (
            {"attention_mask": batch.attention_mask_BT}
            if batch.position_ids_BT is None
            else {"position_ids": batch.position_ids_BT}
        )
        hidden_BTD = decoder(causal)(
            input_ids=batch.input_ids_BT, use_cache=False, **sequences
        ).last_hidden_state
        hidden_ND = hidden_BTD.flatten(0, 1)[batch.positions_N]
        weight_VD = causal.get_output_embeddings().weight
        if loss is None:
            return self._logps(hidden_ND, weight_VD, batch), {}, {}, {}
        if self._sequence_gaps:
            batch = with_sequence_gaps(batch, self._logps(hidden_ND, weight_VD, batch))
        out = self._loss(hidden_ND, weight_VD, batch, loss)
        return out.total, out.sums, out.maxima, out.counts

    def _logps(
        self, hidden_ND: torch.Tensor, weight_VD: torch.Tensor, batch: Batch
    ) -> torch.Tensor:
        return chunked_logps(
            hidden_ND,
            weight_VD,
            batch.target_N,
            self.spec,
            temperature=self.temperature,
            chunk=self.chunk,
        )

    def _loss(
        self, hidden_ND: torch.Tensor, weight_VD: torch.Tensor, batch: Batch, loss: Loss
    ) -> LossOutput:
        # the matrix is already scaled, and teachers with capped logits send log-probs instead
        teacher_head_VD = (
            None if batch.teacher_hidden_ND is None else self._teacher_head(batch.teacher)
        )
        chunk = self.chunk
        if batch.span_N is not None:  # the teacher's own vocabulary may be the larger one
            logp_NV = batch.teacher_logp_NV
            width = 0 if teacher_head_VD is None else teacher_head_VD.shape[0]
            width = width if logp_NV is None else logp_NV.shape[1]
            chunk = min(chunk, chunk_rows(max(width, 1), self.chunk_bytes))
        return chunked_loss(
            hidden_ND,
            weight_VD,
            batch,
            loss,
            self.spec,
            temperature=self.temperature,
            teacher_head_VD=teacher_head_VD,
            teacher_spec=HeadSpec(vocab_size=self.spec.vocab_size),
            chunk=chunk,
        )


class TeacherHeads:
    """A cache of teachers' heads [V, D] by name, on ``device``; the ``most`` used last are kept.

    ``teacher`` returns the heads; it is None where no teacher sends hidden states.
    """

    def __init__(self, teacher: Teacher | None, most: int, device: torch.device) -> None:
        self._teacher = teacher
        self._most = most
        self._device = device
        self._kept: dict[str | None, torch.Tensor] = {}

    def __call__(self, name: str | None) -> torch.Tensor:
        assert self._teacher is not None, "only a teacher sends hidden states"
        head_VD = self._kept.pop(name, None)
        if head_VD is None:
            head_VD = as_operand(torch.from_numpy(self._teacher.head(name)), self._device)
        self._kept[name] = head_VD
        while len(self._kept) > self._most:
            del self._kept[next(iter(self._kept))]
        return head_VD

    def forget(self) -> None:
        """Empty the cache, after the teacher's weights have changed."""
        self._kept.clear()


def with_sequence_gaps(batch: Batch, logp_N: torch.Tensor) -> Batch:
    """The batch with ``sequence_gap_N`` and ``sequence_mean_gap_N``, of a token's completion.

    ``logp_N`` are the learner's log-probs of the targets. Tokens that no engine wrote have no gap.
    Sums are in float64: thousands of small gaps decide about a whole completion.
    """
    assert batch.sequence_N is not None, "collate fills sequence_N"
    gap_N = (logp_N - batch.engine_logp_N).nan_to_num(nan=0.0).double()
    zeros_S = torch.zeros_like(gap_N)  # a sequence has at least one token
    sum_S = zeros_S.index_add(0, batch.sequence_N, gap_N)
    count_S = zeros_S.index_add(0, batch.sequence_N, torch.ones_like(gap_N))
    return replace(
        batch,
        sequence_gap_N=sum_S[batch.sequence_N].to(logp_N.dtype),
        sequence_mean_gap_N=(sum_S / count_S)[batch.sequence_N].to(logp_N.dtype),
    )


def causal_lm(model: Any) -> Any:
    """The transformers model itself, without the peft wrapper if there is one."""
    from peft import PeftModel

    return model.get_base_model() if isinstance(model, PeftModel) else model
