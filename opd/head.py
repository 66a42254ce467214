"""The output head: hidden states into log-probs, in float32, a chunk of tokens at a time."""

from dataclasses import dataclass

import torch

CHUNK_BYTES = 256 << 20  # of one float32 [C, V] tensor; a handful of them live at once


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadSpec:
    """What is applied between ``hidden @ weight.T`` and the softmax.

    ``vocab_size``: ids from here on are padding rows of the matrix and get no probability.
    ``softcap`` s: logits become s tanh(logits / s). ``scale`` multiplies the logits.
    """

    vocab_size: int
    softcap: float | None = None
    scale: float = 1.0


def matmul_float32(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """``left @ right`` in float32, whatever the dtypes, autocast or not.

    A product of two bfloat16 numbers is exact in float32. Tensor cores (CUDA) add up in float32 and
    can return the sum unrounded, so there half-precision operands are used as they are; elsewhere
    they are cast. A bfloat16 *result* would round logits near 20 by up to 0.06 nats, as much as the
    differences between teacher and student that are to be learned.
    """
    halves = left.dtype == right.dtype and left.dtype in (torch.bfloat16, torch.float16)
    with torch.autocast(left.device.type, enabled=False):
        if left.is_cuda and halves and not (left.requires_grad or right.requires_grad):
            return torch.mm(left, right, out_dtype=torch.float32)  # has no derivative in torch
        return left.float() @ right.float()


def exact_half(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` in bfloat16 where that changes no value, otherwise as it is."""
    halves = tensor.bfloat16()
    return halves if torch.equal(halves.float(), tensor.float()) else tensor


def as_operand(weight_VD: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A frozen head on ``device``, in the format in which ``matmul_float32`` is fastest; no value changes.

    That is bfloat16 on CUDA, if the values have it. A CPU would cast the matrix again in every chunk.
    """
    return (exact_half(weight_VD) if device.type == "cuda" else weight_VD.float()).to(device)


def head_logits(hidden_CD: torch.Tensor, weight_VD: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """``hidden @ weight.T`` [C, vocab_size] in float32; no float32 copy of the matrix is made."""
    weight_VD = weight_VD[:vocab_size]
    if weight_VD.is_cuda and weight_VD.dtype == torch.bfloat16 != hidden_CD.dtype:
        hidden_CD = exact_half(hidden_CD)  # a bfloat16 model's, sent as float32
    if weight_VD.dtype == torch.float32:
        return matmul_float32(hidden_CD, weight_VD.T)
    logits = hidden_CD.new_empty(hidden_CD.shape[0], vocab_size, dtype=torch.float32)
    for rows in vocab_blocks(weight_VD):
        logits[:, rows] = matmul_float32(hidden_CD, weight_VD[rows].T)
    return logits


def normalise(logits_CV: torch.Tensor, spec: HeadSpec, temperature: float) -> torch.Tensor:
    """Raw float32 logits into log-probs of softmax(logits / temperature), cap and scale applied."""
    return torch.log_softmax(_scaled_and_capped(logits_CV, spec, temperature), dim=-1)


def _scaled_and_capped(logits_CV: torch.Tensor, spec: HeadSpec, temperature: float) -> torch.Tensor:
    logits = logits_CV if spec.scale == 1.0 else logits_CV * spec.scale
    if spec.softcap is not None:
        logits = spec.softcap * torch.tanh(logits / spec.softcap)
    return logits if temperature == 1.0 else logits / temperature


def normalise_backward(
    grad_CV: torch.Tensor,
    logp_CV: torch.Tensor,
    first_logit_C1: torch.Tensor,
    spec: HeadSpec,
    temperature: float,
) -> torch.Tensor:
    """Gradient by the raw logits from the one by ``normalise``'s result, without the logits.

    The log-probs are the capped logits less one number per row, which follows from the first logit.
    """
    grad = logp_CV.exp().mul_(grad_CV.sum(dim=-1, keepdim=True))
    torch.sub(grad_CV, grad, out=grad)
    if spec.softcap is not None:
        first = torch.tanh(first_logit_C1 * (spec.scale / spec.softcap))
        tanh = (logp_CV - logp_CV[:, :1]).mul_(temperature / spec.softcap).add_(first)
        grad.mul_(tanh.square_().neg_().add_(1.0))
    return grad.mul_(spec.scale / temperature)


def head_logps(
    hidden_CD: torch.Tensor, weight_VD: torch.Tensor, spec: HeadSpec, temperature: float = 1.0
) -> torch.Tensor:
    """Log-probs [C, spec.vocab_size] of softmax(logits / temperature), float32 all the way."""
    return normalise(head_logits(hidden_CD, weight_VD, spec.vocab_size), spec, temperature)


def outside_mass(
    hidden_CD: torch.Tensor,
    weight_VD: torch.Tensor,
    logp_CV: torch.Tensor,
    spec: HeadSpec,
    temperature: float = 1.0,
) -> torch.Tensor:
    """The probability [C] that a softmax over all rows gives to ids from ``spec.vocab_size`` on.

    ``logp_CV`` is ``head_logps`` of the same states, over the ids before them; a row's first logit
    less its log-prob is the logarithm of what those add up to.
    """
    first_C1 = _scaled_and_capped(head_logits(hidden_CD, weight_VD, 1), spec, temperature)
    beyond = [
        _scaled_and_capped(
            head_logits(hidden_CD, rows_VD, len(rows_VD)), spec, temperature
        ).logsumexp(dim=-1)
        for rows_VD in weight_VD[spec.vocab_size :].split(spec.vocab_size)
    ]
    within_C = (first_C1 - logp_CV[:, :1])[:, 0]
    return torch.sigmoid(torch.stack(beyond).logsumexp(dim=0) - within_C)


def vocab_blocks(weight_VD: torch.Tensor) -> list[slice]:
    """The matrix in blocks of rows whose float32 copy is a quarter of a chunk."""
    vocab_size, width = weight_VD.shape
    step = chunk_rows(width, CHUNK_BYTES // 4)
    return [slice(start, min(start + step, vocab_size)) for start in range(0, vocab_size, step)]


def chunk_rows(vocab_size: int, budget_bytes: int = CHUNK_BYTES) -> int:
    """How many float32 rows of ``vocab_size`` ids fit into ``budget_bytes``; at least 1."""
    return max(1, budget_bytes // (4 * vocab_size))
