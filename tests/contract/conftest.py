"""One vLLM engine for a tied and one for an untied model, shared by the tests of this folder."""

from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM
from vllm import LLM

from opd.config.rollout import VllmEngineConfig
from opd.config.student import DType
from opd.rollout.vllm import start_llm

VOCAB = 97


def tiny(folder: Path, *, tied: bool) -> Qwen3ForCausalLM:
    """A random model with grouped heads, norms on queries and keys, and a head that is tied or not."""
    torch.manual_seed(int(tied))
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        tie_word_embeddings=tied,
        max_position_embeddings=128,
    )
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return model.eval()


@pytest.fixture(scope="session", params=["tied", "untied"])
def engine_pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[LLM, Qwen3ForCausalLM]:
    """A running engine and the transformers model that it was started from, both float32."""
    folder = tmp_path_factory.mktemp(request.param)
    model = tiny(folder, tied=request.param == "tied")
    llm = start_llm(
        str(folder),
        VllmEngineConfig(kv_cache_memory_bytes=32 << 20),
        dtype=DType.float32,
        max_model_len=64,
        seed=0,
        sleeps=False,
        device=torch.device("cpu"),
    )
    return llm, model
