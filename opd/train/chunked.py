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
    """``loss`` of head_logps(hidden_ND, weight_VD), with gradients for both tensors.

    Each chunk of ``chunk`` tokens (default: 256 MiB of one [C, V] tensor) computes its logits, its
    loss and its gradients in the forward pass and drops the logits. Only the gradients, float32
    [N, D] and [V, D], are kept until the one backward pass. All arithmetic is float32, whatever the
    dtypes, also under autocast; the gradients are returned in the dtypes of their tensors. Without
    grad mode only values are computed.

    ``batch.teacher_hidden_ND`` becomes the chunk's ``teacher_logp_NV`` through ``teacher_head_VD``,
    at the same temperature. Student and teacher are distributions over the first
    ``spec.vocab_size`` ids; ValueError when the teacher has fewer. Where the batch has spans, the teacher's
    are over its own vocabulary, and chunks hold whole spans. The metrics are the loss's own,
    ``student/entropy``, the mass outside the common ids (``student/outside_mass``, ``teacher/outside_mass``)
    and those of ``mismatch_metrics``. N = 0 gives total 0, still connected to both tensors.
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
        for rows in _whole_spans(hidden_ND.shape[0], chunk or chunk_rows(spec.vocab_size), batch):
            part = _with_teacher(
                batch.rows(rows.start, rows.stop), spec, temperature, teacher_head_VD, teacher_spec
            )
            logits_CV = head_logits(hidden_ND[rows], weight_VD, spec.vocab_size)
            first_C1 = logits_CV[:, :1].clone()
            logp_CV = normalise(logits_CV, spec, temperature)
            del logits_CV  # as large as anything here
            outside = _outside(hidden_ND[rows], weight_VD, logp_CV, spec, temperature)
            out, grad_CV = _value_and_gradient(logp_CV, part, loss, needs, outside)
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
    """Log-probs [N] float32 of ``target_N`` at ``temperature``; no gradient."""
    logp_N = torch.empty(target_N.shape, device=hidden_ND.device)
    for rows in _chunk_slices(hidden_ND.shape[0], spec, chunk):
        logp_CV = head_logps(hidden_ND[rows], weight_VD, spec, temperature)
        logp_N[rows] = _at_target(logp_CV, target_N[rows])
    return logp_N


def _chunk_slices(tokens: int, spec: HeadSpec, chunk: int | None) -> Iterator[slice]:
    """Slices of at most ``chunk`` rows; without tokens one empty slice, so that all metrics are named."""
    step = chunk or chunk_rows(spec.vocab_size)
    for start in range(0, max(tokens, 1), step):
        yield slice(start, min(start + step, tokens))


def _whole_spans(tokens: int, step: int, batch: Batch) -> Iterator[slice]:
    """Slices of ``step`` rows, longer where one would divide a span of the batch."""
    span = [] if batch.span_N is None else batch.span_N.tolist()
    start = 0
    while start < max(tokens, 1):
        stop = min(start + step, tokens)
        while span and 0 < stop < tokens and span[stop] == span[stop - 1] >= 0:
            stop += 1
        yield slice(start, stop)
        start = max(stop, start + 1)


def _at_target(logp_CV: torch.Tensor, target_C: torch.Tensor) -> torch.Tensor:
    """Log-probs [C] of the targets."""
    return logp_CV.gather(-1, target_C[:, None]).squeeze(-1)


def _with_teacher(
    chunk: Batch,
    spec: HeadSpec,
    temperature: float,
    teacher_head_VD: torch.Tensor | None,
    teacher_spec: HeadSpec | None,
) -> Batch:
    """The chunk with the teacher's distribution, if there is one, over the student's ids."""
    if chunk.teacher_hidden_ND is not None:
        assert teacher_head_VD is not None, "the teacher's hidden states need the teacher's head"
        common = replace(teacher_spec or spec, vocab_size=spec.vocab_size)
        if chunk.span_N is not None:
            common = replace(common, vocab_size=teacher_head_VD.shape[0])
        _check_teacher_ids(teacher_head_VD.shape[0], common)
        logp_CV = head_logps(chunk.teacher_hidden_ND, teacher_head_VD, common, temperature)
    elif chunk.teacher_logp_NV is not None and chunk.span_N is None:
        _check_teacher_ids(chunk.teacher_logp_NV.shape[1], spec)
        logp_CV = chunk.teacher_logp_NV[:, : spec.vocab_size].float()
    else:
        return chunk
    return replace(chunk, teacher_logp_NV=logp_CV)


def _check_teacher_ids(found: int, spec: HeadSpec) -> None:
    if found < spec.vocab_size:
        raise ValueError(
            f"the teacher's vocabulary has {found} ids and the student's {spec.vocab_size}; a full "
            "divergence needs one for each: use a teacher of the same tokenizer"
        )


def _value_and_gradient(
    logp_CV: torch.Tensor,
    chunk: Batch,
    loss: Loss,
    needs_gradient: bool,
    outside: dict[str, torch.Tensor],
) -> tuple[LossOutput, torch.Tensor | None]:
    """The chunk's loss and metrics, detached, and the gradient [C, V] with respect to its log-probs.

    ``outside`` are sums of the student that cannot be computed from its log-probs.
    """
    with torch.set_grad_enabled(needs_gradient):
        leaf_CV = logp_CV.detach().requires_grad_(needs_gradient)
        out = loss(leaf_CV, chunk)
        grad_CV = torch.autograd.grad(out.total, leaf_CV)[0] if needs_gradient else None
    mismatch = mismatch_metrics(_at_target(logp_CV, chunk.target_N), chunk)
    student = {"student/entropy": -logp_CV.exp().mul_(logp_CV).sum(), **outside}
    outside_N = logp_CV.new_zeros(0) if chunk.teacher_outside_N is None else chunk.teacher_outside_N
    teacher = {"teacher/outside_mass": outside_N.sum()}
    measured = {"teacher/outside_mass": logp_CV.new_tensor(float(len(outside_N)))}
    own = {name: value.detach() for name, value in out.sums.items()}
    output = LossOutput(
        total=out.total.detach(),
        sums=mismatch.sums | student | teacher | own,
        maxima=mismatch.maxima | {name: value.detach() for name, value in out.maxima.items()},
        counts=mismatch.counts | measured | out.counts,
    )
    return output, grad_CV


def _outside(
    hidden_CD: torch.Tensor,
    weight_VD: torch.Tensor,
    logp_CV: torch.Tensor,
    spec: HeadSpec,
    temperature: float,
) -> dict[str, torch.Tensor]:
    """``student/outside_mass``: the sum of the student's mass on ids that the teacher lacks.

    Empty where there are none.
    """
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
    """Add the gradients of hidden states and matrix, a block of ids at a time.

    On CUDA the logits' gradient is rounded to the dtype of half-precision operands, as in any
    mixed-precision backward pass; the sums are float32.
    """
    if grad_CV.is_cuda and hidden_ND.dtype == weight_VD.dtype:
        grad_CV = grad_CV.to(weight_VD.dtype)
    for ids in vocab_blocks(weight_VD[: grad_CV.shape[1]]):
        if grad_hidden_ND is not None:
            grad_hidden_ND[rows] += matmul_float32(grad_CV[:, ids], weight_VD[ids])
        if grad_weight_VD is not None:
            grad_weight_VD[ids] += matmul_float32(grad_CV[:, ids].T, hidden_ND[rows])
