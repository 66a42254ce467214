"""Peak memory of a training process, measured in a real run, beside the forecast of `opd plan`.

Builds a model of about 100 million random weights, trains it for a few steps in each configuration on a
CPU, and reads the peak resident memory of each rank (VmHWM). --libraries measures the constant that the
forecast adds for the interpreter and its libraries.

    python benchmarks/plan_accuracy.py --out plan_accuracy.json
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
QUICKSTART = REPOSITORY / "recipes" / "quickstart"
MIB = 1 << 20
BOUND = 0.15
PROMPT_TOKENS = 10
SHAPE = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "vocab_size": 32_000,
    "tie_word_embeddings": True,
}
COMMON = [
    "teacher=local",
    "rollout=transformers",
    "data.eval=null",
    "rollout.max_tokens=32",
    "train.steps=2",
    "train.prompts_per_step=16",
    "train.max_tokens_per_micro_batch=336",
    "train.chunk_mib=32",
    "save.every=0",
    "sync.verify_every=0",
    "optim.lr=1e-5",
]
TORCH = ["launch.engine=torch", "launch.processes=1"]
CASES = {
    "dense AdamW, fp32": TORCH,
    "mask of density 0.05, AdamW, fp32": [
        *TORCH,
        "mask=discover",
        "mask.rule=random",
        "mask.density=0.05",
    ],
    "dense AdamW, bf16, ZeRO-2 on 2 ranks": [
        "launch.processes=2",
        "zero=2",
        "train.precision=bf16",
    ],
    "LoRA r=16, AdamW, fp32": [*TORCH, "adapter=lora"],
    "dense SGD, fp32, gradient checkpointing": [
        *TORCH,
        "optim=sgd",
        "train.gradient_checkpointing=true",
    ],
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One configuration: bytes of the largest rank, forecast and measured."""

    case: str
    planned: int
    measured: int
    phase: str

    @property
    def error(self) -> float:
        return self.planned / self.measured - 1


def make_model(folder: Path, seed: int) -> None:
    """A Qwen2 model of random weights with the tokenizer of the quickstart."""
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    config = Qwen2Config(**SHAPE, max_position_embeddings=1024)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(QUICKSTART / "student").save_pretrained(folder)


def peak_of(pid: int) -> int:
    """Bytes of the peak resident memory of a process; 0 when it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM")), 0)


def workers(parent: int) -> list[int]:
    """The training processes below a command."""
    listed = subprocess.run(
        ["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True, check=True
    )
    found = [line.split(None, 2) for line in listed.stdout.splitlines()]
    return [
        int(pid) for pid, above, args in found if int(above) == parent and "opd.run.worker" in args
    ]


def measure(settings: list[str], folder: Path) -> int:
    """The peak of the largest rank of a run."""
    command = [sys.executable, "-m", "opd.cli.main", "train", "quickstart", *settings]
    log = folder / "train.log"
    with log.open("w") as out:
        run = subprocess.Popen([*command, f"run.dir={folder}/run"], stdout=out, stderr=out)
    peaks: dict[int, int] = {}
    while run.poll() is None:
        for pid in workers(run.pid):
            peaks[pid] = max(peaks.get(pid, 0), peak_of(pid))
        time.sleep(0.1)
    if run.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{log.read_text()[-3000:]}")
    return max(peaks.values())


def libraries(more: str) -> int:
    """Peak of a training process that has loaded its libraries, ``more`` included, and no model."""
    code = (
        f"{more}; "
        "import opd.run.worker, peft, accelerate, deepspeed; "
        "from transformers import AutoModelForCausalLM, Qwen2ForCausalLM; "
        "import torch; a = torch.randn(512, 512, requires_grad=True); (a @ a).sum().backward(); "
        "torch.optim.AdamW([a]).step(); "
        "print(next(l.split()[1] for l in open('/proc/self/status') if l.startswith('VmHWM')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    )
    return int(done.stdout.split()[-1]) << 10


def table(rows: list[Row]) -> str:
    """The rows as Markdown."""
    lines = ["| configuration | planned | measured | difference |", "|---|---|---|---|"]
    lines += [
        f"| {r.case} | {r.planned / MIB:.0f} MiB ({r.phase}) | {r.measured / MIB:.0f} MiB | "
        f"{r.error:+.1%} |"
        for r in rows
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure every case, print the table, and fail where one is beyond the bound."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", nargs="*", default=list(CASES), help="some of the cases")
    parser.add_argument("--libraries", action="store_true", help="measure the constant and stop")
    parser.add_argument("--out", type=Path, help="write all figures to this JSON file")
    args = parser.parse_args()
    if args.libraries:
        vllm = "from vllm import LLM; import vllm.v1.worker.cpu_worker"
        without, with_vllm = libraries("pass"), libraries(vllm)
        print(
            f"interpreter and libraries: {without / MIB:.0f} MiB; with vLLM {with_vllm / MIB:.0f} MiB"
        )
        return
    from opd.run.placement import Cards
    from opd.run.plan import make_plan

    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder / "student", seed=0)
        make_model(folder / "teacher", seed=1)
        models = [f"student.model={folder}/student", f"teacher.model={folder}/teacher"]
        for number, case in enumerate(args.case):
            settings = [*COMMON, *models, *CASES[case]]
            run = folder / str(number)
            run.mkdir()
            measured = measure(settings, run)
            plan = make_plan(
                "quickstart", settings, cards=Cards(count=0), prompt_tokens=PROMPT_TOKENS
            )
            rank = max((f.devices[0] for f in plan.forecasts), key=lambda device: device.peak)
            rows.append(Row(case=case, planned=rank.peak, measured=measured, phase=rank.worst))
            print(table(rows[-1:]).splitlines()[-1], flush=True)
    print(table(rows))
    if args.out:
        args.out.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    if any(abs(row.error) > BOUND for row in rows):
        raise SystemExit(f"a forecast is more than {BOUND:.0%} from what was measured")


if __name__ == "__main__":
    main()
