"""Stated figures: GPUs by name, the share of their peaks that is reached, and sizes that no config tells.

None of them was measured on a GPU by this project. Change a figure here and nowhere else.
"""

from dataclasses import dataclass

from opd.run.placement import Cards

GIB = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One card: memory that torch reports, dense peaks in TFLOPS, bandwidths in GB/s (one direction).

    ``link`` joins the cards of a machine: NVLink, or PCIe where there is none.
    """

    memory_gib: float
    bf16: float
    fp32: float
    hbm: float
    link: float
    pcie: float


GPUS = {
    "A100-40": Gpu(memory_gib=39.4, bf16=312, fp32=19.5, hbm=1555, link=300, pcie=32),
    "A100-80": Gpu(memory_gib=79.2, bf16=312, fp32=19.5, hbm=2039, link=300, pcie=32),
    "H100": Gpu(memory_gib=79.2, bf16=989, fp32=67, hbm=3350, link=450, pcie=64),
    "H200": Gpu(memory_gib=139.8, bf16=989, fp32=67, hbm=4800, link=450, pcie=64),
    "L40S": Gpu(memory_gib=44.4, bf16=362, fp32=91.6, hbm=864, link=32, pcie=32),
    "RTX4090": Gpu(memory_gib=23.5, bf16=165, fp32=82.6, hbm=1008, link=32, pcie=32),
    "B200": Gpu(memory_gib=178.4, bf16=2250, fp32=75, hbm=8000, link=900, pcie=64),
}
"""Vendors' data sheets. Memory is what torch reports of the nominal size."""

MATMUL_SHARE = 0.38
"""Of the bf16 peak, in large matrix products of a whole forward or backward pass."""
FP32_SHARE = 0.67
"""Of the fp32 peak, in a large matrix product."""
HBM_SHARE = 0.6
"""Of the memory bandwidth, in elementwise passes and in decoding."""
LINK_SHARE = 0.7
"""Of a link between cards, in collectives."""
DECODE_STEP_S = 0.005
"""Of one step of vLLM beside reading weights and cache: scheduling, sampling, log-probs."""
HIDDEN_BYTES_PER_S = 0.75e9
"""Of hidden states on their way from a teacher's engine to a rank: copies, safetensors, HTTP."""
PUSH_BYTES_PER_S = 0.5e9
"""Of weights on their way to a rollout server."""

CONTEXT_BYTES = 1 * GIB
"""Of one process on a card: CUDA context, cuBLAS and NCCL workspaces."""
SLEEPING_ENGINE_BYTES = GIB // 2
"""What a sleeping vLLM engine keeps: graphs and workspaces."""
ENGINE_WORKSPACE_BYTES = 2 * GIB
"""What an awake vLLM engine keeps of its share for activations, logits and graphs."""
ALLOCATOR_SHARE = 0.03
"""Of the largest moment of a rank: blocks that the caching allocator cannot use."""


def find_gpu(name: str) -> tuple[str, Gpu]:
    """The card of a name in any spelling (``h100``, ``NVIDIA H100 80GB HBM3``). ValueError lists all."""
    plain = _plain(name)
    if "A100" in plain and "40G" in plain:
        plain = "A10040"
    if "A100" in plain and "80G" in plain:
        plain = "A10080"
    for known, gpu in sorted(GPUS.items(), key=lambda item: -len(item[0])):
        if _plain(known) in plain:
            return known, gpu
    raise ValueError(f"gpu={name} is not in the table of GPUs: allowed are {', '.join(GPUS)}")


def cards_named(name: str, count: int, nodes: int) -> Cards:
    """``count`` cards of a name on each of ``nodes`` machines."""
    known, gpu = find_gpu(name)
    return Cards(count=count, nodes=nodes, memory_bytes=int(gpu.memory_gib * GIB), name=known)


def _plain(name: str) -> str:
    return "".join(c for c in name.upper() if c.isalnum())
