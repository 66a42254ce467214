"""An engine in a process of its own: ``engine_process.py rollout|teacher MODEL return|exit|kill``."""

import os
import signal
import sys

import numpy as np
import torch

from opd.config.rollout import VllmEngineConfig
from opd.config.student import DType
from opd.config.teacher import TeacherEngineConfig
from opd.rollout.vllm import VllmRollouts, start_llm
from opd.teacher.backend_vllm import VllmBackend
from opd.tracking.console import SilentProgress
from opd.types import Prompt, Sampling

IDS = np.array([4, 5, 6], np.int32)


def generate(model: str) -> None:
    llm = start_llm(
        model,
        VllmEngineConfig(kv_cache_memory_bytes=32 << 20),
        dtype=DType.float32,
        max_model_len=64,
        seed=0,
        sleeps=False,
        device=torch.device("cpu"),
    )
    engine = VllmRollouts(llm, stop_ids=[1], progress=SilentProgress(), sleeps=False)
    rollouts = engine.generate([Prompt(uid="p", token_ids=IDS)], Sampling(n=2, max_tokens=4))
    assert len(rollouts) == 2


def score(model: str) -> None:
    config = TeacherEngineConfig(dtype=DType.float32, kv_cache_memory_bytes=32 << 20)
    (hidden,) = VllmBackend(model, config).hidden([IDS])
    assert len(hidden) == 3


if __name__ == "__main__":
    kind, model, ending = sys.argv[1:]
    {"rollout": generate, "teacher": score}[kind](model)
    print("done", flush=True)
    match ending:
        case "exit":
            os._exit(0)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
