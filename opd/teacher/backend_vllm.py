"""Hidden states from vLLM's pooling runner: batched, tensor parallel, no log-prob dictionaries.

The engine returns the final-norm hidden state of every token; the head is applied outside of it
(see ``scoring.py``), so a large vocabulary costs a few [chunk, V] blocks in float32.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import torch

from opd.config.serving import ALONE
from opd.config.student import DType
from opd.config.teacher import TeacherEngineConfig
from opd.head import HeadSpec, as_operand
from opd.reference import OwnForward, load_whole
from opd.teacher.model_info import (
    checkpoint_bytes,
    probe_text,
    read_dtype,
    read_head,
    read_info,
    read_spec,
    require_divisible_heads,
)
from opd.teacher.scoring import log_probs
from opd.types import IntArray, TeacherInfo
from opd.vllm_start import (
    explain_refusal,
    restore_classes,
    set_exact_float32,
    set_start_method,
)
from opd.world import join_alone

SOCKET_VARIABLE = "VLLM_RPC_BASE_PATH"
MAX_SOCKET_FOLDER = 70  # characters; 37 of a name follow, and a socket's path ends at 107
ENVIRONMENT = {"VLLM_LOGGING_LEVEL": "WARNING"}
MEMORY_FACTOR = 1.5
"""Free memory that the comparison with transformers needs, in sizes of the checkpoint."""
MOST_BYTES = 64 << 30
"""Of the largest checkpoint that is compared: reading it again takes about a minute."""
EXACT_BYTES = 8 << 30
"""Of the largest checkpoint that transformers computes in float32."""
CPU_ENVIRONMENT = {
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",  # the CPU build warns about what no setting changes
}


class VllmBackend:
    """One vLLM engine; a copy of the head lies on its first device.

    Leave room for the head beside the engine's share of each GPU. Sequences longer than
    ``max_num_batched_tokens`` are prefilled in chunks.
    """

    def __init__(self, model: str, config: TeacherEngineConfig) -> None:
        set_start_method()
        cuda = torch.cuda.is_available()
        self._sleeps = config.sleep and cuda
        for name, value in (ENVIRONMENT if cuda else CPU_ENVIRONMENT).items():
            os.environ.setdefault(name, value)
        # an engine core in a process of its own outlives a server that a signal ends
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm import LLM
        from vllm.config import PoolerConfig

        size = config.tensor_parallel_size or 1
        require_divisible_heads(model, size)
        has_workers = size > 1
        if not has_workers:
            join_alone(torch.device("cuda" if cuda else "cpu"))
        dtype = compute_dtype(model, config.dtype)
        if dtype == DType.float32.value:
            set_exact_float32()
        arguments: dict[str, Any] = {
            "dtype": dtype,
            "max_model_len": config.max_model_len,
            "max_num_batched_tokens": config.max_num_batched_tokens,
            "tensor_parallel_size": size,
            "gpu_memory_utilization": config.gpu_memory_utilization or ALONE,
            "kv_cache_memory_bytes": None if cuda else config.kv_cache_memory_bytes,
        }
        with (
            _socket_folder() if has_workers else nullcontext(),
            explain_refusal(model, arguments, "teacher"),
        ):
            self.engine = LLM(
                model,
                runner="pooling",
                convert="embed",
                pooler_config=PoolerConfig(task="token_embed"),
                **arguments,
                enforce_eager=not cuda,
                enable_sleep_mode=self._sleeps,
                distributed_executor_backend=None if has_workers else "uni",
                enable_prefix_caching=False,  # a cached prefix has no hidden states to return
                trust_remote_code=False,
            )
            self.engine.collective_rpc(restore_classes)
        self.info: TeacherInfo = read_info(
            model,
            max_length=self.engine.model_config.max_model_len,
            dtype=self.engine.model_config.dtype,
        )
        self.spec: HeadSpec = read_spec(model)
        device = torch.device("cuda" if cuda else "cpu")
        self.head_VD: torch.Tensor = as_operand(read_head(model), device)
        _require_own_forward(self, model)

    def hidden(self, sequences: Sequence[IntArray]) -> list[torch.Tensor]:
        """See ``Backend``; the tensors lie on the CPU."""
        from vllm import PoolingParams
        from vllm.inputs import TokensPrompt

        outputs = self.engine.encode(
            [TokensPrompt(prompt_token_ids=sequence.tolist()) for sequence in sequences],
            pooling_params=PoolingParams(use_activation=False),  # no normalisation to length one
            pooling_task="token_embed",
            use_tqdm=False,
        )
        hidden = [output.outputs.data.float() for output in outputs]
        lengths = [len(sequence) for sequence in sequences]
        assert [len(h) for h in hidden] == lengths, "the engine left out hidden states"
        return hidden

    def sleep(self) -> None:
        """See ``ServerBackend``: vLLM's level 1. On a CPU vLLM has no sleep mode, and nothing happens."""
        if self._sleeps:
            self.head_VD = self.head_VD.cpu()
            self.engine.sleep(level=1)
            torch.cuda.empty_cache()

    def wake(self) -> None:
        """See ``ServerBackend``."""
        if self._sleeps:
            torch.cuda.empty_cache()
            self.engine.wake_up()
            self.head_VD = self.head_VD.cuda()


def compute_dtype(model: str, dtype: DType) -> str:
    """vLLM's name of the format to compute in; auto is the checkpoint's own.

    vLLM's own auto would compute a float32 checkpoint in float16 here, which overflows in some models.
    """
    if dtype != DType.auto:
        return dtype.value
    return str(read_dtype(model)).removeprefix("torch.")


def _require_own_forward(backend: VllmBackend, model: str) -> None:
    """Compare the engine with transformers on the CPU; a model too large for that is not compared.

    Raises ValueError when vLLM or the head computes another model.
    """
    stored, free = checkpoint_bytes(model), psutil.virtual_memory().available
    if stored > MOST_BYTES or MEMORY_FACTOR * stored > free:
        print(
            f"teacher {model}: not compared with transformers on the CPU, which would load "
            f"{stored >> 30} GiB; at most {MOST_BYTES >> 30} GiB are loaded, and {free >> 30} GiB are free",
            file=sys.stderr,
        )
        return
    dtype: torch.dtype = backend.engine.model_config.dtype
    exact = stored < EXACT_BYTES and 2 * MEMORY_FACTOR * stored < free
    who = f"teacher {model} in vLLM"
    causal = load_whole(model, who, dtype=torch.float32 if exact else dtype)
    OwnForward.of(causal, probe_text(model)).require(
        lambda sequences: [each.cpu() for each in log_probs(backend, sequences)], who, dtype=dtype
    )


@contextmanager
def _socket_folder() -> Iterator[None]:
    """A folder for the sockets of vLLM's workers, which are connected when the engine has started."""
    before = os.environ.get(SOCKET_VARIABLE)
    with TemporaryDirectory(prefix="") as folder:
        if len(folder) <= MAX_SOCKET_FOLDER:
            os.environ[SOCKET_VARIABLE] = folder
        yield
    if before is None:
        os.environ.pop(SOCKET_VARIABLE, None)
    else:
        os.environ[SOCKET_VARIABLE] = before
