"""What only a CUDA device can show: `pytest -m gpu tests/gpu`."""

import json
from pathlib import Path

import pytest
import torch

from opd.batch import Batch
from opd.head import HeadSpec
from opd.losses.divergence import Divergence
from opd.train.chunked import chunked_loss
from tests.support.command import SMALL, opd

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _needs_cuda() -> None:
    if not torch.cuda.is_available():
        pytest.fail("tests marked gpu need a CUDA device")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunked_loss_on_cuda_is_the_dense_one_in_float64(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tokens, width, vocab = 37, 64, 1000
    hidden = torch.randn(tokens, width).to(dtype)
    weight = (torch.randn(vocab, width) * 0.2).to(dtype)
    teacher = torch.log_softmax(torch.randn(tokens, vocab) * 2, -1)
    batch = Batch(
        input_ids_BT=torch.zeros(1, 1, dtype=torch.long),
        attention_mask_BT=torch.ones(1, 1, dtype=torch.long),
        positions_N=torch.arange(tokens),
        target_N=torch.randint(vocab, (tokens,)),
        engine_logp_N=torch.zeros(tokens),
        teacher_logp_NV=teacher,
    ).to(torch.device("cuda"))
    hidden_cuda = hidden.cuda().requires_grad_()
    weight_cuda = weight.cuda().requires_grad_()
    out = chunked_loss(
        hidden_cuda, weight_cuda, batch, Divergence(), HeadSpec(vocab_size=vocab), chunk=8
    )
    out.total.backward()
    exact_hidden = hidden.double().requires_grad_()
    logp = torch.log_softmax(exact_hidden @ weight.double().T, -1)
    total = (logp.exp() * (logp - teacher.double())).sum()
    total.backward()
    assert out.total.item() == pytest.approx(total.item(), rel=1e-4)
    assert exact_hidden.grad is not None
    assert hidden_cuda.grad is not None
    bound = 1e-4 if dtype == torch.float32 else 2e-2
    scale = exact_hidden.grad.abs().max()
    assert float((hidden_cuda.grad.cpu().double() - exact_hidden.grad).abs().max() / scale) < bound


@pytest.mark.parametrize(
    "stack",
    [
        ["rollout=transformers", "teacher=local", "launch.engine=torch"],
        ["rollout=vllm", "teacher=server", "zero=2"],
    ],
    ids=["without vllm and deepspeed", "vllm and deepspeed"],
)
def test_the_quickstart_learns_on_one_gpu_in_bf16(tmp_path: Path, stack: list[str]) -> None:
    done = opd(
        "train", "quickstart", *SMALL, *stack, "run.dir=run", "train.steps=20",
        "train.prompts_per_step=64", "train.precision=bf16", "launch.processes=1", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(r) for r in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    before, after = (row["eval/addition/reverse_kl"] for row in (rows[0], rows[-1]))
    assert after < 0.5 * before
