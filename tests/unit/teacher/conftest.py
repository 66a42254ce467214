"""A tiny teacher for the tests of this room."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from opd.teacher.vocabulary import Vocabulary, read_vocabulary


@pytest.fixture(scope="session", autouse=True)
def _quiet_offline() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 of one layer: 97 output rows, 90 tokens, 64 positions."""
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(1)
    config = Qwen3Config(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    Qwen3ForCausalLM(config).float().save_pretrained(folder)
    words = models.WordLevel({f"t{i}": i for i in range(90)}, unk_token="t0")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), unk_token="t0")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def student(checkpoint: Path) -> Vocabulary:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoint)
    return read_vocabulary(tokenizer, matrix_size=97)
