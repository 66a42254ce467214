"""The student as its training engine wants it: in the trained dtype, partitioned by ZeRO stage 3."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from transformers import initialization as transformers_initialization

from opd.config.student import StudentConfig
from opd.model_head import read_model_config, skeleton
from opd.train.checkpoint_layout import stored_buffers
from opd.train.weights import choose_attention, load_student, load_weights


def load_for_training(
    model: str,
    config: StudentConfig,
    *,
    dtype: torch.dtype,
    partition: Mapping[str, Any] | None,
) -> torch.nn.Module:
    """``load_student`` with weights in ``dtype`` and every buffer as in a float32 model.

    ``partition``: a DeepSpeed config of stage 3, whose ranks then hold a part of each weight and never a
    whole model; collective. A model whose checkpoint holds buffers (correction biases of routers) is loaded
    whole and in float32, because neither transformers nor DeepSpeed keeps those as they are.
    """
    if dtype == torch.float32 and partition is None:
        return load_student(model, config, dtype=dtype)
    settings = read_model_config(model, trust_remote_code=config.trust_remote_code)
    made = skeleton(settings, trust_remote_code=config.trust_remote_code)
    if any(True for _ in stored_buffers(made)):
        return load_student(model, config, dtype=torch.float32)
    with nullcontext() if partition is None else _partitioned(partition):
        student = load_weights(model, config, dtype=dtype)
    _set_buffers(student)
    choose_attention(student, config)
    return student


@contextmanager
def _partitioned(deepspeed_config: Mapping[str, Any]) -> Iterator[None]:
    """Inside, transformers partitions what it loads."""
    from deepspeed import comm
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    if not comm.is_initialized():
        comm.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo")
    held = HfDeepSpeedConfig(
        copy.deepcopy(dict(deepspeed_config))
    )  # transformers keeps a weak reference
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del held


def _set_buffers(causal: Any) -> None:
    """Replace the buffers of a loaded model by those of a float32 one.

    zero.Init rounds every tensor that a constructor makes, the frequencies of rotary embeddings too, and
    a bf16 model has the scale of its embedding rounded.
    """
    from accelerate import init_empty_weights

    with (
        torch.random.fork_rng(devices=[]),
        init_empty_weights(include_buffers=False),
        transformers_initialization.no_init_weights(),
    ):
        made = type(causal)._from_config(
            copy.deepcopy(causal.config),
            dtype=torch.float32,
            attn_implementation=causal.config._attn_implementation,
        )
    for name, buffer in made.named_buffers():
        prefix, _, leaf = name.rpartition(".")
        module = causal.get_submodule(prefix)
        module._buffers[leaf] = buffer.to(module._buffers[leaf].device)
