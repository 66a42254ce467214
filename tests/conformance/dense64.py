"""Every loss as its formula is printed: dense, float64, autograd; nothing shared with opd.losses."""

from dataclasses import dataclass

import torch

Tensor = torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """N sampled tokens: who wrote them, who scored them, what they weigh. Log-probs are float64."""

    target_N: Tensor
    engine_N: Tensor  # NaN: no engine wrote it
    sequence_N: Tensor
    weight_N: Tensor
    teacher_NV: Tensor  # log-probs
    inside_NV: Tensor | None  # True: an id of the support; None: the whole vocabulary
    advantage_N: Tensor
    future_N: Tensor


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One point of the grid."""

    weighting: str = "uniform"
    correction: str = "none"
    clip: float | None = None
    gap_clip: float = 1.5
    cap: float = 0.9  # below 1, so that it cuts whole completions of this small batch too
    band: tuple[float, float] = (0.8, 1.25)


def divergence(kind: str, logits_NV: Tensor, tokens: Tokens, choice: Choice) -> Tensor:
    """sum_n weight factor min(D, clip) for beta 0.3 and skew 0.2."""
    q, p = logits_NV.softmax(-1), tokens.teacher_NV.exp()
    if tokens.inside_NV is not None:
        q, p = bucketed(q, tokens.inside_NV), bucketed(p, tokens.inside_NV)
    each_N = between(kind, p, q)
    if choice.clip is not None:
        each_N = torch.where(each_N > choice.clip, torch.full_like(each_N, choice.clip), each_N)
    return (factor(logits_NV, tokens, choice) * each_N).sum()


def between(kind: str, p: Tensor, q: Tensor, beta: float = 0.3, skew: float = 0.2) -> Tensor:
    """[N], from probabilities."""
    match kind:
        case "forward_kl":
            return kl(p, q)
        case "reverse_kl":
            return kl(q, p)
        case "jsd":
            m = beta * p + (1 - beta) * q
            return beta * kl(p, m) + (1 - beta) * kl(q, m)
        case "skew_kl":
            return kl(p, skew * p + (1 - skew) * q)
        case "skew_reverse_kl":
            return kl(q, skew * q + (1 - skew) * p)
    raise ValueError(kind)


def kl(a: Tensor, b: Tensor) -> Tensor:
    some = a > 0
    return torch.where(
        some, a * (torch.where(some, a, 1.0).log() - torch.where(some, b, 1.0).log()), 0.0
    ).sum(-1)


def bucketed(prob_NV: Tensor, inside_NV: Tensor) -> Tensor:
    """Probabilities of the support's ids where they are, zero elsewhere, and the rest last."""
    kept = prob_NV * inside_NV
    rest = (prob_NV * ~inside_NV).sum(-1, keepdim=True)
    return torch.cat([kept, rest], dim=-1)


def sampled(logits_NV: Tensor, tokens: Tokens) -> Tensor:
    return logits_NV.log_softmax(-1)[torch.arange(len(logits_NV)), tokens.target_N]


def policy(
    logits_NV: Tensor,
    tokens: Tokens,
    choice: Choice,
    *,
    surrogate: str,
    teacher: float,
    reward: float,
    kl_weight: float = 0.0,
    low: float = 0.2,
    high: float = 0.28,
) -> Tensor:
    """The surrogate with A from teacher, future and reward, and k3 to the teacher."""
    rows = torch.arange(len(logits_NV))
    logq = sampled(logits_NV, tokens)
    logp = tokens.teacher_NV[rows, tokens.target_N]
    a = teacher * (logp - logq.detach() + tokens.future_N) + reward * tokens.advantage_N
    if surrogate == "plain":
        each = -a * logq
    else:
        ratio = torch.exp(
            logq - torch.where(tokens.engine_N.isnan(), logq.detach(), tokens.engine_N)
        )
        each = -torch.minimum(ratio * a, torch.clip(ratio, 1 - low, 1 + high) * a)
    k3 = torch.exp(logp - logq) - 1 - (logp - logq)
    return (factor(logits_NV, tokens, choice) * (each + kl_weight * k3)).sum()


def nll(logits_NV: Tensor, tokens: Tokens, choice: Choice) -> Tensor:
    return -(factor(logits_NV, tokens, choice) * sampled(logits_NV, tokens)).sum()


def factor(logits_NV: Tensor, tokens: Tokens, choice: Choice) -> Tensor:
    """weight * weighting * correction, held fixed."""
    with torch.no_grad():
        return (
            tokens.weight_N
            * weighting(logits_NV, tokens, choice)
            * correction(logits_NV, tokens, choice)
        )


def weighting(logits_NV: Tensor, tokens: Tokens, choice: Choice) -> Tensor:
    vocab = logits_NV.shape[1]
    match choice.weighting:
        case "student_entropy":
            return entropy(logits_NV.softmax(-1)) / torch.log(torch.tensor(float(vocab)).double())
        case "teacher_entropy" if tokens.inside_NV is None:
            return entropy(tokens.teacher_NV.exp()) / torch.log(torch.tensor(float(vocab)).double())
        case "teacher_entropy":
            spread = entropy(bucketed(tokens.teacher_NV.exp(), tokens.inside_NV))
            size = (tokens.inside_NV.sum(-1) + 1.0).double()
            return torch.where(size > 1, spread / size.clip(2).log(), 0.0)
        case "gap":
            rows = torch.arange(len(logits_NV))
            gap = tokens.teacher_NV[rows, tokens.target_N] - sampled(logits_NV, tokens)
            return torch.minimum(gap.abs() / choice.gap_clip, torch.ones_like(gap))
    return torch.ones(len(logits_NV)).double()


def entropy(prob: Tensor) -> Tensor:
    return torch.special.entr(prob).sum(-1)


def correction(logits_NV: Tensor, tokens: Tokens, choice: Choice) -> Tensor:
    gap = sampled(logits_NV, tokens) - tokens.engine_N
    if choice.correction.startswith(("sequence_", "geometric_")):
        for sequence in tokens.sequence_N.unique():
            inside = tokens.sequence_N == sequence
            joint = gap[inside].sum()
            if choice.correction.startswith("geometric_"):
                joint = joint / inside.sum()
            gap = torch.where(inside, joint, gap)
    ratio = torch.where(gap.isnan(), torch.ones_like(gap), gap.exp())
    if choice.correction.endswith("truncate"):
        return torch.where(ratio > choice.cap, torch.full_like(ratio, choice.cap), ratio)
    if choice.correction.endswith("mask"):
        low, high = choice.band
        return torch.where((ratio >= low) & (ratio <= high), ratio, torch.zeros_like(ratio))
    return torch.ones_like(ratio)
