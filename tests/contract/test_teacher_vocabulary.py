"""One tokenizer, matrices of different sizes: common ids are scored, the mass of others reported."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from opd.batch import collate
from opd.config.loss import DivergenceLossConfig
from opd.config.student import DType
from opd.config.teacher import (
    LocalTeacherConfig,
    ServerTeacherConfig,
    TeacherBackend,
    TeacherServerConfig,
)
from opd.head import HeadSpec
from opd.losses.divergence import Divergence
from opd.run.teacher_servers import running_teacher
from opd.teacher.backend_torch import TorchBackend
from opd.teacher.client import ServerTeacher
from opd.teacher.local import LocalTeacher
from opd.teacher.vocabulary import Vocabulary, read_vocabulary
from opd.train.chunked import chunked_loss
from opd.types import DivergenceKind, FinishReason, Prompt, Rollout, ScoreRequest

ORIGINAL = Path(__file__).parents[2] / "recipes" / "quickstart" / "teacher"
SMALL, LARGE, EXACT = 32, 48, 1e-4
WHOLE = ScoreRequest(full=True)


@pytest.fixture(scope="module", autouse=True)
def _offline() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher of the quickstart with 16 rows more, which get some probability."""
    folder = tmp_path_factory.mktemp("padded")
    model = AutoModelForCausalLM.from_pretrained(ORIGINAL, dtype=torch.float32)
    torch.manual_seed(0)
    model.resize_token_embeddings(LARGE)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ORIGINAL / name, folder / name)
    return folder


def _backend(folder: Path) -> TorchBackend:
    return TorchBackend(str(folder), LocalTeacherConfig(dtype=DType.float32))


def _student(folder: Path, rows: int, added: tuple[str, ...] = ()) -> Vocabulary:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(list(added))
    return read_vocabulary(tokenizer, rows)


def _rollout() -> Rollout:
    ids = np.random.default_rng(1).integers(3, SMALL, 20).astype(np.int32)
    return Rollout(
        prompt=Prompt(uid="p", token_ids=ids[:8]),
        token_ids=ids[8:],
        logps=np.zeros(12, np.float32),
        finish_reason=FinishReason.length,
        version=0,
    )


def _truth(folder: Path, rollout: Rollout) -> torch.Tensor:
    """Probabilities [T, V] over every row of the teacher's matrix."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.from_numpy(rollout.sequence.astype(np.int64))[None]).logits[0]
    return torch.softmax(logits[len(rollout.prompt.token_ids) - 1 : -1], dim=-1)


def test_a_larger_teacher_reports_the_mass_outside(padded: Path, tmp_path: Path) -> None:
    student, rollout = _student(ORIGINAL, SMALL), _rollout()
    whole_TV = _truth(padded, rollout)
    outside = whole_TV[:, SMALL:].sum(1).numpy()
    assert outside.max() > 1e-6
    config = TeacherServerConfig(
        model=str(padded), backend=TeacherBackend.torch, dtype=DType.float32
    )
    local = LocalTeacher(_backend(padded), request=WHOLE, student=student)
    with running_teacher(config, log_path=tmp_path / "log", wait_s=300) as server:
        served = ServerTeacher(
            server.url,
            ServerTeacherConfig(),
            request=WHOLE,
            student=student,
            token=server.token,
        )
        assert served.info() == local.info()
        both = [*served.score([rollout]), *local.score([rollout])]
    common_TV = (whole_TV[:, :SMALL] / whole_TV[:, :SMALL].sum(1, keepdim=True)).log().numpy()
    for scored in both:
        assert scored.outside == pytest.approx(outside, rel=1e-3, abs=1e-9)
        assert scored.full_logps == pytest.approx(common_TV, abs=EXACT)


def test_a_smaller_teacher_leaves_the_students_padding_out() -> None:
    student, rollout = _student(ORIGINAL, LARGE), _rollout()
    local = LocalTeacher(_backend(ORIGINAL), request=WHOLE, student=student)
    (scored,) = local.score([rollout])
    assert local.vocab_size == SMALL
    assert scored.outside is None
    hidden, weight = torch.randn(12, 8), torch.randn(LARGE, 8, requires_grad=True)
    out = chunked_loss(
        hidden,
        weight,
        collate([scored], pad_id=0),
        Divergence(DivergenceLossConfig(kind=DivergenceKind.reverse_kl)),
        HeadSpec(vocab_size=SMALL),
        chunk=5,
    )
    mass = torch.softmax(hidden @ weight.detach().T, dim=-1)[:, SMALL:].sum()
    torch.testing.assert_close(out.sums["student/outside_mass"], mass)
    assert out.counts["teacher/outside_mass"] == 0, "nothing is outside: left out of the report"


def test_outside_mass_of_the_teacher_is_a_metric(padded: Path) -> None:
    local = LocalTeacher(_backend(padded), request=WHOLE, student=_student(ORIGINAL, SMALL))
    (scored,) = local.score([_rollout()])
    assert scored.outside is not None
    batch = collate([scored], pad_id=0)
    hidden, weight = torch.randn(12, 8), torch.randn(SMALL, 8)
    loss = Divergence(DivergenceLossConfig(kind=DivergenceKind.reverse_kl))
    out = chunked_loss(hidden, weight, batch, loss, HeadSpec(vocab_size=SMALL), chunk=5)
    assert float(out.sums["teacher/outside_mass"]) == pytest.approx(scored.outside.sum(), rel=1e-5)
    assert out.counts["teacher/outside_mass"] == 12
    assert "student/outside_mass" not in out.sums


def test_tokens_added_at_one_end_fit_and_others_are_refused(padded: Path) -> None:
    backend = _backend(padded)

    def fitted(student: Vocabulary) -> int:
        return LocalTeacher(backend, request=ScoreRequest(), student=student).vocab_size

    assert fitted(_student(ORIGINAL, SMALL + 2, added=("<think>", "</think>"))) == SMALL + 2
    assert fitted(_student(ORIGINAL, 64, added=("<think>",))) == LARGE
    clash = _student(ORIGINAL, 64, added=("<think>",))
    other = replace(backend.info, added_tokens={"<tool>": SMALL}, tokenizer_fingerprint="other")
    backend.info = other
    with pytest.raises(ValueError, match=f"id {SMALL} is another one on each side; choose"):
        fitted(clash)
    backend.info = replace(other, base_fingerprint="other")
    with pytest.raises(ValueError, match=r"another tokenizer.*choose a teacher"):
        fitted(clash)
