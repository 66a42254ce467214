"""A teacher with its own tokenizer: remote = local, itself = nothing, sums as the model computes them."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from opd.assembly.loss import build_loss
from opd.batch import collate
from opd.config.loss import PolicyGradientLossConfig
from opd.config.student import DType
from opd.config.teacher import (
    LocalTeacherConfig,
    ServerTeacherConfig,
    TeacherBackend,
    TeacherServerConfig,
)
from opd.config.uld import UldLossConfig, Unmatched
from opd.head import HeadSpec
from opd.interfaces import Teacher
from opd.run.teacher_servers import running_teacher
from opd.teacher.backend_torch import TorchBackend
from opd.teacher.client import ServerTeacher
from opd.teacher.local import LocalTeacher
from opd.teacher.own_tokenizer import Ends, OwnTokenizerTeacher, TokenizerPair
from opd.teacher.vocabulary import read_vocabulary
from opd.train.chunked import chunked_loss
from opd.types import (
    FinishReason,
    FloatArray,
    Prompt,
    Rollout,
    ScoredRollout,
    ScoreRequest,
    TeacherInfo,
)
from tests.support.tokenizers import byte_level, characters

WIDTH, MAX_LENGTH = 64, 64
TEXTS = [
    "1+3+0=04;4+5+0=09#94",
    "the answer is 42",
    "Grüße, 日本語",
    " return a + b\n",
    "emoji 😀!",
    "",
]
EXACT = 1e-4  # float32: other kernels, other order of sums


@pytest.fixture(scope="module", autouse=True)
def _quiet_offline() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


def checkpoint(folder: Path, tokenizer: PreTrainedTokenizerFast, seed: int) -> Path:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer) + 5,
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=MAX_LENGTH,
        initializer_range=0.1,
    )
    Qwen3ForCausalLM(config).float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def student_tokenizer() -> PreTrainedTokenizerFast:
    return characters()


@pytest.fixture(scope="module")
def teacher_tokenizer() -> PreTrainedTokenizerFast:
    return byte_level(120)


@pytest.fixture(scope="module")
def teacher_model(
    teacher_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return checkpoint(tmp_path_factory.mktemp("teacher"), teacher_tokenizer, seed=3)


def ends(tokenizer: PreTrainedTokenizerFast) -> Ends:
    end = tokenizer.eos_token_id
    return Ends(stop_ids=[end], text=end, turn=end)


def pair(student: PreTrainedTokenizerFast, teacher: PreTrainedTokenizerFast) -> TokenizerPair:
    return TokenizerPair(
        student, teacher, student_ends=ends(student), teacher_ends=ends(teacher), first_space=False
    )


def rollouts(
    student: PreTrainedTokenizerFast, teacher: PreTrainedTokenizerFast, texts: Sequence[str] = TEXTS
) -> list[Rollout]:
    """A completion of each text; every second one ends with an end token, and those of no text."""
    random = np.random.default_rng(0)
    made = []
    for number, text in enumerate(texts):
        ids = student(text, add_special_tokens=False)["input_ids"]
        if number % 2 == 0 or not ids:
            ids = [*ids, student.eos_token_id]
        prompt = f"question {number}: "
        made.append(
            Rollout(
                prompt=Prompt(
                    uid=str(number),
                    token_ids=np.array(student(prompt)["input_ids"], np.int32),
                    teacher_ids=np.array(teacher(prompt)["input_ids"], np.int32),
                ),
                token_ids=np.array(ids, np.int32),
                logps=-random.random(len(ids), dtype=np.float32),
                finish_reason=FinishReason.stop,
                version=0,
            )
        )
    return made


def local(model: Path, tokenizer: PreTrainedTokenizerFast, request: ScoreRequest) -> LocalTeacher:
    backend = TorchBackend(str(model), LocalTeacherConfig(dtype=DType.float32))
    vocabulary = read_vocabulary(tokenizer, matrix_size=backend.info.vocab_size)
    return LocalTeacher(backend, request=request, student=vocabulary)


@pytest.mark.parametrize("full", [False, True])
def test_a_server_scores_as_a_local_teacher_does(
    full: bool,
    teacher_model: Path,
    student_tokenizer: PreTrainedTokenizerFast,
    teacher_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    request = ScoreRequest(full=full)
    here = local(teacher_model, teacher_tokenizer, request)
    config = TeacherServerConfig(
        model=str(teacher_model), backend=TeacherBackend.torch, dtype=DType.float32
    )
    tokenizers = pair(student_tokenizer, teacher_tokenizer)
    written = rollouts(student_tokenizer, teacher_tokenizer)
    with running_teacher(config, log_path=tmp_path / "teacher.log", wait_s=300) as server:
        remote = ServerTeacher(
            server.url,
            ServerTeacherConfig(),
            request=request,
            student=read_vocabulary(teacher_tokenizer, here.info().vocab_size),
            token=server.token,
        )
        found = OwnTokenizerTeacher(remote, tokenizers, full=full).score(written)
    expected = OwnTokenizerTeacher(here, tokenizers, full=full).score(written)
    for one, other in zip(found, expected, strict=True):
        assert np.abs(one.logps - other.logps).max() < EXACT
        assert (one.hidden is not None) == (other.hidden is not None) == full
        if full:
            assert np.abs(one.hidden - other.hidden).max() < EXACT
            assert (one.spans.ids == other.spans.ids).all()


def test_the_sum_over_a_completion_is_the_models_own_log_prob_of_the_text(
    teacher_model: Path,
    student_tokenizer: PreTrainedTokenizerFast,
    teacher_tokenizer: PreTrainedTokenizerFast,
) -> None:
    model = AutoModelForCausalLM.from_pretrained(teacher_model, dtype=torch.float32).eval()
    teacher = OwnTokenizerTeacher(
        local(teacher_model, teacher_tokenizer, ScoreRequest()),
        pair(student_tokenizer, teacher_tokenizer),
        full=False,
    )
    known = [text for text in TEXTS if "😀" not in text and "日" not in text]
    for rollout in rollouts(student_tokenizer, teacher_tokenizer, known):
        (scored,) = teacher.score([rollout])
        text = student_tokenizer.decode(rollout.token_ids, skip_special_tokens=True)
        ids = teacher_tokenizer(text, add_special_tokens=False)["input_ids"]
        if rollout.token_ids[-1] == student_tokenizer.eos_token_id:
            ids = [*ids, teacher_tokenizer.eos_token_id]
        prompt = rollout.prompt.teacher_ids.tolist()
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *ids]])).logits[0].double()
        logp = torch.log_softmax(logits[len(prompt) - 1 : -1], dim=-1)
        own = logp.gather(1, torch.tensor(ids)[:, None]).sum().item()
        assert scored.logps.sum(dtype=np.float64) == pytest.approx(own, abs=EXACT * len(ids))


@pytest.mark.parametrize("unmatched", list(Unmatched))
def test_the_student_as_its_own_teacher_has_exactly_no_loss_and_no_gradient(
    unmatched: Unmatched,
    teacher_model: Path,
    teacher_tokenizer: PreTrainedTokenizerFast,
) -> None:
    request = ScoreRequest(full=True)
    plain = local(teacher_model, teacher_tokenizer, request)
    itself = pair(teacher_tokenizer, teacher_tokenizer)
    teacher = OwnTokenizerTeacher(plain, itself, full=True)
    written = rollouts(teacher_tokenizer, teacher_tokenizer)
    scored = teacher.score(written)
    for one, other in zip(scored, plain.score(written), strict=True):
        assert (one.logps == other.logps).all(), "one tokenizer: the scores of the plain teacher"
        assert (one.hidden == other.hidden).all()
    batch = collate(scored, pad_id=0)
    size = plain.info().vocab_size
    head = torch.from_numpy(teacher.head())
    hidden = batch.teacher_hidden_ND.clone().requires_grad_()
    loss = build_loss(UldLossConfig(unmatched=unmatched), itself.common(size, size))
    out = chunked_loss(
        hidden, head, batch, loss, HeadSpec(vocab_size=size), teacher_head_VD=head, chunk=5
    )
    (gradient,) = torch.autograd.grad(out.total, hidden)
    assert out.total.item() == 0.0
    assert gradient.abs().max() == 0.0
    assert out.sums["loss/uld_compared_share"] == batch.tokens


class MergedStudent:
    """A student of independent characters seen through another tokenizer: a token has the probability of its
    characters, and the rest of its distribution is one other token."""

    def __init__(self, logp: dict[bytes, float], teacher: TokenizerPair, size: int) -> None:
        self._logp, self._pair, self._size = logp, teacher, size

    def score(self, rollouts: Sequence[Rollout]) -> list[ScoredRollout]:
        return [self._score(rollout) for rollout in rollouts]

    def _score(self, rollout: Rollout) -> ScoredRollout:
        ids = rollout.token_ids.tolist()
        sums = [sum(self._logp[bytes([b])] for b in self._pair.teacher(i)) for i in ids]
        logps = np.array(sums, np.float32)
        full = np.full((len(ids), self._size), -1e4, np.float32)
        full[:, -1] = np.log1p(-np.exp(logps))
        full[np.arange(len(ids)), ids] = logps
        return ScoredRollout(rollout=rollout, logps=logps, full_logps=full)

    def info(self) -> TeacherInfo:
        return TeacherInfo(
            model="merged",
            vocab_size=self._size,
            hidden_size=4,
            tokenizer_fingerprint="",
            tokenizer_size=self._size,
            max_length=MAX_LENGTH,
        )

    def head(self, name: str | None = None) -> FloatArray:
        raise AssertionError("it sends log-probs")


def merged_case(
    student: PreTrainedTokenizerFast, teacher: PreTrainedTokenizerFast, text: str
) -> tuple[Rollout, torch.Tensor, Teacher, TokenizerPair]:
    generator = torch.Generator().manual_seed(2)
    logp_V = torch.log_softmax(torch.randn(len(student), generator=generator), dim=-1)
    tokenizers = pair(student, teacher)
    ids = student(text, add_special_tokens=False)["input_ids"]
    by_byte = {tokenizers.student(i): float(logp_V[i]) for i in range(3, len(student))}
    (rollout,) = rollouts(student, teacher, ["x"])
    written = replace(
        rollout, token_ids=np.array(ids, np.int32), logps=logp_V[ids].numpy().astype(np.float32)
    )
    return written, logp_V, MergedStudent(by_byte, tokenizers, len(teacher) + 5), tokenizers


def test_a_student_seen_through_another_tokenizer_of_the_same_text_is_at_no_distance(
    student_tokenizer: PreTrainedTokenizerFast, teacher_tokenizer: PreTrainedTokenizerFast
) -> None:
    text = "the answer is 42, and 12 + 30 = 42"
    written, logp_V, merged, tokenizers = merged_case(student_tokenizer, teacher_tokenizer, text)
    (scored,) = OwnTokenizerTeacher(merged, tokenizers, full=True).score([written])
    assert scored.spans is not None
    several = [np.sum(scored.spans.ids == n) > 1 for n in set(scored.spans.ids.tolist())]
    assert sum(several) > 5, "tokens of the teacher are several characters"
    assert np.abs(scored.logps - written.logps).max() < 1e-6
    # sampled tokens: no advantage, no gradient
    batch = collate([scored], pad_id=0)
    leaf = logp_V.repeat(batch.tokens, 1).requires_grad_()
    out = build_loss(PolicyGradientLossConfig())(leaf, batch)
    (gradient,) = torch.autograd.grad(out.total, leaf)
    assert gradient.abs().max() < 1e-5
    # distributions: a span has the same probability on both sides
    several_N = torch.from_numpy(np.isin(scored.spans.ids, np.flatnonzero(several)))
    batch = replace(batch, span_N=batch.span_N.masked_fill(~several_N, -1))
    config = UldLossConfig(unmatched=Unmatched.prefix)
    common = tokenizers.common(len(student_tokenizer), len(teacher_tokenizer) + 5)
    out = build_loss(config, common)(leaf, batch)
    (gradient,) = torch.autograd.grad(out.total, leaf)
    assert float(out.sums["loss/uld_span_share"]) == sum(several)
    assert abs(out.total.item()) < 1e-6
    assert gradient.abs().max() < 1e-5


def test_what_does_not_fit_into_the_teachers_context_is_not_scored(
    student_tokenizer: PreTrainedTokenizerFast, teacher_tokenizer: PreTrainedTokenizerFast
) -> None:
    text = "the answer is 42, and 12 + 30 = 42"
    written, _, merged, tokenizers = merged_case(student_tokenizer, teacher_tokenizer, text * 4)
    long_prompt = replace(written.prompt, teacher_ids=np.full(MAX_LENGTH - 9, 5, np.int32))
    (scored,) = OwnTokenizerTeacher(merged, tokenizers, full=True).score(
        [replace(written, prompt=long_prompt)]
    )
    assert scored.spans is not None
    left_out = scored.spans.ids < 0
    assert left_out.any()
    assert (scored.spans.ids[: left_out.argmax()] >= 0).all()
    assert left_out[left_out.argmax() :].all()
    assert (scored.logps[left_out] == written.logps[left_out]).all(), "no advantage"
    assert (scored.spans.targets >= 0).sum() <= 9
