"""The losses of TRL: trainers' functions, called without the trainers."""

import importlib
import inspect
import textwrap
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from peer_case import Case, Data, Tensor, V, full, jsd, ours, supported

from opd.config.loss import PolicyGradientLossConfig, Support
from opd.teacher.rewarded import advantage
from opd.types import Correction, Surrogate


def trl_jsd_cases(d: Data) -> Iterator[Case]:
    gkd = importlib.import_module("trl.experimental.gkd.gkd_trainer").GKDTrainer
    gold = importlib.import_module("trl.experimental.gold.gold_trainer").GOLDTrainer
    trainer = importlib.import_module("trl.trainer.distillation_trainer")
    head = torch.eye(V, dtype=d.student_NV.dtype)  # hidden states are the logits themselves
    for beta in (0.0, 0.1, 0.5, 0.9, 1.0):
        for temperature in (1.0, 2.0):
            for name, peer in (("test_gkd_trainer", gkd), ("test_gold_trainer", gold)):
                yield Case(
                    peer="TRL",
                    tests=name,
                    what="generalized JSD, beta 0 to 1, temperature 1 and 2",
                    logits=d.student_NV,
                    theirs=lambda x, p=peer, b=beta, t=temperature: p.generalized_jsd_loss(
                        x[None], d.teacher_NV[None], beta=b, temperature=t, reduction="sum"
                    ),
                    ours=ours(jsd(beta), d, temperature, **full(d, temperature)),
                )
        yield Case(
            peer="TRL",
            tests="test_distillation_trainer",
            what="chunked divergence of hidden states, beta 0 to 1",
            logits=d.student_NV,
            theirs=lambda x, b=beta: trainer._chunked_divergence_loss(
                x[None], d.teacher_NV[None], head, head, torch.ones(1, 8), b, num_items_in_batch=1
            )[0],
            ours=ours(jsd(beta), d, **full(d)),
        )


def trl_self_distillation_cases(d: Data) -> Iterator[Case]:
    for name in ("sdft", "sdpo"):
        peer = importlib.import_module(f"trl.experimental.{name}.loss_utils")
        own = d.student_NV.topk(4).indices
        for alpha in (0.0, 0.5, 1.0):
            common = {"peer": "TRL", "tests": f"test_{name}_trainer", "logits": d.student_NV}
            yield Case(
                **common,
                what="full-vocabulary divergence, alpha 0, 0.5, 1",
                theirs=lambda x, p=peer, a=alpha: p.compute_full_logit_self_distillation_loss(
                    x, d.teacher_NV, distillation_alpha=a
                ).sum(),
                ours=ours(jsd(alpha), d, **full(d)),
            )
            yield Case(
                **common,
                what="top-k of the student with a tail bucket, alpha 0, 0.5, 1",
                theirs=lambda x, p=peer, a=alpha: p.compute_topk_self_distillation_loss(
                    x,
                    d.teacher_NV,
                    distillation_topk=4,
                    distillation_alpha=a,
                    distillation_add_tail=True,
                ).sum(),
                ours=ours(jsd(alpha, support=Support.student_top_k, k=4), d, **supported(d, own)),
            )
        yield Case(
            peer="TRL",
            tests=f"test_{name}_trainer",
            what="sampled token, reverse KL",
            logits=d.student_NV,
            theirs=lambda x, p=peer: p.compute_sampled_token_self_distillation_loss(
                x, d.teacher_NV, d.target_N, distillation_alpha=1.0
            ).sum(),
            ours=ours(PolicyGradientLossConfig(surrogate=Surrogate.plain), d),
        )
        yield Case(
            peer="TRL",
            tests=f"test_{name}_trainer",
            what="importance-sampling clip, with the full-vocabulary divergence",
            logits=d.student_NV,
            theirs=lambda x, p=peer: p.apply_importance_sampling_clipping(
                p.compute_full_logit_self_distillation_loss(
                    x, d.teacher_NV, distillation_alpha=1.0
                ),
                d.logps(x),
                d.engine_N,
                1.1,
            ).sum(),
            ours=ours(jsd(1.0, correction=Correction.truncate, correction_cap=1.1), d, **full(d)),
        )


def trl_server_cases(d: Data) -> Iterator[Case]:
    ids = d.teacher_NV.topk(4).indices
    teacher = d.teacher_NV.log_softmax(-1).gather(1, ids)
    for test in ("server_distillation", "iw_opd"):
        peer = importlib.import_module(f"trl.experimental.{test}.{test}_trainer")
        for beta in (0.0, 0.5, 1.0):

            def theirs(x: Tensor, p: ModuleType = peer, b: float = beta) -> Tensor:
                valid = torch.ones_like(ids, dtype=torch.bool)
                student, mask = p._add_tail_bucket(x.log_softmax(-1).gather(1, ids), valid)
                return p._jsd_divergence(
                    student, p._add_tail_bucket(teacher, valid)[0], b, mask
                ).sum()

            yield Case(
                peer="TRL",
                tests=f"test_{test}_trainer",
                what="top-k of the teacher with a tail bucket, beta 0, 0.5, 1",
                logits=d.student_NV,
                theirs=theirs,
                ours=ours(jsd(beta, support=Support.teacher_top_k, k=4), d, **supported(d, ids)),
            )


def trl_iw_opd_cases(d: Data) -> Iterator[Case]:
    """On policy: the engine's log-probs are the learner's. Their weights are passed to ours."""
    trainer = importlib.import_module("trl.experimental.iw_opd.iw_opd_trainer").IWOPDTrainer
    d = replace(d, engine_N=d.logps(d.student_NV))
    inside_BT = d.mask_BT.bool()
    gap_BT = d.padded(d.logps(d.teacher_NV) - d.engine_N).abs()
    share_BT = (gap_BT.cumsum(1) - gap_BT) / gap_BT.sum(1, keepdim=True)
    labels_BT = d.padded(d.target_N.double()).long().masked_fill(~inside_BT, -100)
    for gamma in (0.0, 0.5):
        fake = SimpleNamespace(
            temperature=1.0,
            iw_opd_gamma=gamma,
            iw_opd_epsilon=1e-8,
            model=SimpleNamespace(training=True),
            _metrics={"train": defaultdict(list)},
        )

        def theirs(x: Tensor, fake: Any = fake) -> Tensor:
            wide = torch.zeros(2, 5, V, dtype=x.dtype)
            return trainer._compute_iw_opd_loss(
                fake,
                wide.masked_scatter(inside_BT[..., None], x),
                labels_BT.clamp(min=0),
                labels_BT,
                d.padded(d.logps(d.teacher_NV)),
                d.padded(d.engine_N),
                num_items_in_batch=1,
            )

        yield Case(
            peer="TRL",
            tests="test_iw_opd_trainer",
            what="IW-OPD on policy, gamma 0 and 0.5",
            logits=d.student_NV,
            theirs=theirs,
            ours=ours(
                PolicyGradientLossConfig(surrogate=Surrogate.plain),
                d,
                weight_N=(1 + gamma * (1 - share_BT))[inside_BT],
            ),
        )


def trl_grpo(d: Data, logits_NV: Tensor, loss_type: str, **settings: Any) -> Tensor:
    """GRPOTrainer's loss of these log-probs."""
    trainer = importlib.import_module("trl.trainer.grpo_trainer").GRPOTrainer
    beta = settings.pop("beta", 0.0)
    logps = d.padded(d.logps(logits_NV))
    counts = defaultdict(lambda: defaultdict(list))
    fake = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logps, logps.detach(), None),
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        accelerator=SimpleNamespace(
            num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x
        ),
        model=SimpleNamespace(training=True),
        loss_type=loss_type,
        beta=beta,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        epsilon_low=0.2,
        epsilon_high=0.28,
        use_vllm="importance_sampling_ratio" in settings,
        vllm_importance_sampling_correction=True,
        current_gradient_accumulation_steps=1,
        max_completion_length=5,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        _metrics=counts,
    )
    inputs = {
        "prompt_ids": torch.zeros(2, 1),
        "prompt_mask": torch.ones(2, 1),
        "completion_ids": torch.zeros(2, 5),
        "completion_mask": d.mask_BT,
        "advantages": d.advantage_B,
        "num_items_in_batch": d.mask_BT.sum(),
        "ref_per_token_logps": d.padded(d.logps(d.teacher_NV)),
        **settings,
    }
    return trainer._compute_loss(fake, None, inputs)


def trl_inlined(first: str, last: str, names: dict[str, Any]) -> dict[str, Any]:
    """Runs the lines of GRPOTrainer that score completions, from ``first`` to before ``last``."""
    trainer = importlib.import_module("trl.trainer.grpo_trainer")
    source = inspect.getsource(trainer.GRPOTrainer._generate_and_score_completions)
    start = source.index(first)
    start = source.rindex("\n", 0, start) + 1
    body = textwrap.dedent(source[start : source.index(last, start)].rsplit("\n", 1)[0])
    scope = {**vars(trainer), **names}
    exec(compile(body, "grpo_trainer", "exec"), scope)
    return scope


def trl_grpo_cases(d: Data) -> Iterator[Case]:
    reductions = {"grpo": "sequence", "bnpo": "token", "dapo": "token", "dr_grpo": "constant"}
    for loss_type, reduction in reductions.items():
        for beta in (0.0, 0.04):
            config = PolicyGradientLossConfig(
                teacher_weight=0.0, reward_weight=1.0, kl_coef=beta, clip_ratio_high=0.28
            )
            yield Case(
                peer="TRL",
                tests="test_grpo_trainer",
                what="GRPO, BNPO, DAPO, Dr. GRPO: clipped surrogate, beta 0 and 0.04",
                logits=d.student_NV,
                theirs=lambda x, t=loss_type, b=beta: trl_grpo(
                    d, x, t, beta=b, old_per_token_logps=d.padded(d.engine_N)
                ),
                ours=ours(config, d, weight_N=d.token_weights(reduction)),
            )


def trl_correction_cases(d: Data) -> Iterator[Case]:
    """The ratios are made by the trainer's own lines; beside them the loss is a plain policy gradient."""
    names = {
        "token_truncate": Correction.truncate,
        "token_mask": Correction.mask,
        "sequence_truncate": Correction.sequence_truncate,
        "sequence_mask": Correction.sequence_mask,
    }
    for mode, correction in names.items():
        ratio = trl_inlined(
            "per_token_logps_diff = (old_per_token_logps",
            "# Compute the per-token log probabilities for the reference model",
            {
                "self": SimpleNamespace(
                    vllm_importance_sampling_mode=mode,
                    vllm_importance_sampling_clip_min=0.8 if mode.endswith("mask") else None,
                    vllm_importance_sampling_clip_max=1.5,
                ),
                "mask": d.mask_BT,
                "old_per_token_logps": d.padded(d.logps(d.student_NV)),
                "sampling_per_token_logps": d.padded(d.engine_N),
            },
        )["vllm_importance_sampling_ratio"]
        yield Case(
            peer="TRL",
            tests="test_grpo_trainer",
            what="engine correction: token and sequence, truncate and mask",
            logits=d.student_NV,
            theirs=lambda x, r=ratio: trl_grpo(d, x, "dapo", importance_sampling_ratio=r),
            ours=ours(
                PolicyGradientLossConfig(
                    teacher_weight=0.0,
                    reward_weight=1.0,
                    surrogate=Surrogate.plain,
                    correction=correction,
                    correction_cap=1.5,
                    correction_min=0.8,
                    correction_max=1.5,
                ),
                d,
                weight_N=d.token_weights("token"),
            ),
            gradient_only=True,
        )


def scaled_advantages(rewards: Tensor) -> Tensor:
    """Our advantages of the rewards of one group."""
    group = rewards.tolist()
    scaled = [advantage(r, group, scale_rewards=True) for r in group]
    return torch.tensor(scaled, dtype=rewards.dtype)


def trl_advantage_cases(group: Tensor) -> Iterator[Case]:
    """Advantages as a function of the rewards [4] of a group; values only."""

    def theirs(x: Tensor) -> Tensor:
        names = {
            "self": SimpleNamespace(scale_rewards="group"),
            "rewards": x,
            "num_generations": 4,
            "mean_grouped_rewards": x.mean().repeat(4),
        }
        scored = trl_inlined('if self.scale_rewards in ["group", "none"]:', "is_std_zero =", names)
        return scored["advantages"]

    yield Case(
        peer="TRL",
        tests="test_grpo_trainer",
        what="advantages of a group, (r - mean) / (std + 1e-4)",
        logits=group,
        theirs=theirs,
        ours=scaled_advantages,
    )


CASES = (
    trl_jsd_cases,
    trl_self_distillation_cases,
    trl_server_cases,
    trl_iw_opd_cases,
    trl_grpo_cases,
    trl_correction_cases,
)
