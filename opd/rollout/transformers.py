"""transformers' ``generate`` as a rollout engine: slow and simple, for machines without vLLM."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig

from opd.interfaces import Progress
from opd.rollout.seeds import request_seed
from opd.types import FinishReason, Prompt, Rollout, Sampling


@contextmanager
def _without_own_defaults(model: Any) -> Iterator[None]:
    """Inside, ``generate`` samples as it is told: a model's generation_config.json adds nothing.

    Its repetition penalty, for example, would fill in what a given configuration leaves open.
    """
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


class TransformersRollouts:
    """Implements ``RolloutEngine`` with a model of its own, or the learner's (then nothing is copied).

    Samples depend on the seed and on how prompts are grouped into batches of ``batch_size``.
    """

    def __init__(
        self,
        model: Any,
        *,
        stop_ids: Sequence[int],
        pad_id: int,
        batch_size: int,
        progress: Progress,
    ) -> None:
        self.model = model
        self._version = 0
        self._stop_ids = sorted(set(stop_ids))
        self._pad_id = pad_id
        self._batch_size = batch_size
        self._progress = progress

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Rollout]:
        rows = [(prompt, sample) for prompt in prompts for sample in range(sampling.n)]
        rollouts: list[Rollout] = []
        self.model.eval()
        with self._progress.track("rollout", len(rows)) as advance, torch.no_grad():
            for start in range(0, len(rows), self._batch_size):
                part = rows[start : start + self._batch_size]
                rollouts += self._generate_batch(part, sampling)
                advance(len(part))
        return rollouts

    def mark(self, version: int) -> None:
        """The weights are now those after ``version`` optimizer steps; rollouts carry it."""
        self._version = version

    def _generate_batch(self, rows: list[tuple[Prompt, int]], sampling: Sampling) -> list[Rollout]:
        device = self.model.device
        width = max(len(p.token_ids) for p, _ in rows)
        ids_BT = np.full((len(rows), width), self._pad_id, np.int64)
        mask_BT = np.zeros((len(rows), width), np.int64)
        for row, (prompt, _) in enumerate(rows):  # left-padded: completions start together
            ids_BT[row, width - len(prompt.token_ids) :] = prompt.token_ids
            mask_BT[row, width - len(prompt.token_ids) :] = 1
        torch.manual_seed(request_seed(rows[0][0], sampling) + rows[0][1])
        with _without_own_defaults(self.model):
            out = self.model.generate(
                input_ids=torch.from_numpy(ids_BT).to(device),
                attention_mask=torch.from_numpy(mask_BT).to(device),
                generation_config=self._generation_config(sampling),
            )
        logits = out.logits if sampling.temperature == 0 else out.scores
        logps_BTV = torch.stack([torch.log_softmax(step.float(), -1) for step in logits], 1)
        completion_BT = out.sequences[:, width:]
        logps_BT = logps_BTV.gather(-1, completion_BT[..., None])[..., 0].cpu().numpy()
        support_BTK = (
            logps_BTV.topk(sampling.support_k, dim=-1).indices.int().cpu().numpy()
            if sampling.support_k
            else None
        )
        return [
            self._rollout(
                prompt,
                sample,
                completion_BT[row].int().cpu().numpy(),
                logps_BT[row],
                None if support_BTK is None else support_BTK[row],
            )
            for row, (prompt, sample) in enumerate(rows)
        ]

    def _generation_config(self, sampling: Sampling) -> Any:
        greedy = sampling.temperature == 0
        return GenerationConfig(
            do_sample=not greedy,
            temperature=None if greedy else sampling.temperature,
            top_p=None if greedy else sampling.top_p,
            top_k=None if greedy else max(0, sampling.top_k),
            max_new_tokens=sampling.max_tokens,
            return_dict_in_generate=True,
            output_logits=greedy,
            output_scores=not greedy,
            eos_token_id=self._stop_ids,
            pad_token_id=self._pad_id,
        )

    def _rollout(
        self,
        prompt: Prompt,
        sample: int,
        ids: np.ndarray,
        logps: np.ndarray,
        support: np.ndarray | None,
    ) -> Rollout:
        ends = np.flatnonzero(np.isin(ids, self._stop_ids))
        length = int(ends[0]) + 1 if len(ends) else len(ids)
        return Rollout(
            prompt=prompt,
            token_ids=ids[:length].astype(np.int32),
            logps=logps[:length].astype(np.float32),
            finish_reason=FinishReason.stop if len(ends) else FinishReason.length,
            version=self._version,
            sample=sample,
            support_ids=None if support is None else support[:length],
        )
