"""Weights into another process after a step: all of them, the changed ones, the changed ones of a mask.

A random bf16 state of SmolLM2-135M's shapes (tied) and a receiver in a process of its own, over HTTP
on loopback. Between pushes a share of the coordinates changes, 87 % of them by one unit in the last
place, the others by up to a hundred. "encode" reads the weights, compares and encodes; "send" is HTTP,
checksum, decoding and writing into the receiver's copy; "commit" brings the sender's copy up to date.
Loading the engine from the receiver's copy comes on top and is the same in every row.
Seconds are the median of --pushes; the mask's coordinates are sent once and have a row of their own.

    python benchmarks/weight_sync.py --out weight_sync.json
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

MILLION = 1_000_000
TOKEN_VARIABLE = "OPD_ROLLOUT_TOKEN"


def main() -> None:
    """Measure and print the table; with --receive be the receiver."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pushes", type=int, default=5, help="of each row (default: 5)")
    parser.add_argument("--layers", type=int, default=30, help="decoder layers (default: 30)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--receive", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("serving", nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.receive:
        receive(arguments.serving)
        return
    rows = list(measured(arguments))
    print(table(rows))
    if arguments.out:
        arguments.out.write_text(json.dumps(rows, indent=1) + "\n")


def receive(serving: list[str]) -> None:
    """A receiver without an engine, behind the endpoints of a rollout server."""
    import os
    from typing import Any, cast

    from opd.config.arguments import parse_arguments
    from opd.config.serving import ServingConfig
    from opd.rollout.app import EngineHost, ServedModel, rollout_app
    from opd.serving.server import serve
    from opd.sync.receiver import WeightReceiver

    receiver = WeightReceiver(lambda tensors, changes, version: None)
    host = EngineHost(
        engine=cast(Any, None),
        model=ServedModel(model="none", dtype="bfloat16", max_length=1, vocab_size=1, stop_ids=[]),
        take=receiver.take,
        state=receiver.state,
    )
    token = os.environ[TOKEN_VARIABLE]
    serve(
        lambda: rollout_app(lambda: host, token=token, max_request_bytes=1 << 40),
        parse_arguments(ServingConfig, serving),
        token=token,
        variable=TOKEN_VARIABLE,
    )


def measured(arguments: argparse.Namespace) -> Iterator[dict[str, float | str]]:
    """One row per way of sending."""
    from opd.serving.child import running_service
    from opd.serving.client import ServiceClient

    with (
        tempfile.TemporaryDirectory() as folder,
        running_service(
            "receiver",
            [__file__, "--receive", f"--threads={arguments.threads}"],
            variable=TOKEN_VARIABLE,
            log_path=Path(folder) / "log",
            environment={},
        ) as running,
    ):
        service = ServiceClient(
            running.url, name="the receiver", remedy="", token=running.token, timeout=600, retries=0
        )
        weights = smollm2(arguments.layers)
        yield from way(service, weights, "dense", share=0.02, pushes=arguments.pushes)
        for share in (0.01, 0.02, 0.04):
            yield from way(service, weights, "sparse", share=share, pushes=arguments.pushes)
        for density, share in ((0.05, 0.02), (0.05, 0.4), (0.05, 1.0), (0.2, 0.1)):
            yield from way(
                service, weights, "masked", density=density, share=share, pushes=arguments.pushes
            )


def smollm2(layers: int) -> dict[str, torch.Tensor]:
    """Random numbers in the shapes of SmolLM2-135M."""
    torch.manual_seed(0)
    shapes = {"model.embed_tokens.weight": (49152, 576), "model.norm.weight": (576,)}
    for i in range(layers):
        prefix = f"model.layers.{i}"
        shapes |= {
            f"{prefix}.self_attn.q_proj.weight": (576, 576),
            f"{prefix}.self_attn.k_proj.weight": (192, 576),
            f"{prefix}.self_attn.v_proj.weight": (192, 576),
            f"{prefix}.self_attn.o_proj.weight": (576, 576),
            f"{prefix}.mlp.gate_proj.weight": (1536, 576),
            f"{prefix}.mlp.up_proj.weight": (1536, 576),
            f"{prefix}.mlp.down_proj.weight": (576, 1536),
            f"{prefix}.input_layernorm.weight": (576,),
            f"{prefix}.post_attention_layernorm.weight": (576,),
        }
    return {name: (torch.randn(shape) * 0.02).bfloat16() for name, shape in shapes.items()}


def way(
    service,
    weights: dict[str, torch.Tensor],
    name: str,
    *,
    share: float,
    pushes: int,
    density: float | None = None,
) -> Iterator[dict[str, float | str]]:
    """``share`` is of the coordinates that may change."""
    from opd.sync.sender import WeightSender

    kept = None
    if density is not None:
        kept = {
            n: (torch.rand(t.numel()) < density).nonzero().view(-1).int()
            for n, t in weights.items()
        }
    sender = WeightSender(
        dtype=torch.bfloat16,
        snapshot_every=1 if name == "dense" else 1 << 30,
        kept=kept,
        fingerprint=None if kept is None else "random",
    )
    _, state = push(service, sender, weights, 0, None)
    if kept is not None:
        changed = train(weights, share, kept)
        first, state = push(service, sender, weights, 1, state)
        index = float(first["bytes"]) - float(first["patch"])
        yield {"way": "index, once", "density": density or 0, "bytes": index}
    timed = []
    for version in range(2, 2 + pushes):
        changed = train(weights, share, kept)
        row, state = push(service, sender, weights, version, state)
        timed.append(row | {"changed": changed})
    total = sum(t.numel() for t in weights.values())
    medians = {key: statistics.median(row[key] for row in timed) for key in timed[0]}
    yield {
        "way": name,
        "density": 1.0 if density is None else density,
        "share": medians["changed"] / total,
        "per_changed": medians["bytes"] / medians["changed"],
        "encode_mb_s": 2 * total / MILLION / medians["encode"],
        **medians,
    }


def push(service, sender, weights: dict[str, torch.Tensor], version: int, state):
    """Seconds and bytes of one push."""
    from opd.serving.app import MEDIA_TYPE
    from opd.types import ReceiverState

    start = time.perf_counter()
    sender.prepare(weights.items(), version)
    encoded = time.perf_counter()
    state, sent = state or ReceiverState(), []
    while (message := sender.next_for(state)) is not None:
        response = service.send("POST", "/weights", message, {"Content-Type": MEDIA_TYPE})
        state = ReceiverState(**response.json())
        assert state.refused is None or state.version is None, state.refused
        sent.append(len(message))
    arrived = time.perf_counter()
    sender.commit()
    end = time.perf_counter()
    row = {"bytes": float(sum(sent)), "patch": float(sent[-1]), "encode": encoded - start}
    return row | {"send": arrived - encoded, "commit": end - arrived, "push": end - start}, state


def train(weights: dict[str, torch.Tensor], share: float, kept) -> int:
    """Change ``share`` of the coordinates, or of the kept ones, as a step does."""
    changed = 0
    for name, tensor in weights.items():
        bits = tensor.view(-1).view(torch.int16)
        size = len(bits) if kept is None else len(kept[name])
        at = (torch.rand(size) < share).nonzero().view(-1)
        at = at if kept is None else kept[name][at].long()
        sign = torch.randint(0, 2, (len(at),)) * 2 - 1
        far = torch.randint(2, 100, (len(at),))
        bits[at] += (sign * torch.where(torch.rand(len(at)) < 0.13, far, 1)).short()
        changed += len(at)
    return changed


def table(rows: list[dict[str, float | str]]) -> str:
    """Markdown."""
    lines = [
        "| way | mask density | changed | MB per push | bytes per changed | encode s | send s "
        "| commit s | push s |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        start = f"| {row['way']} | {row['density']:.0%} "
        if "push" not in row:
            lines.append(f"{start}| | {float(row['bytes']) / MILLION:.2f} | | | | | |")
            continue
        seconds = " | ".join(f"{row[k]:.3f}" for k in ("encode", "send", "commit", "push"))
        lines.append(
            f"{start}| {row['share']:.2%} | {float(row['bytes']) / MILLION:.2f} "
            f"| {row['per_changed']:.2f} | {seconds} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
