"""Time and memory of `opd analyze`, beside the paper's list of metrics computed naively.

Naive: whole matrices in float32 and five full decompositions for each, as scripts that compute one
metric after the other do (spectrum of D; projection; drift and rotation, two; coordinate masks).
Each side runs in a process of its own. "Above" is the highest anonymous resident memory (RssAnon,
read every 5 ms) over what the process held before; mapped files do not count. The trained model is
a copy of the base after a dense normal step of 3e-5 in bf16, unless one is named. --naive 2 measures
the naive side, and ours once more beside it, on the first two layers and what lies outside of layers.
"fast" is ours with spectrum=fast. On a busy machine compare CPU seconds, and set OMP_WAIT_POLICY=passive,
or waiting threads count as well.

    python benchmarks/analysis.py --model HuggingFaceTB/SmolLM2-135M-Instruct
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MIB = 1 << 20
SHARES = (0.01, 0.05, 0.1, 0.2)


def anonymous() -> int:
    """Bytes of anonymous memory that this process holds."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def watched(work: Callable[[], Any]) -> dict[str, float]:
    """Seconds, CPU seconds, and MiB above the start."""
    start, peak, done = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], anonymous())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    began, cpu = time.perf_counter(), time.process_time()
    work()
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    done.set()
    watcher.join()
    return {"seconds": seconds, "cpu": cpu, "mib": (max(peak[0], start) - start) / MIB}


def chosen(base: str, trained: str, layers: int) -> list[Any]:
    """Pairs of the first layers; all with 0."""
    from opd.analysis.pair import pair_checkpoints
    from opd.checkpoint.names import place

    pairs = pair_checkpoints(base, trained)
    return [p for p in pairs if not layers or (place(p.name).layer or 0) < layers]


def ours(base: str, trained: str, layers: int) -> None:
    """All metrics of all tensors, with their nulls."""
    from opd.analysis.summary import summarize
    from opd.analysis.walk import measure_pairs

    summarize([row for _, row in measure_pairs(chosen(base, trained, layers), {})])


def fast(base: str, trained: str, layers: int) -> None:
    """The same with spectrum=fast."""
    from opd.analysis.formatting import Spectrum
    from opd.analysis.summary import summarize
    from opd.analysis.walk import measure_pairs

    pairs = chosen(base, trained, layers)
    summarize([row for _, row in measure_pairs(pairs, {}, Spectrum.fast)])


def naive(base: str, trained: str, layers: int) -> None:
    """The paper's list, one metric after the other; no null."""
    for pair in chosen(base, trained, layers):
        w0, w1 = pair.base.read().bfloat16(), pair.trained.read().bfloat16()
        d, w0, w1 = (w1 - w0).float(), w0.float(), w1.float()
        norms_and_sparsity(w0, d)
        if w0.dim() == 2:
            for metric in (spectrum, projection, drift_and_rotation, coverage):
                metric(w0, w1, d)


def norms_and_sparsity(w0: Any, d: Any) -> list[float]:
    """Relative norm, sparsity at every threshold, energy of the top coordinates."""
    import torch

    size, energy = d.abs(), (d**2).sum()
    figures = [(d.norm() / w0.norm()).item()]
    figures += [(size < e).double().mean().item() for e in (0, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4)]
    rms = w0.pow(2).mean().sqrt()
    figures += [(size < e * rms).double().mean().item() for e in (1e-4, 1e-3, 1e-2)]
    for share in (0.001, 0.01, 0.05):
        top = torch.topk(d.flatten() ** 2, math.ceil(share * d.numel())).values
        figures.append((top.sum() / energy).item())
    return figures


def spectrum(w0: Any, w1: Any, d: Any) -> list[float]:
    """Energy shares and ranks of D."""
    import torch

    s = torch.linalg.svd(d, full_matrices=False).S
    p = s / s.sum()
    figures = [(s[:k] ** 2).sum().item() for k in (1, 2, 4, 8, 16, 32, 64)]
    figures += [(s > t * s[0]).sum().item() for t in (1e-6, 1e-5, 1e-4)]
    return [*figures, math.exp(-torch.xlogy(p, p).sum().item()), ((s**2).sum() / s[0] ** 2).item()]


def projection(w0: Any, w1: Any, d: Any) -> list[float]:
    """Energy of D in the principal directions of W0."""
    import torch

    u, _, v = torch.linalg.svd(w0, full_matrices=False)
    ranks = [max(1, math.floor(r * min(w0.shape))) for r in SHARES]
    return [((u[:, :k].T @ d @ v[:k].T) ** 2).sum().item() for k in ranks]


def drift_and_rotation(w0: Any, w1: Any, d: Any) -> list[float]:
    """How far singular values and left subspaces moved."""
    import torch

    (u0, s0, _), (u1, s1, _) = (torch.linalg.svd(w, full_matrices=False) for w in (w0, w1))
    figures = [((s1 - s0).norm() / s0.norm()).item()]
    for share in SHARES:
        k = max(1, math.floor(share * min(w0.shape)))
        cosines = torch.linalg.svdvals(u0[:, :k].double().T @ u1[:, :k].double())
        figures.append((1 - cosines**2).clamp(0).sqrt().mean().item())
    return figures


def coverage(w0: Any, w1: Any, d: Any) -> list[float]:
    """Share of the changes in the principal and the low-magnitude coordinates of W0."""
    import torch

    u, s, v = torch.linalg.svd(w0, full_matrices=False)
    figures = []
    for share in SHARES:
        k, n = max(1, math.floor(share * min(w0.shape))), math.ceil(share * w0.numel())
        rebuilt = ((u[:, :k] * s[:k]) @ v[:k]).abs().flatten()
        principal, low = (torch.zeros(w0.numel(), dtype=torch.bool) for _ in range(2))
        principal[torch.topk(rebuilt, n).indices] = True
        low[torch.topk(w0.abs().flatten(), n, largest=False).indices] = True
        for threshold in (0, 1e-5):
            changed = d.abs().flatten() > threshold
            for mask in (principal, low, principal & ~low, ~principal | low):
                figures.append(((mask & changed).sum() / changed.sum().clamp_min(1)).item())
    return figures


def step_taken(model: str, folder: Path) -> None:
    """A copy of a model after a dense normal step."""
    import torch
    from safetensors.torch import save_file

    from opd.checkpoint.tensors import open_checkpoint

    generator = torch.Generator().manual_seed(0)
    moved = {}
    for name, stored in open_checkpoint(model).items():
        weight = stored.read().float()
        moved[name] = (weight + 3e-5 * torch.randn(weight.shape, generator=generator)).bfloat16()
    save_file(moved, folder / "model.safetensors")


SIDES = {"ours": ours, "fast": fast, "naive": naive}


def largest_tensor(base: str, trained: str) -> float:
    """MiB of the largest tensor of the base, as stored."""
    pairs = chosen(base, trained, 0)
    return max(pair.numel * pair.base.dtype.itemsize for pair in pairs) / MIB


def apart(side: str, base: str, trained: str, layers: int) -> dict[str, float]:
    """One side in a process of its own; its line is printed."""
    command = [sys.executable, __file__, "--side", side, "--model", base]
    command += ["--trained", trained, "--layers", str(layers)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout)
    where = f"{layers} layers" if layers else "all"
    print(
        f"{side:6} {where:10} {found['seconds']:8.1f} s  {found['cpu']:8.1f} CPU s  "
        f"{found['mib']:7.0f} MiB above",
        flush=True,
    )
    return found


def main() -> None:
    """Print one line a side, and their ratio on the same tensors."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--trained", help="folder (default: a step is made)")
    parser.add_argument("--naive", type=int, default=0, metavar="N", help="on N layers; 0: all")
    parser.add_argument("--ours-only", action="store_true", help="leave the naive side out")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--layers", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        import opd.analysis.summary
        import opd.analysis.walk  # noqa: F401  (loaded before the clock starts)

        side = SIDES[arguments.side]
        print(
            json.dumps(watched(lambda: side(arguments.model, arguments.trained, arguments.layers)))
        )
        return
    with tempfile.TemporaryDirectory() as folder:
        if arguments.trained is None:
            step_taken(arguments.model, Path(folder))
        trained = arguments.trained or folder
        print(f"largest tensor, as stored: {largest_tensor(arguments.model, trained):.0f} MiB")
        mine = apart("ours", arguments.model, trained, 0)
        apart("fast", arguments.model, trained, 0)
        if arguments.ours_only:
            return
        if arguments.naive:
            mine = apart("ours", arguments.model, trained, arguments.naive)
        theirs = apart("naive", arguments.model, trained, arguments.naive)
    print(f"naive / ours: {theirs['seconds'] / mine['seconds']:.1f}x", end=", ")
    print(f"{theirs['cpu'] / mine['cpu']:.1f}x in CPU seconds")


if __name__ == "__main__":
    main()
