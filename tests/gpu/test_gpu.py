"""What only a CUDA device can show: `pytest -m gpu tests/gpu`, on one card of 80 GB.

Most of it is one run of benchmarks/gpu.py, whose figures the tests look at.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from opd.batch import Batch
from opd.head import HeadSpec, as_operand, head_logits
from opd.losses.divergence import Divergence
from opd.train.chunked import chunked_loss
from tests.support.command import SMALL, environment, opd

pytestmark = pytest.mark.gpu
REPOSITORY = Path(__file__).parent.parent.parent
DTYPES = ("bfloat16", "float32")
GAPS = {"bfloat16": 0.05, "float32": 1e-3}
"""Mean gap of log-probs in nats between two implementations of one model of 28 layers."""


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


def test_a_bfloat16_head_gives_the_logits_of_its_float32_copy() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(64, 512).bfloat16()
    weight = torch.randn(1000, 512).bfloat16()
    operand = as_operand(weight.float(), torch.device("cuda"))
    assert operand.dtype == torch.bfloat16
    exact = hidden.double() @ weight.double().T
    for states in (hidden, hidden.float()):
        found = head_logits(states.cuda(), operand, 1000).cpu().double()
        assert float((found - exact).abs().max() / exact.abs().max()) < 1e-6


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


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Everything that benchmarks/gpu.py measures, in the shape of Qwen2.5-1.5B."""
    folder = tmp_path_factory.mktemp("gpu")
    script = REPOSITORY / "benchmarks" / "gpu.py"
    done = subprocess.run(
        [sys.executable, str(script), "--out", str(folder / "gpu.json"), "--minutes", "25"],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    print(done.stdout)
    return json.loads((folder / "gpu.json").read_text())


def part(figures: dict[str, Any], name: str, dtype: str) -> dict[str, Any]:
    found = figures[name][dtype]
    assert "error" not in found, found["error"]
    return found


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_teacher_server_scores_as_transformers_does(figures: dict[str, Any], dtype: str) -> None:
    assert part(figures, "teacher", dtype)["gap_mean"] < GAPS[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_engine_asleep_gives_its_memory_to_the_learner(
    figures: dict[str, Any], dtype: str
) -> None:
    found = part(figures, "engine", dtype)
    freed = found["used_awake_bytes"] - found["used_asleep_bytes"]
    assert freed > 2 * found["checkpoint_bytes"], "weights and cache are gone while it sleeps"


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_engine_computes_with_the_weights_of_the_last_push(
    figures: dict[str, Any], dtype: str
) -> None:
    found = part(figures, "engine", dtype)
    assert found["gap_mean"] < GAPS[dtype]
    assert found["moved_mean"] > 4 * found["gap_mean"], "the push changed nothing that shows"
    assert part(figures, "run", dtype)["gap_mean"] < GAPS[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_phase_of_a_run_is_measured(figures: dict[str, Any], dtype: str) -> None:
    found = part(figures, "run", dtype)
    assert found["peak_bytes"].keys() == {"start", "rollout", "teacher", "learn", "sync"}
    assert found["peak_bytes"]["learn"] > 0
    assert found["steps"]["learn_tflops"] > 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_resumed_run_is_as_near_as_a_second_run(figures: dict[str, Any], dtype: str) -> None:
    """Equal bits are promised on a CPU; here kernels round differently from run to run."""
    found = part(figures, "resume", dtype)
    noise = found["again"]["largest_difference"]
    learning_rate = 1e-4  # what a lost optimizer state would make in one step
    assert found["resumed"]["largest_difference"] <= max(4 * noise, learning_rate)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_loss_equals_ligers_where_it_is_installed(figures: dict[str, Any], dtype: str) -> None:
    found = part(figures, "loss", dtype)
    if isinstance(found["liger"], str):
        pytest.skip(found["liger"])
    assert found["opd"]["value"] == pytest.approx(found["liger"]["value"], rel=2e-2)
