"""A vLLM engine in this process: token ids in, token ids and the engine's own log-probs out."""

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from opd.config.rollout import SHARED_ENGINE, VllmEngineConfig
from opd.config.student import DType
from opd.interfaces import Progress, RolloutEngine
from opd.rollout.seeds import request_seed
from opd.rollout.sleep import EngineSleep, SleepLevel
from opd.types import FinishReason, IntArray, Prompt, Rollout, Sampling
from opd.vllm_start import (
    explain_refusal,
    restore_classes,
    set_exact_float32,
    set_start_method,
)
from opd.world import join_alone

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.logprobs import FlatLogprobs
    from vllm.outputs import CompletionOutput, RequestOutput


CPU_STEP_TOKENS = 4096
CPU_CACHE_BYTES = 512 << 20
PROBE_TOKENS = 8
"""Of the prompt that a new engine on a CPU completes, before it is used."""


def start_llm(
    model: str,
    config: VllmEngineConfig,
    *,
    dtype: DType,
    max_model_len: int,
    seed: int,
    sleeps: bool,
    device: torch.device,
    trust_remote_code: bool = False,
) -> "LLM":
    """Start vLLM in this process, beside a trainer; about 3 s for a small model on CPU.

    ``max_model_len`` counts prompt and completion. The engine core stays in this process (no
    multiprocessing), so that weights are handed over without copies.
    """
    set_start_method()
    if dtype == DType.float32:
        set_exact_float32()
    on_gpu = device.type == "cuda"
    eager = not on_gpu if config.enforce_eager is None else config.enforce_eager
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    # each reload warns about modules without weights
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if eager:
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    from vllm import LLM

    launched = on_gpu and "RANK" in os.environ
    if not launched:
        join_alone(device)
    cache_bytes = config.kv_cache_memory_bytes or (None if on_gpu else CPU_CACHE_BYTES)
    arguments: dict[str, Any] = {
        "gpu_memory_utilization": config.gpu_memory_utilization or SHARED_ENGINE,
        "max_model_len": max_model_len,
        "dtype": dtype.value,
    }
    if cache_bytes is not None:
        arguments["kv_cache_memory_bytes"] = cache_bytes
    if not on_gpu:
        arguments |= _cpu_settings(model, max_model_len, trust_remote_code=trust_remote_code)
    with explain_refusal(model, arguments, "rollout"):
        llm = LLM(
            model,
            tokenizer=model,
            skip_tokenizer_init=True,
            seed=seed,
            enforce_eager=eager,
            enable_sleep_mode=sleeps,
            trust_remote_code=trust_remote_code,
            distributed_executor_backend="external_launcher" if launched else "uni",
            max_logprobs=-1,
            use_tqdm_on_load=False,
            logprobs_mode="processed_logprobs",
            **arguments,
        )
    llm.collective_rpc(restore_classes)
    if not on_gpu:
        _require_completion(llm, model)
    return llm


def _require_completion(llm: "LLM", model: str) -> None:
    """ValueError when the engine cannot complete a prompt; on a GPU its start has profiled a forward pass."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)
    try:
        llm.generate([{"prompt_token_ids": [0] * PROBE_TOKENS}], params, use_tqdm=False)
    except Exception as error:  # each kernel refuses in its own way
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"vLLM starts with {model} and cannot complete a prompt ({reason}): change rollout.dtype if it "
            "asks for another, or use rollout=transformers"
        ) from error


def _cpu_settings(model: str, max_model_len: int, *, trust_remote_code: bool) -> dict[str, Any]:
    """Settings that a CPU needs, and those that it needs for a model's architecture, by what vLLM knows."""
    from vllm.engine.arg_utils import EngineArgs

    arguments = EngineArgs(
        model, tokenizer=model, skip_tokenizer_init=True, trust_remote_code=trust_remote_code
    )
    with explain_refusal(model, {}, "rollout"):
        known = arguments.create_model_config()
    settings: dict[str, Any] = {
        # a prompt prefilled in chunks rewinds its random generator, which a CPU generator cannot do
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(CPU_STEP_TOKENS, max_model_len),
    }
    if known.is_hybrid:
        # the states of recurrent layers are cached at the ends of chunks only
        settings["enable_prefix_caching"] = False
    if known.is_deepseek_mla:
        # the CPU kernel rotates interleaved pairs of the second and later heads wrongly
        settings["compilation_config"] = {"custom_ops": ["-rotary_embedding"]}
    return settings


class VllmRollouts:
    """Implements ``RolloutEngine``. The weight sync marks the version.

    Log-probs are of the distribution sampled from, temperature and truncation included.
    An engine that ``sleeps`` is awake in ``generate`` and in a push, nowhere else.
    """

    def __init__(
        self, llm: "LLM", *, stop_ids: Sequence[int], progress: Progress, sleeps: bool
    ) -> None:
        self.llm = llm
        self._version = 0
        self._stop_ids = sorted(set(stop_ids))
        self._progress = progress
        self._sleep = EngineSleep(llm, enabled=sleeps)

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Rollout]:
        """See ``RolloutEngine``; the engine may generate again without a push."""
        return self._generate(prompts, sampling, SleepLevel.keep_weights)

    def before_push(self) -> RolloutEngine:
        """This engine for a caller that pushes weights before anybody generates again."""
        return _BeforePush(self)

    def discard_weights(self) -> None:
        """Sleep until the first push: its weights are not needed, and the learner is built meanwhile."""
        self._sleep.sleep(SleepLevel.discard_weights)

    def mark(self, version: int) -> None:
        """The weights are those after ``version`` optimizer steps; rollouts carry it."""
        self._version = version
        self._sleep.pushed()

    def wake(self) -> None:
        """Bring the weights back to the GPU for a push."""
        self._sleep.wake_for_push()

    def _generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, level: SleepLevel
    ) -> list[Rollout]:
        self._sleep.wake_for_generate()
        requests = [{"prompt_token_ids": p.token_ids.tolist()} for p in prompts]
        params = [self._params(p, sampling) for p in prompts]
        with self._progress.track("rollout", len(prompts)) as advance:
            outputs = self._run_requests(requests, params, advance)
        self._sleep.sleep(level)
        return [
            self._rollout(prompt, sample, completion, sampling.support_k)
            for prompt, output in zip(prompts, outputs, strict=True)
            for sample, completion in enumerate(output.outputs)
        ]

    def _run_requests(
        self, requests: list[Any], params: list[Any], advance: Callable[[int], None]
    ) -> "list[RequestOutput]":
        """Outputs in the order of ``requests``, which vLLM numbers as they arrive."""
        if not requests:
            return []
        engine = self.llm.llm_engine
        outputs: list[RequestOutput] = []
        try:
            self.llm.enqueue(requests, params, use_tqdm=False)
            while engine.has_unfinished_requests():
                done: list[Any] = [o for o in engine.step() if o.finished]
                outputs += done
                advance(len(done))
        except BaseException:
            self._abort()
            raise
        return sorted(outputs, key=lambda o: int(o.request_id))

    def _abort(self) -> None:
        """Drop all requests, so that those of a failed call are not answered in the next one."""
        engine = self.llm.llm_engine
        engine.abort_request(list(engine.output_processor.request_states), internal=True)

    def _params(self, prompt: Prompt, sampling: Sampling) -> Any:
        from vllm import SamplingParams

        return SamplingParams(
            n=sampling.n,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=sampling.max_tokens,
            seed=request_seed(prompt, sampling),
            stop_token_ids=self._stop_ids,
            logprobs=sampling.support_k,
            flat_logprobs=True,
            detokenize=False,
        )

    def _rollout(
        self, prompt: Prompt, sample: int, completion: "CompletionOutput", support_k: int
    ) -> Rollout:
        flat: FlatLogprobs = completion.logprobs  # pyright: ignore
        starts = np.asarray(flat.start_indices)
        token_ids = np.asarray(completion.token_ids, np.int32)
        return Rollout(
            prompt=prompt,
            token_ids=token_ids,
            logps=np.asarray(flat.logprobs, np.float32)[starts],
            finish_reason=FinishReason(completion.finish_reason or "length"),
            version=self._version,
            sample=sample,
            support_ids=_support(flat, token_ids, support_k) if support_k else None,
        )


class _BeforePush:
    """Implements ``RolloutEngine``: after ``generate`` the engine sleeps and discards its weights."""

    def __init__(self, engine: VllmRollouts) -> None:
        self._engine = engine

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Rollout]:
        """See ``RolloutEngine``."""
        return self._engine._generate(prompts, sampling, SleepLevel.discard_weights)


def _support(flat: "FlatLogprobs", token_ids: IntArray, k: int) -> IntArray:
    """The engine's k likeliest ids [T, k]; vLLM lists the sampled id first, then the k likeliest."""
    ids = np.asarray(flat.token_ids, np.int32)
    starts, ends = np.asarray(flat.start_indices), np.asarray(flat.end_indices)
    support = np.full((len(token_ids), k), -1, np.int32)
    for t, (start, end) in enumerate(zip(starts, ends, strict=True)):
        row = ids[start + 1 : end][:k]
        support[t, : len(row)] = row
    return support
