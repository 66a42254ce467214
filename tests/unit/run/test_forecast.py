"""Formulas against what torch, transformers and the losses do, and against arithmetic done by hand."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from opd.batch import Batch
from opd.config.loss import DivergenceLossConfig, LossConfig, PolicyGradientLossConfig, Support
from opd.config.train import Precision
from opd.head import HeadSpec
from opd.losses.divergence import Divergence
from opd.losses.policy_gradient import PolicyGradient
from opd.run.forecast import learner, moments
from opd.run.forecast.cards import overflows
from opd.run.forecast.gpus import GIB, cards_named, find_gpu
from opd.run.forecast.rank import Phase
from opd.run.forecast.seconds import hidden_state_bytes
from opd.run.forecast.setup import TrainingSetup, Work
from opd.run.model_facts import ModelFacts, read_facts
from opd.run.placement import Cards
from opd.run.plan import Plan, make_plan
from opd.train.chunked import chunked_loss
from opd.types import DivergenceKind

TOKENS, VOCAB, WIDTH = 48, 4096, 32


def plan(recipe: str, *overrides: str, gpus: int, gpu: str = "H100") -> Plan:
    return make_plan(recipe, overrides, cards=cards_named(gpu, gpus, 1), prompt_tokens=256)


def gib(plan: Plan, phase: Phase, term: str, device: int = 0) -> float:
    return plan.forecasts[0].devices[device].phases[phase][term] / GIB


def a_learner(facts: ModelFacts, **changes: Any) -> TrainingSetup:
    plain = TrainingSetup(
        facts=facts,
        trained=facts.parameters,
        compact=0,
        restored=0,
        head_trained=True,
        ranks=1,
        cuda=False,
        zero=None,
        precision=Precision.fp32,
        states=2,
        decays=False,
        offload_states=False,
        offload_weights=False,
        bucket=500_000_000,
        overlap=False,
        checkpointing=False,
        eager=False,
        chunk_bytes=256 << 20,
        work=Work(sequences=2, width=64, rows=2, targets=64),
    )
    return replace(plain, **changes)


class LiveBlocks(TorchDispatchMode):
    """Counts storages of at least ``size`` bytes that are alive after an operation; ``most`` at once."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.most = 0
        self._seen: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage.nbytes() >= self.size:
                    self._seen[storage._cdata] = StorageWeakRef(storage)
        alive = [ref for ref in self._seen.values() if not ref.expired()]
        self.most = max(self.most, len(alive))
        return out


LOSSES: list[tuple[LossConfig, Any]] = [
    *((DivergenceLossConfig(kind=kind), Divergence) for kind in DivergenceKind),
    (DivergenceLossConfig(support=Support.teacher_top_k, k=4), Divergence),
    (PolicyGradientLossConfig(), PolicyGradient),
]


@pytest.mark.parametrize(
    ("config", "loss"), LOSSES, ids=lambda each: str(getattr(each, "kind", ""))
)
def test_the_loss_holds_as_many_blocks_at_once_as_are_counted(
    config: LossConfig, loss: Any
) -> None:
    torch.manual_seed(0)
    full = isinstance(config, DivergenceLossConfig) and config.support == Support.full
    zeros = torch.zeros(TOKENS, dtype=torch.int64)
    support = torch.arange(4).expand(TOKENS, 4)
    batch = Batch(
        input_ids_BT=zeros[None],
        attention_mask_BT=zeros[None],
        positions_N=zeros,
        target_N=zeros,
        engine_logp_N=torch.full((TOKENS,), -8.0),
        teacher_logp_N=torch.full((TOKENS,), -8.0),
        teacher_hidden_ND=torch.randn(TOKENS, WIDTH) if full else None,
        support_ids_NK=None if full else support,
        support_logp_NK=None if full else torch.full((TOKENS, 4), -8.0),
        support_tail_N=None if full else torch.full((TOKENS,), -0.002),
    )
    hidden = torch.randn(TOKENS, WIDTH, requires_grad=True)
    head = torch.randn(VOCAB, WIDTH, requires_grad=True)
    with LiveBlocks(4 * TOKENS * VOCAB) as live:
        chunked_loss(
            hidden,
            head,
            batch,
            loss(config),
            HeadSpec(vocab_size=VOCAB),
            teacher_head_VD=torch.randn(VOCAB, WIDTH),
        )
    assert live.most == moments.count_blocks(config, full)


MODELS = [(Qwen2Config, Qwen2ForCausalLM), (Qwen3Config, Qwen3ForCausalLM)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kinds", MODELS, ids=["qwen2", "qwen3"])
def test_a_layer_saves_as_many_bytes_for_its_backward_pass_as_the_formula_says(
    kinds: tuple[Any, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    """Two depths differ by one layer; padding makes the attention mask that training has."""

    def saved(layers: int) -> tuple[int, ModelFacts]:
        config = kinds[0](
            hidden_size=64,
            intermediate_size=160,
            num_hidden_layers=layers,
            num_attention_heads=8,
            num_key_value_heads=2,
            head_dim=8,
            vocab_size=128,
        )
        model = kinds[1](config).to(dtype)
        owned = {p.untyped_storage().data_ptr() for p in model.parameters()}
        sizes: dict[int, int] = {}
        kept: list[torch.Tensor] = []

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in owned and tensor.is_floating_point():
                sizes[storage.data_ptr()] = storage.nbytes()
                kept.append(tensor)  # so that no other tensor gets its address
            return tensor

        mask = torch.ones(2, 64, dtype=torch.int64)
        mask[1, 40:] = 0
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model.base_model(
                input_ids=torch.zeros(2, 64, dtype=torch.int64),
                attention_mask=mask,
                use_cache=False,
            )
        config.save_pretrained(tmp_path / str(layers))
        return sum(sizes.values()), read_facts(str(tmp_path / str(layers)))

    (two, facts), (one, _) = saved(2), saved(1)
    precision = Precision.fp32 if dtype == torch.float32 else Precision.bf16
    formula = moments.layer_activations(
        a_learner(facts, precision=precision, zero=None if dtype == torch.float32 else 2)
    )
    assert (two - one) / (2 * 64) == pytest.approx(formula, rel=0.1)


def test_the_two_gpu_recipe_reproduces_the_arithmetic_that_was_done_by_hand() -> None:
    shared = plan(
        "qwen2.5_1.5b_gsm8k",
        "teacher.gpu_memory_utilization=0.45",
        "teacher.tensor_parallel_size=1",
        "rollout.gpu_memory_utilization=0.35",
        gpus=2,
    )
    rank = shared.forecasts[0].devices[1].phases[Phase.score]
    held = ("weights", "fp32 masters", "optimizer states", "teacher's head (learner)")
    assert gib(shared, Phase.rollout, "teacher") == pytest.approx(35.7, rel=0.1)
    assert gib(shared, Phase.rollout, "teacher's head (server)") == pytest.approx(2.0, rel=0.1)
    assert gib(shared, Phase.rollout, "engine") == pytest.approx(27.8, rel=0.1)
    assert sum(rank[name] for name in held) / GIB == pytest.approx(13.5, rel=0.1)
    together = shared.forecasts[0].devices[0].total(Phase.rollout) / GIB
    assert together == pytest.approx(81, rel=0.02)
    assert len(shared.too_small) == 1
    assert "GPU 0 needs" in shared.too_small[0]


def test_what_leaves_a_teacher_s_engine_reproduces_the_arithmetic_that_was_done_by_hand() -> None:
    small, large = read_facts("Qwen/Qwen3-4B"), read_facts("Qwen/Qwen3-32B")
    assert hidden_state_bytes(1_050_000, small) / 1e9 == pytest.approx(10.7, rel=0.1)
    assert hidden_state_bytes(4_200_000, large) / 1e9 == pytest.approx(86, rel=0.1)
    head = learner.teacher_head_copy(large.vocab, large.hidden)
    assert head / 1e9 == pytest.approx(3.1, rel=0.1)
    sent = plan("qwen3_1.7b_dapo_math", gpus=8).sent
    assert sent["hidden states out of the teacher's engine in a step"] / 1e9 == pytest.approx(
        10.7, rel=0.1
    )


def test_seconds_of_the_eight_gpu_recipe_reproduce_the_estimate_that_was_made_by_hand() -> None:
    found = plan("qwen3_1.7b_dapo_math", gpus=8)
    assert found.seconds[Phase.rollout].seconds == pytest.approx(45, rel=0.1)
    assert found.seconds[Phase.score].seconds == pytest.approx(57, rel=0.1)
    assert found.seconds[Phase.score].parts["teacher's head"] == pytest.approx(18, rel=0.1)
    assert found.bound == Phase.score


def test_the_two_gpu_recipe_fits_and_says_by_how_much() -> None:
    found = plan("qwen2.5_1.5b_gsm8k", gpus=2)
    assert found.too_small == ()
    tightest = min(device.spare for device in found.forecasts[0].devices)
    assert tightest > 5 * GIB


def test_stages_divide_what_their_name_says() -> None:
    facts = read_facts("Qwen/Qwen2.5-1.5B")
    P, ranks = facts.parameters, 8

    def held(zero: int) -> dict[str, int]:
        return learner.resident(
            a_learner(facts, zero=zero, ranks=ranks, precision=Precision.bf16, cuda=True)
        )

    one, two, three = held(1), held(2), held(3)
    assert one["weights"] == two["weights"] == 2 * P
    assert three["weights"] == pytest.approx(2 * P / ranks, rel=1e-6)
    for stage in (one, two, three):
        assert stage["fp32 masters"] == pytest.approx(4 * P / ranks, rel=1e-6)
        assert stage["optimizer states"] == pytest.approx(8 * P / ranks, rel=1e-6)
    assert (one["gradients"], two["gradients"]) == (6 * P, 0)


def test_a_mask_makes_masters_and_states_as_small_as_its_density() -> None:
    facts = read_facts("Qwen/Qwen2.5-1.5B")
    kept = facts.parameters // 20
    dense = learner.resident(a_learner(facts, zero=2, precision=Precision.bf16))
    masked = learner.resident(
        a_learner(facts, zero=2, precision=Precision.bf16, trained=kept, compact=kept)
    )
    for term in ("fp32 masters", "optimizer states"):
        assert masked[term] == pytest.approx(dense[term] / 20, rel=1e-3)
    assert masked["mask: indices and values"] == (4 + 2) * kept
    assert masked["weights"] == dense["weights"]


def test_checkpointing_and_smaller_chunks_need_less() -> None:
    facts = read_facts("Qwen/Qwen2.5-1.5B")
    work = Work(sequences=8, width=1024, rows=8, targets=4096)
    plain = a_learner(facts, zero=2, precision=Precision.bf16, cuda=True, work=work)
    checked = replace(plain, checkpointing=True)
    assert moments.activations(checked) < moments.activations(plain) / 10
    small = replace(plain, chunk_bytes=64 << 20)
    saved = moments.loss_blocks(plain, 4, facts.vocab) - moments.loss_blocks(small, 4, facts.vocab)
    assert saved == pytest.approx(4 * (192 << 20), rel=0.01)


def test_a_share_that_holds_no_weights_is_refused_with_the_setting_that_helps() -> None:
    found = plan(
        "qwen3_1.7b_dapo_math",
        "teacher.model=Qwen/Qwen3-32B",
        "teacher.gpu_memory_utilization=0.45",
        "teacher.tensor_parallel_size=1",
        gpus=8,
    )
    assert any(
        "the teacher Qwen/Qwen3-32B gets" in each and "raise teacher.gpu_memory" in each
        for each in found.too_small
    )


def test_cards_of_unknown_memory_are_never_too_small() -> None:
    found = make_plan("paper_opd_k1", [], cards=Cards(count=8), prompt_tokens=256)
    assert found.too_small == ()
    assert overflows(found.forecasts[0], Cards(count=8)) == []


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("h200", "H200"),
        ("NVIDIA A100-SXM4-40GB", "A100-40"),
        ("NVIDIA A100 80GB PCIe", "A100-80"),
        ("NVIDIA GeForce RTX 4090", "RTX4090"),
    ],
)
def test_a_card_is_found_by_the_name_that_its_driver_gives(name: str, known: str) -> None:
    assert find_gpu(name)[0] == known


def test_an_unknown_card_is_refused_with_the_names_that_are_known() -> None:
    with pytest.raises(
        ValueError, match="gpu=K80 is not in the table of GPUs: allowed are A100-40"
    ):
        find_gpu("K80")
