"""Hidden states from a Hugging Face model in this process."""

from collections.abc import Sequence

import numpy as np
import torch

from opd.config.teacher import TeacherModelConfig
from opd.head import HeadSpec, as_operand
from opd.model_head import decoder
from opd.reference import TOKENS, OwnForward, load_whole, use_faithful_attention
from opd.teacher.model_info import max_positions, probe_text, read_info, read_spec
from opd.teacher.scoring import log_probs
from opd.types import IntArray, TeacherInfo


class TorchBackend:
    """A frozen ``AutoModelForCausalLM`` on ``device``, run in batches of ``max_num_batched_tokens``.

    No quantised models and no remote code.
    """

    def __init__(
        self,
        model: str,
        config: TeacherModelConfig,
        *,
        device: str = "cpu",
    ) -> None:
        self._device = torch.device(device)
        who = f"teacher {model}"
        network = load_whole(model, who, dtype=config.dtype.value)
        network.to(device).eval().requires_grad_(False)
        use_faithful_attention(network, range(TOKENS))
        self.spec: HeadSpec = read_spec(model)
        self.network = decoder(network)
        self.head_VD: torch.Tensor = as_operand(
            network.get_output_embeddings().weight.detach(), self._device
        )
        self.info: TeacherInfo = read_info(
            model, max_length=config.max_model_len or max_positions(model), dtype=network.dtype
        )
        self.max_tokens = config.max_num_batched_tokens
        OwnForward.of(network, probe_text(model)).require(
            lambda sequences: log_probs(self, sequences), who
        )

    @torch.inference_mode()
    def hidden(self, sequences: Sequence[IntArray]) -> list[torch.Tensor]:
        """See ``Backend``; the tensors lie on the model's device."""
        return hidden_states(self.network, sequences, self.max_tokens)

    def sleep(self) -> None:
        """See ``ServerBackend``; the CPU has no other place for them."""
        self._move_to(torch.device("cpu"))
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def wake(self) -> None:
        """See ``ServerBackend``."""
        self._move_to(self._device)

    def _move_to(self, device: torch.device) -> None:
        self.network.to(device)
        self.head_VD = self.head_VD.to(device)


def hidden_states(
    network: torch.nn.Module, sequences: Sequence[IntArray], max_tokens: int
) -> list[torch.Tensor]:
    """The final-norm hidden states [L, D] float32 of each sequence, ``max_tokens`` padded per batch."""
    device = next(network.parameters()).device
    hidden: dict[int, torch.Tensor] = {}
    for group in _group_by_length([len(s) for s in sequences], max_tokens):
        width = len(sequences[group[0]])
        ids_BT = np.zeros((len(group), width), np.int64)
        mask_BT = np.zeros((len(group), width), np.int64)
        for row, index in enumerate(group):
            ids_BT[row, : len(sequences[index])] = sequences[index]
            mask_BT[row, : len(sequences[index])] = 1
        hidden_BTD = network(
            input_ids=torch.from_numpy(ids_BT).to(device),
            attention_mask=torch.from_numpy(mask_BT).to(device),
            use_cache=False,
        ).last_hidden_state.float()
        for row, index in enumerate(group):
            hidden[index] = hidden_BTD[row, : len(sequences[index])]
    return [hidden[index] for index in range(len(sequences))]


def _group_by_length(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Indices by descending length, in groups of at most ``tokens`` padded tokens, or of one."""
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups
