"""Time and memory of finding a mask, rule by rule.

Each rule runs in a process of its own. "Above" is the highest anonymous resident memory (RssAnon,
read every 5 ms) over what the process held before the search; files that are mapped do not count.
The trained model of rule=delta is a copy of the base after a dense random step, made first.

    python benchmarks/mask_discovery.py --model HuggingFaceTB/SmolLM2-135M-Instruct
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

MIB = 1 << 20
CASES: dict[str, dict[str, str | float]] = {
    "delta, threshold": {"rule": "delta", "trained": "TRAINED", "threshold": 1e-5},
    "delta": {"rule": "delta", "trained": "TRAINED", "density": 0.1},
    "near_zero": {"rule": "near_zero", "density": 0.1},
    "near_zero, tensor": {"rule": "near_zero", "density": 0.1, "budget": "tensor"},
    "random": {"rule": "random", "density": 0.1},
    "magnitude_matched": {"rule": "magnitude_matched", "like": "LIKE"},
    "safe": {"rule": "safe", "density": 0.1},
    "near_zero, rows": {"rule": "near_zero", "density": 0.1, "structure": "rows"},
}


def anonymous() -> int:
    """Bytes of anonymous memory that this process holds."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def measure(model: str, settings: dict[str, str | float], out: str) -> dict[str, float]:
    """Seconds, CPU seconds, MiB above the start, and kept weights of one discovery."""
    from opd.checkpoint.tensors import open_checkpoint
    from opd.config.arguments import parse_arguments
    from opd.config.mask import RuleConfig
    from opd.mask.discover import discover_mask
    from opd.mask.mask import Mask

    rule = parse_arguments(RuleConfig, [f"{key}={value}" for key, value in settings.items()])
    base = open_checkpoint(model)
    like = None if rule.like is None else Mask.read(rule.like)
    start, peak, done = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], anonymous())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    began, cpu = time.perf_counter(), time.process_time()
    summary = discover_mask(base, rule, Path(out), like=like)
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    done.set()
    watcher.join()
    return {
        "seconds": seconds,
        "cpu": cpu,
        "mib": (max(peak[0], start) - start) / MIB,
        "kept": summary.kept,
        "numel": summary.numel,
    }


def step_taken(model: str, folder: Path, scale: float) -> None:
    """A copy of a model after a dense normal step."""
    import torch
    from safetensors.torch import save_file

    from opd.checkpoint.tensors import open_checkpoint

    generator = torch.Generator().manual_seed(0)
    moved = {}
    for name, stored in open_checkpoint(model).items():
        weight = stored.read()
        step = scale * torch.randn(weight.shape, generator=generator)
        moved[name] = (weight.float() + step).to(weight.dtype)
    folder.mkdir()
    save_file(moved, folder / "model.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--scale", type=float, default=3e-5, help="size of the random step")
    parser.add_argument("--out", help="JSON file for the figures")
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    if parsed.case:
        settings, out = parsed.case
        print(json.dumps(measure(parsed.model, json.loads(settings), out)))
        return

    from opd.checkpoint.tensors import open_checkpoint

    base = open_checkpoint(parsed.model)
    largest = max(stored.numel * stored.dtype.itemsize for stored in base.values()) / MIB
    print(f"{parsed.model}: {base.numel:,} weights, largest tensor {largest:.0f} MiB\n")
    print(
        "| rule | s | CPU s | MiB above | x largest tensor | density |\n|---|---:|---:|---:|---:|---:|"
    )
    figures = {}
    with tempfile.TemporaryDirectory() as scratch:
        step_taken(parsed.model, Path(scratch) / "trained", parsed.scale)
        for name, settings in CASES.items():
            places = {"TRAINED": f"{scratch}/trained", "LIKE": f"{scratch}/delta"}
            given = {key: places.get(str(value), value) for key, value in settings.items()}
            command = [sys.executable, __file__, "--model", parsed.model]
            case = ["--case", json.dumps(given), f"{scratch}/{name}"]
            done = subprocess.run([*command, *case], check=True, capture_output=True, text=True)
            found = figures[name] = json.loads(done.stdout.splitlines()[-1])
            print(
                f"| {name} | {found['seconds']:.1f} | {found['cpu']:.1f} | {found['mib']:.0f} | "
                f"{found['mib'] / largest:.2f} | {found['kept'] / found['numel']:.4%} |"
            )
    if parsed.out:
        Path(parsed.out).write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
