"""Peak memory and time of the head and its loss: chunked against the plain way.

Reverse KL over the full vocabulary from the teacher's hidden states, forward and backward. The
plain way makes the logits of all tokens at once and leaves the rest to autograd. Each case runs in
a process of its own; "above" is its peak over parameters, hidden states and their gradients:
ru_maxrss on CPU, torch.cuda.max_memory_allocated with CUDA.

    python benchmarks/learner_memory.py --out learner_memory.json
"""

import argparse
import json
import math
import resource
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

WAYS = ("plain", "chunked")
MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One measurement: which way, over how many ids and tokens, in what dtype."""

    way: str
    vocab: int
    tokens: int
    width: int
    dtype: str
    device: str

    @property
    def plain_bytes(self) -> int:
        """A forecast of the plain way's peak: about seven float32 [N, V] tensors."""
        return 7 * 4 * self.tokens * self.vocab


def measure(case: Case) -> dict[str, float]:
    """Peak MiB above parameters and gradients, seconds of forward and backward, and the loss."""
    import torch

    from opd.batch import Batch
    from opd.head import HeadSpec, head_logps
    from opd.losses.divergence import Divergence
    from opd.train.chunked import chunked_loss

    torch.manual_seed(0)
    device, dtype = torch.device(case.device), getattr(torch, case.dtype)

    def random(rows: int) -> torch.Tensor:
        return torch.empty(rows, case.width, device=device, dtype=dtype).normal_(std=0.3)

    hidden, weight = random(case.tokens).requires_grad_(), random(case.vocab).requires_grad_()
    teacher_hidden, teacher_head = random(case.tokens), random(case.vocab)
    zeros = torch.zeros(case.tokens, dtype=torch.int64, device=device)
    batch = Batch(
        input_ids_BT=zeros[None],
        attention_mask_BT=zeros[None],
        positions_N=zeros,
        target_N=zeros,
        engine_logp_N=zeros.float(),
        teacher_hidden_ND=teacher_hidden,
    )
    spec, loss = HeadSpec(vocab_size=case.vocab), Divergence()

    def chunked(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return chunked_loss(h, w, batch, loss, spec, teacher_head_VD=teacher_head).total

    def plain(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        student = torch.log_softmax(torch.nn.functional.linear(h, w).float(), dim=-1)
        teacher = head_logps(teacher_hidden, teacher_head, spec)
        return (student.exp() * (student - teacher)).sum()

    run = {"chunked": chunked, "plain": plain}[case.way]
    with torch.enable_grad():
        small = random(64).requires_grad_()  # first calls: libraries load, buffers are made
        torch.nn.functional.linear(small, small).log_softmax(-1).sum().backward()
    gradients = sum(x.numel() * x.element_size() for x in (hidden, weight))
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    began = time.perf_counter()
    total = run(hidden, weight)
    total.backward()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "above_mib": (peak - before - gradients) / MIB,
        "parameters_and_gradients_mib": (before + gradients) / MIB,
        "seconds": seconds,
        "loss_per_token": total.item() / case.tokens,
    }


def measure_apart(case: Case) -> dict[str, float]:
    """``measure`` in a fresh process; this one stays small, for a child inherits its peak."""
    command = [sys.executable, __file__, "--case", json.dumps(asdict(case))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{case} failed:\n{done.stderr}")
    return json.loads(done.stdout)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=896, help="hidden width (default 896)")
    parser.add_argument("--vocab", type=int, default=151_936, help="ids of the token sweep")
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[512, 1024, 2048], help="token sweep"
    )
    parser.add_argument(
        "--vocabs", type=int, nargs="*", default=[8192, 32_768], help="ids of the vocabulary sweep"
    )
    parser.add_argument(
        "--vocab-tokens", type=int, default=1024, help="tokens of the vocabulary sweep"
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--limit-gib",
        type=float,
        default=5.0,
        help="skip the plain way where its forecast is larger (default 5)",
    )
    parser.add_argument("--out", type=Path, help="write all figures to this JSON file")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Run every case, print a table, write JSON."""
    args = parse()
    if args.case:
        print(json.dumps(measure(Case(**json.loads(args.case)))))
        return
    sizes = [(args.vocab, tokens) for tokens in args.tokens]
    sizes += [(vocab, args.vocab_tokens) for vocab in args.vocabs]
    print(f"width {args.width}, {args.dtype}, {args.device}; MiB above parameters and gradients")
    print(f"{'vocab':>8} {'tokens':>7} | {'plain':>8} {'s':>6} | {'chunked':>8} {'s':>6} | less by")
    rows = []
    for vocab, tokens in sizes:
        found: dict[str, dict[str, float]] = {}
        for way in WAYS:
            case = Case(
                way=way,
                vocab=vocab,
                tokens=tokens,
                width=args.width,
                dtype=args.dtype,
                device=args.device,
            )
            if way == "chunked" or case.plain_bytes <= args.limit_gib * 2**30:
                found[way] = measure_apart(case)
                rows.append(asdict(case) | found[way])
        print(line(vocab, tokens, found), flush=True)
    if args.out:
        args.out.write_text(json.dumps(rows, indent=2) + "\n")


def line(vocab: int, tokens: int, found: dict[str, dict[str, float]]) -> str:
    """One row of the table; the plain way is a dash where it was skipped."""
    chunked = found["chunked"]
    cells = f"{chunked['above_mib']:8.0f} {chunked['seconds']:6.1f}"
    if "plain" not in found:
        return f"{vocab:8d} {tokens:7d} | {'-':>8} {'-':>6} | {cells} |"
    plain = found["plain"]
    if not math.isclose(plain["loss_per_token"], chunked["loss_per_token"], rel_tol=0.02):
        raise SystemExit(f"the two ways disagree: {found}")
    ratio = plain["above_mib"] / max(chunked["above_mib"], 1.0)
    left = f"{plain['above_mib']:8.0f} {plain['seconds']:6.1f}"
    return f"{vocab:8d} {tokens:7d} | {left} | {cells} | {ratio:5.1f}x"


if __name__ == "__main__":
    main()
