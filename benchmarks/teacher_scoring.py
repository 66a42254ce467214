"""Scoring sequences with a teacher: opd's server against vLLM's prompt_logprobs.

The same engine, model, precision and sequences. opd: over HTTP from another process, numpy arrays
at the end. The peers get vLLM in this process, no HTTP, and end in numpy arrays too: plain (a
dictionary of objects per token) and flat (flat_logprobs=True). "full" requests the whole
vocabulary: opd sends hidden states for the caller's chunked head ("full hidden"), or, beside it,
all the log-probs ("full logps"). A case runs on as many of the sequences as fit into --budget
seconds, best of three. CPU time is that of the scoring process tree and of the caller, so the rate
per CPU second holds on a busy machine too. Memory is the resident peak of the scoring process tree
above what it held when loaded.

    python benchmarks/teacher_scoring.py --out teacher_scoring.json
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

WAYS = ("opd", "flat", "plain")
MIB = 1 << 20
KV_BYTES = 256 << 20
Score = Callable[[int], None]  # scores the first n sequences


def main() -> None:
    """Run every way in a process of its own and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="checkpoint; default: 2 random layers, 256 wide")
    parser.add_argument("--vocab", type=int, default=2048, help="of that model (default: 2048)")
    parser.add_argument("--sequences", type=int, default=64, help="how many (default: 64)")
    parser.add_argument("--tokens", type=int, default=160, help="of each sequence (default: 160)")
    parser.add_argument("--budget", type=float, default=15.0, help="seconds a case (default: 15)")
    parser.add_argument("--threads", type=int, default=1, help="OMP_NUM_THREADS (default: 1)")
    parser.add_argument("--k", type=int, nargs="+", default=[1, 20, 100], help="sizes of top-k")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        print(json.dumps(measure(arguments)))
        return
    with tempfile.TemporaryDirectory() as folder:
        if arguments.model is None:
            arguments.model = folder
            build_model(folder, arguments.vocab)
        rows = [row for way in WAYS for row in run_way(way, arguments)]
    print(table(rows))
    if arguments.out:
        arguments.out.write_text(json.dumps(rows, indent=1) + "\n")


def run_way(way: str, arguments: argparse.Namespace) -> list[dict]:
    """One way's rows, measured in a fresh process; a way that fails is reported and left out."""
    command = [sys.executable, __file__, "--way", way, "--model", arguments.model]
    for name in ("sequences", "tokens", "budget", "threads"):
        command += [f"--{name}", str(vars(arguments)[name])]
    command += ["--k", *map(str, arguments.k)]
    quiet = {
        "OMP_NUM_THREADS": str(arguments.threads),
        "VLLM_LOGGING_LEVEL": "ERROR",
        "TORCHDYNAMO_DISABLE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    print(f"measuring {way} ...", file=sys.stderr)
    done = subprocess.run(command, env=os.environ | quiet, capture_output=True, text=True)
    if done.returncode:
        print(f"{way} failed:\n{done.stderr[-2000:]}", file=sys.stderr)
        return []
    return json.loads(done.stdout.splitlines()[-1])


def measure(arguments: argparse.Namespace) -> list[dict]:
    """Rate and memory of one way for every case."""
    from transformers import AutoConfig

    vocab = AutoConfig.from_pretrained(arguments.model).get_text_config().vocab_size
    random = np.random.default_rng(0)
    shape = (arguments.sequences, arguments.tokens)
    ids = random.integers(0, vocab, shape).astype(np.int32)
    rows = []
    with (
        opd_cases(arguments, ids) if arguments.way == "opd" else vllm_cases(arguments, ids) as (
            pid,
            cases,
        )
    ):
        cases["top 1"](1)  # first-call costs
        loaded = resident(pid)
        for case, score in cases.items():
            with watch_peak(pid) as peak:
                count, seconds, cpu = timed(score, arguments, pid)
            tokens = count * (arguments.tokens - 1)
            rows.append(
                {
                    "way": arguments.way,
                    "case": case,
                    "sequences": count,
                    "seconds": round(seconds, 3),
                    "tokens_per_second": round(tokens / seconds, 1),
                    "tokens_per_cpu_second": round(tokens / cpu, 1),
                    "mib_above_loaded": round((peak() - loaded) / MIB, 1),
                    "mib_loaded": round(loaded / MIB, 1),
                }
            )
    return rows


def timed(score: Score, arguments: argparse.Namespace, pid: int) -> tuple[int, float, float]:
    """Sequences, seconds and CPU seconds: best of three, on what the budget allows."""
    started = time.perf_counter()
    score(2)
    each = (time.perf_counter() - started) / 2
    count = max(2, min(arguments.sequences, int(arguments.budget / each)))
    best, best_cpu, spent = float("inf"), float("inf"), 0.0
    for _ in range(3):
        started, worked = time.perf_counter(), cpu_seconds(pid)
        score(count)
        seconds = time.perf_counter() - started
        best, best_cpu = min(best, seconds), min(best_cpu, cpu_seconds(pid) - worked)
        spent += seconds
        if spent > arguments.budget / 2:
            break
    return count, best, best_cpu


@contextmanager
def opd_cases(
    arguments: argparse.Namespace, ids: np.ndarray
) -> Iterator[tuple[int, dict[str, Score]]]:
    """Our server in a process of its own; the first token of each sequence is the prompt."""
    import httpx
    from transformers import AutoTokenizer

    from opd.config.student import DType
    from opd.config.teacher import ServerTeacherConfig, TeacherServerConfig
    from opd.run.teacher_servers import running_teacher
    from opd.serving.app import MEDIA_TYPE
    from opd.teacher.client import ServerTeacher
    from opd.teacher.vocabulary import read_vocabulary
    from opd.teacher.wire import Want, read_response, request_bytes, wire_request_from
    from opd.types import FinishReason, Prompt, Rollout, ScoreRequest

    rollouts = [
        Rollout(
            prompt=Prompt(uid="p", token_ids=row[:1]),
            token_ids=row[1:],
            logps=np.zeros(len(row) - 1, np.float32),
            finish_reason=FinishReason.length,
            version=0,
        )
        for row in ids
    ]
    student = read_vocabulary(AutoTokenizer.from_pretrained(arguments.model), 1 << 30)
    config = TeacherServerConfig(
        model=arguments.model, dtype=DType.float32, kv_cache_memory_bytes=KV_BYTES
    )
    with running_teacher(config, log_path=Path(os.devnull)) as server:

        def client(request: ScoreRequest) -> ServerTeacher:
            return ServerTeacher(
                server.url,
                ServerTeacherConfig(),
                request=request,
                student=student,
                token=server.token,
                batch_tokens=4096,
            )

        def scoring(request: ScoreRequest) -> Score:
            teacher = client(request)
            return lambda count: discard(teacher.score(rollouts[:count]))

        vocab = client(ScoreRequest()).vocab_size

        def all_logps(count: int) -> None:
            for start in range(0, count, 16):
                group = rollouts[start : min(start + 16, count)]
                request = wire_request_from(
                    group, ScoreRequest(), want=Want.full_logps, vocab_size=vocab
                )
                response = httpx.post(
                    f"{server.url}/score",
                    content=request_bytes(request),
                    headers={
                        "Authorization": f"Bearer {server.token}",
                        "Content-Type": MEDIA_TYPE,
                    },
                    timeout=600,
                )
                discard([read_response(response.raise_for_status().content)])

        cases = {f"top {k}": scoring(ScoreRequest(top_k=k)) for k in sorted(arguments.k)}
        full = {"full hidden": scoring(ScoreRequest(full=True)), "full logps": all_logps}
        yield server.pid, cases | full


@contextmanager
def vllm_cases(
    arguments: argparse.Namespace, ids: np.ndarray
) -> Iterator[tuple[int, dict[str, Score]]]:
    """vLLM in this process, its results converted into arrays of ids and log-probs."""
    import torch
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    cuda = torch.cuda.is_available()
    engine = LLM(
        arguments.model,
        dtype="float32",
        max_logprobs=-1,
        enable_prefix_caching=False,
        enforce_eager=not cuda,
        distributed_executor_backend=None if cuda else "uni",
        kv_cache_memory_bytes=None if cuda else KV_BYTES,
    )
    prompts = [TokensPrompt(prompt_token_ids=row.tolist()) for row in ids]

    def scoring(k: int) -> Score:
        flat = arguments.way == "flat"
        sampling = SamplingParams(
            max_tokens=1, prompt_logprobs=k, flat_logprobs=flat, detokenize=False
        )

        def score(count: int) -> None:
            outputs = engine.generate(prompts[:count], sampling, use_tqdm=False)
            arrays = flat_arrays if flat else plain_arrays
            discard([arrays(output.prompt_logprobs) for output in outputs])

        return score

    cases = {f"top {k}": scoring(k) for k in sorted(arguments.k)}
    yield os.getpid(), cases | {"full logps": scoring(-1)}


def flat_arrays(logprobs) -> tuple[np.ndarray, np.ndarray]:
    """FlatLogprobs -> ids, log-probs."""
    return np.array(logprobs.token_ids, np.int32), np.array(logprobs.logprobs, np.float32)


def plain_arrays(logprobs) -> tuple[np.ndarray, np.ndarray]:
    """A list of {id: Logprob} -> ids, log-probs; the first token has none."""
    pairs = [(i, entry.logprob) for token in logprobs[1:] for i, entry in token.items()]
    return np.array([i for i, _ in pairs], np.int32), np.array([p for _, p in pairs], np.float32)


def discard(scores: Sequence) -> None:
    """Scores are received whole, and dropped."""
    assert len(scores) > 0


def resident(pid: int) -> int:
    """Resident bytes of a process and its children."""
    import psutil

    process = psutil.Process(pid)
    return sum(p.memory_info().rss for p in (process, *process.children(recursive=True)))


def cpu_seconds(pid: int) -> float:
    """CPU time so far of the scoring process tree and of this process, the caller."""
    import psutil

    process = psutil.Process(pid)
    tree = {p.pid: p for p in (psutil.Process(), process, *process.children(recursive=True))}
    times = [p.cpu_times() for p in tree.values()]
    return sum(t.user + t.system for t in times)


@contextmanager
def watch_peak(pid: int) -> Iterator[Callable[[], int]]:
    """The largest ``resident(pid)`` seen, looked at every 10 ms."""
    seen, ended = [resident(pid)], threading.Event()

    def watch() -> None:
        while not ended.wait(0.01):
            seen.append(resident(pid))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    yield lambda: max(seen)
    ended.set()
    watcher.join()


def build_model(folder: str, vocab: int) -> None:
    """Two random Qwen3 layers, 256 wide."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocab,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    Qwen3ForCausalLM(config).float().save_pretrained(folder)
    words = models.WordLevel({f"t{i}": i for i in range(vocab)}, unk_token="t0")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), unk_token="t0")
    tokenizer.save_pretrained(folder)


def table(rows: Sequence[dict]) -> str:
    """Rates, memory, and opd's rate per CPU second over each peer's."""
    ours = {row["case"]: row["tokens_per_cpu_second"] for row in rows if row["way"] == "opd"}
    lines = [
        "| case | way | sequences | tokens/s | tokens/CPU s | MiB above loaded | opd over it |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    cases = list(dict.fromkeys(row["case"] for row in rows))
    for row in sorted(rows, key=lambda row: cases.index(row["case"])):
        ratio = ours.get(row["case"], float("nan")) / row["tokens_per_cpu_second"]
        lines.append(
            f"| {row['case']} | {row['way']} | {row['sequences']} | "
            f"{row['tokens_per_second']:.0f} | {row['tokens_per_cpu_second']:.0f} | "
            f"{row['mib_above_loaded']:.0f} | {ratio:.1f}x |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
