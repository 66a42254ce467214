"""The student's head and the loss, a chunk of tokens at a time: [N, V] never exists."""

from collections.abc import Iterator
from dataclasses import replace

import torch

from opd.batch import Batch, LossOutput
from opd.head import (
    HeadSpec,
    chunk_rows,
    head_logits,
    head_logps,
    matmul_float32,
    normalise,
    normalise_backward,
    outside_mass,
    vocab_blocks,
)
from opd.interfaces import Loss
from opd.losses.closed_form import with_gradients
from opd.losses.mismatch import mismatch_metrics


def chunked_loss(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    batch: Batch,
    loss: Loss,
    spec: HeadSpec,
    *,
    temperature: float = 1.0,
    teacher_head_VD: torch.Tensor | None = None,
    teacher_spec: HeadSpec | None = None,
    chunk: int | None = None,
) -> LossOutput:
    """``loss`` of head_logps(hidden_ND, weight_VD), with its gradient to both.

    Each chunk of ``chunk`` tokens (default: 256 MiB of one [C, V] tensor) makes its logits, its
    loss and its gradients in the forward pass and forgets the logits; what stays until the one
    backward pass is the gradient itself, float32: [N, D] and [V, D]. float32 throughout, whatever
    the dtypes, under autocast too; the gradients come out in the dtypes of their tensors. Without
    grad mode only values are made.

    ``batch.teacher_hidden_ND`` becomes the chunk's ``teacher_logp_NV`` through ``teacher_head_VD``,
    at the same temperature. Student and teacher are distributions over the first
    ``spec.vocab_size`` ids; ValueError when the teacher has fewer. To the loss's own metrics come
    ``student/entropy``, the mass outside the common ids (``student/outside_mass``,
    ``teacher/outside_mass``) and those of ``mismatch_metrics``. N = 0 gives total 0, still connected to
    both tensors.
    """
    needs_hidden = torch.is_grad_enabled() and hidden_ND.requires_grad
    needs_weight = torch.is_grad_enabled() and weight_VD.requires_grad
    needs = needs_hidden or needs_weight
    total = torch.zeros((), device=hidden_ND.device)
    sums: dict[str, torch.Tensor] = {}
    maxima: dict[str, torch.Tensor] = {}
    counts: dict[str, torch.Tensor] = {}
    grad_hidden = torch.zeros_like(hidden_ND, dtype=torch.float32) if needs_hidden else None
    grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32) if needs_weight else None
    with torch.no_grad(), torch.autocast(hidden_ND.device.type, enabled=False):
        for rows in _cuts(hidden_ND.shape[0], spec, chunk):
            part = _with_teacher(
                batch.rows(rows.start, rows.stop), spec, temperature, teacher_head_VD, teacher_spec
            )
            logits_CV = head_logits(hidden_ND[rows], weight_VD, spec.vocab_size)
            first_C1 = logits_CV[:, :1].clone()
            logp_CV = normalise(logits_CV, spec, temperature)
            del logits_CV  # as large as anything here
            own = _outside(hidden_ND[rows], weight_VD, logp_CV, spec, temperature)
            out, grad_CV = _value_and_gradient(logp_CV, part, loss, needs, own)
            if grad_CV is not None:
                grad_CV = normalise_backward(grad_CV, logp_CV, first_C1, spec, temperature)
                del logp_CV, part
                _add_products(grad_CV, hidden_ND, weight_VD, rows, grad_hidden, grad_weight)
            total += out.total
            for added, values in ((sums, out.sums), (counts, out.counts)):
                for name, value in values.items():
                    added[name] = added[name] + value if name in added else value
            for name, value in out.maxima.items():
                maxima[name] = torch.maximum(maxima[name], value) if name in maxima else value
    if needs:
        total = with_gradients(total, (hidden_ND, grad_hidden), (weight_VD, grad_weight))
    return LossOutput(total=total, sums=sums, maxima=maxima, counts=counts)


@torch.no_grad()
def chunked_logps(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    target_N: torch.Tensor,
    spec: HeadSpec,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> torch.Tensor:
    """Log-probs [N] float32 of ``target_N``; no gradient."""
    logp_N = torch.empty(target_N.shape, device=hidden_ND.device)
    for rows in _cuts(hidden_ND.shape[0], spec, chunk):
        logp_CV = head_logps(hidden_ND[rows], weight_VD, spec, temperature)
        logp_N[rows] = _at_target(logp_CV, target_N[rows])
    return logp_N


def _cuts(tokens: int, spec: HeadSpec, chunk: int | None) -> Iterator[slice]:
    """Slices of at most ``chunk`` rows; of no tokens one empty slice, which names every metric."""
    step = chunk or chunk_rows(spec.vocab_size)
    for start in range(0, max(tokens, 1), step):
        yield slice(start, min(start + step, tokens))


def _at_target(logp_CV: torch.Tensor, target_C: torch.Tensor) -> torch.Tensor:
    return logp_CV.gather(-1, target_C[:, None]).squeeze(-1)


def _with_teacher(
    part: Batch,
    spec: HeadSpec,
    temperature: float,
    teacher_head_VD: torch.Tensor | None,
    teacher_spec: HeadSpec | None,
) -> Batch:
    """The chunk with the teacher's distribution, if any, over the student's ids."""
    if part.teacher_hidden_ND is not None:
        assert teacher_head_VD is not None, "the teacher's hidden states need the teacher's head"
        _check_teacher_ids(teacher_head_VD.shape[0], spec)
        over = replace(teacher_spec or spec, vocab_size=spec.vocab_size)
        logp_CV = head_logps(part.teacher_hidden_ND, teacher_head_VD, over, temperature)
    elif part.teacher_logp_NV is not None:
        _check_teacher_ids(part.teacher_logp_NV.shape[1], spec)
        logp_CV = part.teacher_logp_NV[:, : spec.vocab_size].float()
    else:
        return part
    return replace(part, teacher_logp_NV=logp_CV)


def _check_teacher_ids(found: int, spec: HeadSpec) -> None:
    if found < spec.vocab_size:
        raise ValueError(
            f"the teacher's vocabulary has {found} ids and the student's {spec.vocab_size}; a full "
            "divergence needs one for each: use a teacher of the same tokenizer"
        )


def _value_and_gradient(
    logp_CV: torch.Tensor,
    part: Batch,
    loss: Loss,
    needs: bool,
    own: dict[str, torch.Tensor],
) -> tuple[LossOutput, torch.Tensor | None]:
    """The chunk's loss and metrics, detached, and the gradient with respect to its log-probs.

    ``own`` are sums about the student that its log-probs do not tell.
    """
    with torch.set_grad_enabled(needs):
        leaf_CV = logp_CV.detach().requires_grad_(needs)
        out = loss(leaf_CV, part)
        grad_CV = torch.autograd.grad(out.total, leaf_CV)[0] if needs else None
    gaps = mismatch_metrics(_at_target(logp_CV, part.target_N), part)
    own = {"student/entropy": -logp_CV.exp().mul_(logp_CV).sum(), **own}
    outside_N = logp_CV.new_zeros(0) if part.teacher_outside_N is None else part.teacher_outside_N
    theirs = {"teacher/outside_mass": outside_N.sum()}
    counted = {"teacher/outside_mass": logp_CV.new_tensor(float(len(outside_N)))}
    said = LossOutput(
        total=out.total.detach(),
        sums=gaps.sums | own | theirs | {name: value.detach() for name, value in out.sums.items()},
        maxima=gaps.maxima | {name: value.detach() for name, value in out.maxima.items()},
        counts=gaps.counts | counted | out.counts,
    )
    return said, grad_CV


def _outside(
    hidden_CD: torch.Tensor,
    weight_VD: torch.Tensor,
    logp_CV: torch.Tensor,
    spec: HeadSpec,
    temperature: float,
) -> dict[str, torch.Tensor]:
    """The sum of what the student gives to ids that the teacher lacks, where there are any."""
    if weight_VD.shape[0] <= spec.vocab_size:
        return {}
    mass_C = outside_mass(hidden_CD, weight_VD, logp_CV, spec, temperature)
    return {"student/outside_mass": mass_C.sum()}


def _add_products(
    grad_CV: torch.Tensor,
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    rows: slice,
    grad_hidden_ND: torch.Tensor | None,
    grad_weight_VD: torch.Tensor | None,
) -> None:
    """Carry the logits' gradient on to hidden states and matrix, a block of ids at a time.

    On CUDA half-precision operands meet a gradient rounded to their dtype, as in any
    mixed-precision backward pass; the sums are float32.
    """
    if grad_CV.is_cuda and hidden_ND.dtype == weight_VD.dtype:
        grad_CV = grad_CV.to(weight_VD.dtype)
    for ids in vocab_blocks(weight_VD[: grad_CV.shape[1]]):
        if grad_hidden_ND is not None:
            grad_hidden_ND[rows] += matmul_float32(grad_CV[:, ids], weight_VD[ids])
        if grad_weight_VD is not None:
            grad_weight_VD[ids] += matmul_float32(grad_CV[:, ids].T, hidden_ND[rows])
