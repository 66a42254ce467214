"""The losses of verl, NeMo-RL, ms-swift, torchtune, axolotl, mini-verl and DistiLLM."""

from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from peer_case import Case, Data, Loss, Tensor, V, full, jsd, optional, ours, supported
from peer_cases_trl import scaled_advantages

from opd.config.loss import (
    DivergenceLossConfig,
    NllLossConfig,
    PolicyGradientLossConfig,
    Support,
)
from opd.losses.token_weights import ImportanceCorrection
from opd.types import Correction, DivergenceKind, Surrogate


def verl_advantage_cases(group: Tensor) -> Iterator[Case]:
    algos = optional("verl.trainer.ppo.core_algos")
    if algos is not None:
        yield Case(
            peer="verl",
            tests="tests/trainer/ppo",
            what="advantages of a group, with their epsilon set to 1e-4",
            logits=group,
            theirs=lambda x: algos.compute_grpo_outcome_advantage(
                x[:, None].clone(), torch.ones(4, 1), [0] * 4, epsilon=1e-4
            )[0][:, 0],
            ours=scaled_advantages,
        )


def verl_cases(d: Data) -> Iterator[Case]:
    algos = optional("verl.trainer.ppo.core_algos")
    fsdp = optional("verl.trainer.distillation.fsdp.losses")
    helper = optional("verl.trainer.ppo.rollout_corr_helper")
    if algos is None or fsdp is None or helper is None:
        return
    everything = torch.arange(V).repeat(8, 1)
    settings = SimpleNamespace(use_chunked_topk=False, log_prob_min_clamp=None)

    def topk(x: Tensor) -> Tensor:
        nested = [
            torch.nested.nested_tensor([t], layout=torch.jagged)
            for t in (d.teacher_NV.log_softmax(-1), everything)
        ]
        config = SimpleNamespace(distillation_loss=settings)
        out = fsdp.compute_forward_kl_topk(x[None], *nested, config, "thd")
        return out["distillation_losses"].sum()

    yield Case(
        peer="verl",
        tests="test_distillation_topk_symmetry_on_cpu",
        what="top-k forward KL with k = V",
        logits=d.student_NV,
        theirs=topk,
        ours=ours(
            DivergenceLossConfig(
                kind=DivergenceKind.forward_kl, support=Support.teacher_top_k, k=V
            ),
            d,
            **supported(d, everything),
        ),
    )
    config = SimpleNamespace(
        clip_ratio=0.2,
        clip_ratio_low=0.2,
        clip_ratio_high=0.28,
        get=lambda name, default: default,
        global_batch_info={},
    )
    modes = {
        "token-mean": "token",
        "seq-mean-token-mean": "sequence",
        "seq-mean-token-sum-norm": "constant",
    }
    for mode, reduction in modes.items():
        yield Case(
            peer="verl",
            tests="tests/trainer/ppo",
            what="clipped surrogate, three reductions",
            logits=d.student_NV,
            theirs=lambda x, m=mode: algos.compute_policy_loss_vanilla(
                d.padded(d.engine_N),
                d.padded(d.logps(x)),
                d.advantage_B[:, None].expand(2, 5),
                d.mask_BT,
                m,
                config,
            )[0],
            ours=ours(
                PolicyGradientLossConfig(
                    teacher_weight=0.0, reward_weight=1.0, clip_ratio_high=0.28
                ),
                d,
                weight_N=d.token_weights(reduction),
            ),
        )
    for level, correction in {
        "token": Correction.truncate,
        "sequence": Correction.sequence_truncate,
    }.items():
        yield from _verl_correction(d, helper, level, correction)


def _verl_correction(
    d: Data, helper: ModuleType, level: str, correction: Correction
) -> Iterator[Case]:
    def theirs(x: Tensor) -> Tensor:
        gap = d.padded(d.logps(x) - d.engine_N)
        weights, _ = helper.compute_rollout_correction_weights(gap, d.mask_BT, level, 1.2)
        return (weights.expand(2, 5) * d.mask_BT)[d.mask_BT.bool()]

    def ratios(x: Tensor) -> Tensor:
        config = NllLossConfig(correction=correction, correction_cap=1.2)
        return ImportanceCorrection(config).ratios(x.log_softmax(-1), d.batch(x))[0]

    yield Case(
        peer="verl",
        tests="tests/trainer/ppo",
        what="rollout correction weights, token and sequence",
        logits=d.student_NV,
        theirs=theirs,
        ours=ratios,
    )


def nemo_cases(d: Data) -> Iterator[Case]:
    peer = optional("nemo_rl.algorithms.loss.loss_functions")
    if peer is None:
        return
    for kind, beta in {"forward": 0.0, "reverse": 1.0}.items():
        loss = peer.DistillationLossFn(
            peer.DistillationLossConfig(kl_type=kind, mixed_kl_weight=0.5, zero_outside_topk=False)
        )

        def theirs(x: Tensor, loss: Any = loss) -> Tensor:
            student = x.log_softmax(-1)[None]
            masks = {"token_mask": torch.ones(1, 9), "sample_mask": torch.ones(1)}
            return loss(
                student,
                d.teacher_NV.log_softmax(-1)[None],
                None,
                masks | {"input_ids": torch.zeros(1, 9)},
                torch.tensor(1.0),
                torch.tensor(1.0),
            )[0]

        yield Case(
            peer="NeMo-RL",
            tests="test_loss_functions",
            what="forward and reverse KL with k = V",
            logits=d.student_NV,
            theirs=theirs,
            ours=ours(jsd(beta), d, **full(d)),
        )


def nemo_policy_cases(d: Data) -> Iterator[Case]:
    """The clipped surrogate; and, on policy, corrections for the engine (by gradient)."""
    peer = optional("nemo_rl.algorithms.loss.loss_functions")
    if peer is None:
        return
    settings: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "clipped surrogate": ({"ratio_clip_min": 0.2, "ratio_clip_max": 0.28}, {}),
        "engine correction: TIS": (
            {"truncated_importance_sampling_type": "tis"},
            {"correction": Correction.truncate},
        ),
        "engine correction: IcePop": (
            {
                "truncated_importance_sampling_type": "icepop",
                "truncated_importance_sampling_ratio_min": 0.8,
            },
            {"correction": Correction.mask},
        ),
    }
    for what, (theirs_set, ours_set) in settings.items():
        if ours_set:
            theirs_set |= {
                "force_on_policy_ratio": True,
                "use_importance_sampling_correction": True,
                "truncated_importance_sampling_ratio": 1.5,
            }
            ours_set |= {"surrogate": Surrogate.plain, "correction_cap": 1.5}
            ours_set |= {"correction_min": 0.8, "correction_max": 1.5}
        loss = peer.ClippedPGLossFn(
            peer.ClippedPGLossConfig(reference_policy_kl_penalty=0.0, **theirs_set)
        )
        config = PolicyGradientLossConfig(teacher_weight=0.0, reward_weight=1.0, **ours_set)
        yield Case(
            peer="NeMo-RL",
            tests="test_loss_functions",
            what=what,
            logits=d.student_NV,
            theirs=_nemo_policy_loss(loss, d),
            ours=ours(config, d, weight_N=d.token_weights("token")),
            gradient_only=bool(ours_set),
        )


def _nemo_policy_loss(loss: Any, d: Data) -> Loss:
    """Their tensors have one more column, the prompt's last token."""

    def after_prompt(values_BT: Tensor) -> Tensor:
        return torch.nn.functional.pad(values_BT, (1, 0))

    def value(x: Tensor) -> Tensor:
        logps = d.padded(d.logps(x))
        return loss(
            logps,
            {
                "input_ids": torch.zeros(2, 6),
                "advantages": after_prompt(d.advantage_B[:, None].expand(2, 5)),
                "prev_logprobs": after_prompt(d.padded(d.engine_N)),
                "generation_logprobs": after_prompt(d.padded(d.engine_N)),
                "token_mask": after_prompt(d.mask_BT),
                "sample_mask": torch.ones(2, dtype=x.dtype),
            },
            torch.tensor(2.0),
            d.mask_BT.sum(),
        )[0]

    return value


def other_cases(d: Data) -> Iterator[Case]:
    """ms-swift, torchtune, axolotl, mini-verl, DistiLLM."""
    labels = torch.zeros(8, dtype=torch.int64)
    swift = optional("swift.rlhf_trainers.gkd_loss")
    if swift is not None:
        for beta in (0.0, 0.5, 1.0):
            yield Case(
                peer="ms-swift",
                tests="tests/train/test_gkd",
                what="gkd_loss, full vocabulary, beta 0, 0.5, 1, temperature 2",
                logits=d.student_NV,
                theirs=lambda x, b=beta: swift.gkd_loss(
                    x[None],
                    swift.TeacherOutput(full_logits=d.teacher_NV[None]),
                    labels[None],
                    b,
                    2.0,
                )[0],
                ours=ours(jsd(beta), d, 2.0, **full(d, 2.0)),
            )
    tune = optional("torchtune.modules.loss.kd_losses")
    if tune is not None:
        for name, beta in {"ForwardKLLoss": 0.0, "ReverseKLLoss": 1.0}.items():
            yield Case(
                peer="torchtune",
                tests="test_kd_losses",
                what="forward and reverse KL",
                logits=d.student_NV,
                theirs=lambda x, n=name: getattr(tune, n)()(
                    x, d.teacher_NV, labels, normalize=False
                ),
                ours=ours(jsd(beta), d, **full(d)),
                gradient_only=beta == 0.0,
            )
    axolotl = optional("axolotl.integrations.kd.topk_logprob.forward_kl")
    if axolotl is not None:
        ids = torch.arange(V).repeat(1, 8, 1)
        yield Case(
            peer="axolotl",
            tests="test_kd_topk_forward_kl",
            what="top-k forward KL with k = V",
            logits=d.student_NV,
            theirs=lambda x: axolotl.loss(
                x[None], ids, d.teacher_NV.log_softmax(-1)[None], torch.ones(1, 8, V), 1
            ),
            ours=ours(jsd(0.0), d, **full(d)),
        )
    yield from _miniverl_cases(d)
    distillm = optional("distillm.losses")
    if distillm is not None:
        entropy = torch.special.entr(d.teacher_NV.softmax(-1)).sum()
        for name, kind, shift in (
            ("skewed_forward_kl", DivergenceKind.skew_kl, entropy / 8),
            ("skewed_reverse_kl", DivergenceKind.skew_reverse_kl, 0.0),
        ):
            yield Case(
                peer="DistiLLM",
                tests="distillm/losses.py (no tests)",
                what="skewed forward and reverse KL, lambda 0.1",
                logits=d.student_NV,
                theirs=lambda x, n=name, s=shift: (
                    8 * (getattr(distillm, n)(x, d.teacher_NV, {"label": labels}, lam=0.1) - s)
                ),
                ours=ours(DivergenceLossConfig(kind=kind, skew=0.1), d, **full(d)),
            )


def _miniverl_cases(d: Data) -> Iterator[Case]:
    bucketed = optional("miniverl.losses.bucketed")
    exact = optional("miniverl.losses.exact")
    if bucketed is None or exact is None:
        return
    ids, top, tail = bucketed.teacher_topk_targets(d.teacher_NV, top_k=4)
    for name, beta in {"forward_kl": 0.0, "jsd": 0.5, "reverse_kl": 1.0}.items():
        common = {"peer": "mini-verl", "tests": "test_property_losses", "logits": d.student_NV}

        def theirs(x: Tensor, name: str = name) -> Tensor:
            student = bucketed.student_bucket_log_probs(x, ids)
            buckets = bucketed.build_bucket_distributions(top, tail, *student)
            return getattr(bucketed, f"bucketed_{name}")(*buckets).sum()

        yield Case(
            **common,
            what="top-k of the teacher and a tail: forward, JSD, reverse",
            theirs=theirs,
            ours=ours(jsd(beta, support=Support.teacher_top_k, k=4), d, **supported(d, ids)),
        )
        yield Case(
            **common,
            what="full vocabulary, temperature 2: forward, JSD, reverse",
            theirs=lambda x, n=name: getattr(exact, f"exact_{n}")(
                d.teacher_NV, x, temperature=2.0, scale_by_temperature_squared=False
            ).sum(),
            ours=ours(jsd(beta), d, 2.0, **full(d, 2.0)),
        )


CASES = (verl_cases, nemo_cases, nemo_policy_cases, other_cases)
