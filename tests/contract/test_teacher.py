"""Remote and local teachers return the same scores, and they are those of transformers."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from opd.config.student import DType
from opd.config.teacher import LocalTeacherConfig, ServerTeacherConfig, TeacherServerConfig
from opd.run.teacher_servers import running_teacher
from opd.serving.app import MEDIA_TYPE
from opd.serving.child import RunningService
from opd.teacher.backend_torch import TorchBackend
from opd.teacher.client import ServerTeacher
from opd.teacher.local import LocalTeacher
from opd.teacher.vocabulary import Vocabulary, read_vocabulary
from opd.teacher.wire import Want, read_response, request_bytes, wire_request_from
from opd.types import FinishReason, Prompt, Rollout, ScoredRollout, ScoreRequest

VOCAB, TOKENS, WIDTH, MAX_LENGTH = 97, 90, 64, 256
EXACT = 1e-4  # float32: other kernels, other order of sums
BF16 = 0.25  # bfloat16 layers with weights five times wider than usual; mean is checked apart


@pytest.fixture(scope="session", autouse=True)
def _quiet_offline() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


def _checkpoint(folder: Path, *, tied: bool) -> Path:
    """A wide-spread tiny Qwen3: its distributions are far from uniform, so errors show."""
    torch.manual_seed(7)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=tied,
        initializer_range=0.1,
    )
    Qwen3ForCausalLM(config).float().save_pretrained(folder)
    words = models.WordLevel({f"t{i}": i for i in range(TOKENS)}, unk_token="t0")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), unk_token="t0")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _checkpoint(tmp_path_factory.mktemp("untied"), tied=False)


@pytest.fixture(scope="session")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _checkpoint(tmp_path_factory.mktemp("tied"), tied=True)


def _config(model: Path, dtype: DType = DType.float32) -> TeacherServerConfig:
    # 48 tokens a step, so that long sequences are prefilled in chunks
    return TeacherServerConfig(
        model=str(model), dtype=dtype, max_num_batched_tokens=48, kv_cache_memory_bytes=64 << 20
    )


def _backend(model: Path, dtype: DType = DType.float32, tokens: int = 8192) -> TorchBackend:
    return TorchBackend(str(model), LocalTeacherConfig(dtype=dtype, max_num_batched_tokens=tokens))


@pytest.fixture(scope="session")
def server(untied: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    log = tmp_path_factory.mktemp("log") / "teacher.log"
    with running_teacher(_config(untied), log_path=log, wait_s=300) as running:
        yield running


@pytest.fixture(scope="session")
def student(untied: Path) -> Vocabulary:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(untied)
    return read_vocabulary(tokenizer, matrix_size=VOCAB)


@pytest.fixture(scope="session")
def rollouts() -> list[Rollout]:
    """Of uneven lengths, two alike, and two that share a prompt."""
    random = np.random.default_rng(3)
    sizes = [(3, 5), (1, 1), (40, 60), (9, 100), (2, 17), (20, 1)]
    drawn = [_rollout(random, random.integers(0, VOCAB, p), t) for p, t in sizes]
    return [*drawn, drawn[2], _rollout(random, drawn[2].prompt.token_ids, 30)]


def _rollout(random: np.random.Generator, prompt: np.ndarray, count: int) -> Rollout:
    support = np.stack([random.permutation(VOCAB)[:6] for _ in range(count)]).astype(np.int32)
    support[::3, 4:] = -1  # ragged
    return Rollout(
        prompt=Prompt(uid="p", token_ids=prompt.astype(np.int32)),
        token_ids=random.integers(0, VOCAB, count).astype(np.int32),
        logps=np.zeros(count, np.float32),
        finish_reason=FinishReason.length,
        version=0,
        support_ids=support,
    )


@dataclass(frozen=True)
class Truth:
    """Log-softmax of transformers' own logits, one rollout at a time."""

    model: torch.nn.Module

    def logps(self, rollout: Rollout, temperature: float, vocab_size: int = VOCAB) -> torch.Tensor:
        ids = torch.from_numpy(rollout.sequence.astype(np.int64))
        with torch.no_grad():
            logits = self.model(ids[None]).logits[0].float()
        first = len(rollout.prompt.token_ids) - 1
        return torch.log_softmax(logits[first:-1, :vocab_size] / temperature, dim=-1)


@pytest.fixture(scope="session")
def truth(untied: Path) -> Truth:
    return Truth(AutoModelForCausalLM.from_pretrained(untied, dtype=torch.float32).eval())


def _client(
    server: RunningService, request: ScoreRequest, student: Vocabulary, **changed
) -> ServerTeacher:
    config = ServerTeacherConfig(timeout=300)
    return ServerTeacher(
        server.url, config, request=request, student=student, token=server.token, **changed
    )


REQUESTS = {
    "sampled": ScoreRequest(),
    "top-k": ScoreRequest(top_k=5, temperature=0.7),
    "named ids": ScoreRequest(rollout_support=True),
    "union": ScoreRequest(top_k=5, rollout_support=True, temperature=1.3),
    "whole vocabulary": ScoreRequest(top_k=VOCAB),
    "full": ScoreRequest(full=True, temperature=0.5),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_server_and_local_teacher_both_score_as_transformers_does(
    name: str,
    server: RunningService,
    untied: Path,
    student: Vocabulary,
    rollouts: list[Rollout],
    truth: Truth,
) -> None:
    request = REQUESTS[name]
    local = LocalTeacher(_backend(untied, tokens=128), request=request, student=student)
    served = _client(server, request, student, batch_tokens=150)
    assert local.info() == served.info()
    for teacher in (local, served):
        for rollout, scored in zip(rollouts, teacher.score(rollouts), strict=True):
            assert scored.rollout is rollout
            _require_true(scored, truth.logps(rollout, request.temperature), request, teacher.head)


def _require_true(
    scored: ScoredRollout, true_TV: torch.Tensor, request: ScoreRequest, head
) -> None:
    targets = torch.from_numpy(scored.rollout.token_ids.astype(np.int64))
    assert scored.logps == pytest.approx(
        true_TV.gather(1, targets[:, None])[:, 0].numpy(), abs=EXACT
    )
    if request.top_k or request.rollout_support:
        _require_true_support(scored, true_TV, request)
    else:
        assert scored.support is None
    if request.full:  # 64 hidden < 97 ids
        full_TV = torch.log_softmax(
            torch.from_numpy(scored.hidden @ head().T) / request.temperature, dim=-1
        )
        assert (full_TV - true_TV).abs().max() < EXACT
    assert (scored.hidden is not None) == request.full
    assert scored.full_logps is None


def _require_true_support(
    scored: ScoredRollout, true_TV: torch.Tensor, request: ScoreRequest
) -> None:
    for t, true_V in enumerate(true_TV):
        expected = set(true_V.topk(request.top_k).indices.tolist())
        if request.rollout_support:
            expected |= set(scored.rollout.support_ids[t].tolist()) - {-1}
        ids, logps = scored.support.ids[t], scored.support.logps[t]
        used = ids >= 0
        assert sorted(ids[used].tolist()) == sorted(expected), "each once"
        assert logps[used] == pytest.approx(true_V[ids[used]].numpy(), abs=EXACT)
        assert np.isneginf(logps[~used]).all()
        outside = torch.ones(VOCAB, dtype=torch.bool)
        outside[list(expected)] = False
        tail = true_V[outside].logsumexp(0).item()
        assert scored.support.tail_logp[t] == pytest.approx(tail, abs=EXACT)


def test_ids_beyond_the_smaller_matrix_get_no_probability(
    server: RunningService, untied: Path, student: Vocabulary, truth: Truth
) -> None:
    smaller = Vocabulary(
        fingerprint=student.fingerprint, tokenizer_size=TOKENS, matrix_size=TOKENS + 2
    )
    random = np.random.default_rng(5)
    rollout = _rollout(random, random.integers(0, TOKENS, 4), 12)
    rollout.token_ids[:] %= TOKENS
    true_TV = truth.logps(rollout, 1.0, TOKENS + 2)
    for request in (ScoreRequest(full=True), ScoreRequest(rollout_support=True)):
        local = LocalTeacher(_backend(untied), request=request, student=smaller)
        for teacher in (local, _client(server, request, smaller)):
            (scored,) = teacher.score([rollout])
            picked = true_TV.gather(
                1, torch.from_numpy(rollout.token_ids.astype(np.int64))[:, None]
            )
            assert scored.logps == pytest.approx(picked[:, 0].numpy(), abs=EXACT)
            if request.full:
                head = teacher.head()
                assert head.shape == (TOKENS + 2, WIDTH)
                full_TV = torch.log_softmax(torch.from_numpy(scored.hidden @ head.T), dim=-1)
                assert (full_TV - true_TV).abs().max() < EXACT
            else:
                kept = rollout.support_ids < TOKENS + 2
                assert (scored.support.ids == np.where(kept, rollout.support_ids, -1)).all()


def test_full_distribution_of_a_narrow_vocabulary_is_sent_as_log_probs(
    server: RunningService, student: Vocabulary, rollouts: list[Rollout], truth: Truth
) -> None:
    request = wire_request_from(
        rollouts[:3], ScoreRequest(), want=Want.full_logps, vocab_size=VOCAB
    )
    response = httpx.post(
        f"{server.url}/score",
        content=request_bytes(request),
        headers={"Authorization": f"Bearer {server.token}", "Content-Type": MEDIA_TYPE},
    )
    true_NV = torch.cat([truth.logps(r, 1.0) for r in rollouts[:3]])
    assert (torch.tensor(read_response(response.content).full_logps) - true_NV).abs().max() < EXACT


def test_tied_head_in_bfloat16_stays_within_rounding(
    tied: Path, tmp_path: Path, student: Vocabulary, rollouts: list[Rollout]
) -> None:
    true = Truth(AutoModelForCausalLM.from_pretrained(tied, dtype=torch.float32).eval())
    whole = ScoreRequest(full=True)
    config = _config(tied, DType.bfloat16)
    with running_teacher(config, log_path=tmp_path / "log", wait_s=300) as running:
        served = _client(running, whole, student)
        head, scored = served.head(), served.score(rollouts)
    local = LocalTeacher(_backend(tied, DType.bfloat16), request=whole, student=student)
    for each, its_head in ((scored, head), (local.score(rollouts), local.head())):
        states = [torch.from_numpy(s.hidden).view(torch.bfloat16).float() for s in each]
        full = [torch.log_softmax(state @ torch.from_numpy(its_head).T, -1) for state in states]
        error = torch.cat(full) - torch.cat([true.logps(r, 1.0) for r in rollouts])
        assert error.abs().max() < BF16
        assert error.abs().mean() < BF16 / 8


def test_eight_threads_get_the_numbers_of_one(
    server: RunningService, student: Vocabulary, rollouts: list[Rollout]
) -> None:
    served = _client(server, ScoreRequest(top_k=4), student, batch_tokens=60)
    alone = served.score(rollouts)
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda _: served.score(rollouts), range(8)))
    for scored in together:
        for one, other in zip(alone, scored, strict=True):
            assert other.logps == pytest.approx(one.logps, abs=EXACT)
            assert other.support.tail_logp == pytest.approx(one.support.tail_logp, abs=EXACT)


def test_another_tokenizer_is_refused_with_the_reason(server: RunningService) -> None:
    stranger = Vocabulary(fingerprint="0" * 64, tokenizer_size=50, matrix_size=64)
    with pytest.raises(ValueError, match=r"another tokenizer.*50 tokens.*choose a teacher"):
        _client(server, ScoreRequest(), stranger)


def test_rollouts_without_the_requested_support_are_refused(
    server: RunningService, student: Vocabulary, rollouts: list[Rollout]
) -> None:
    bare = Rollout(
        prompt=rollouts[0].prompt,
        token_ids=rollouts[0].token_ids,
        logps=rollouts[0].logps,
        finish_reason=FinishReason.stop,
        version=0,
    )
    with pytest.raises(ValueError, match="support_k"):
        _client(server, ScoreRequest(rollout_support=True), student).score([bare])
