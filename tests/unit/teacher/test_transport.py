"""The predicted cost of a transport agrees with its bytes, and the cheapest one is chosen."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from opd.config.student import DType
from opd.config.teacher import LocalTeacherConfig
from opd.teacher.backend_torch import TorchBackend
from opd.teacher.response import compute_hidden, score_request
from opd.teacher.transport import bytes_per_target, describe_costs, transports
from opd.teacher.wire import (
    Want,
    WireRequest,
    read_request,
    read_response,
    request_bytes,
    response_bytes,
)
from opd.types import ScoreRequest, TeacherInfo

BIG = TeacherInfo(
    model="big",
    vocab_size=151936,
    hidden_size=4096,
    tokenizer_fingerprint="f",
    tokenizer_size=151669,
    max_length=4096,
    dtype="bfloat16",
)


@pytest.fixture(scope="module")
def backend(checkpoint: Path) -> TorchBackend:
    return TorchBackend(str(checkpoint), LocalTeacherConfig(dtype=DType.float32))


def _request(vocab_size: int, **fields) -> WireRequest:
    return WireRequest(
        token_ids=np.arange(40, dtype=np.int32),
        lengths=np.array([25, 15], np.int32),
        starts=np.array([3, 1], np.int32),
        vocab_size=vocab_size,
        **fields,
    )


CASES = {
    "sampled": {},
    "top-k": {"top_k": 5},
    "union": {"top_k": 5, "named_ids": np.tile(np.arange(4, dtype=np.int32), (36, 1))},
    "whole": {"want": Want.full_logps},
    "hidden": {"want": Want.hidden},
    "half": {"want": Want.hidden, "hidden_dtype": DType.bfloat16},
}


@pytest.mark.parametrize("vocab_size", [97, 91])
@pytest.mark.parametrize("case", CASES)
def test_predicted_bytes_are_those_of_a_real_response(
    case: str, vocab_size: int, backend: TorchBackend
) -> None:
    request = read_request(request_bytes(_request(vocab_size, **CASES[case])))
    (hidden_ND,) = compute_hidden(backend, [request])
    body = response_bytes(score_request(backend, request, hidden_ND))
    payload = len(body) - 8 - int.from_bytes(body[:8], "little")
    predicted = bytes_per_target(
        backend.info,
        want=request.want,
        hidden_dtype=request.hidden_dtype,
        support=request.support_width(),
        vocab_size=vocab_size,
    )
    assert payload == 36 * predicted
    if case == "half":
        assert predicted <= 2 * backend.info.hidden_size + 64
        bits = read_response(body).hidden
        assert bits is not None
        assert bits.dtype == np.uint16
        assert torch.equal(torch.from_numpy(bits).view(torch.bfloat16), hidden_ND.bfloat16())


def test_mass_outside_the_common_ids_is_that_of_the_whole_softmax(backend: TorchBackend) -> None:
    (hidden_ND,) = compute_hidden(backend, [_request(97)])
    response = score_request(backend, _request(91, temperature=0.5), hidden_ND)
    whole_NV = torch.softmax(hidden_ND @ backend.head_VD.T / 0.5, dim=-1)
    assert response.outside == pytest.approx(whole_NV[:, 91:].sum(1).numpy(), rel=1e-4)
    assert score_request(backend, _request(97), hidden_ND).outside is None


def test_the_cheapest_exact_transport_is_chosen_and_described() -> None:
    whole = ScoreRequest(full=True)
    chosen, other = transports(BIG, whole, vocab_size=151936, hidden_dtype=DType.auto)
    assert (chosen.want, chosen.hidden_dtype) == (Want.hidden, DType.bfloat16)
    assert (chosen.bytes_per_token, other.bytes_per_token) == (8196, 607748)
    line = describe_costs(BIG, whole, vocab_size=151936, hidden_dtype=DType.auto)
    assert line == (
        "hidden states in bfloat16, 8,196 bytes a token; log-probs of the whole vocabulary would be "
        "607,748, 74.2 times as much"
    )
    precise = replace(BIG, dtype="float32")
    chosen, _ = transports(precise, whole, vocab_size=151936, hidden_dtype=DType.auto)
    assert (chosen.hidden_dtype, chosen.bytes_per_token) == (DType.float32, 16388)
    narrow, _ = transports(BIG, whole, vocab_size=100, hidden_dtype=DType.auto)
    assert (narrow.want, narrow.bytes_per_token) == (Want.full_logps, 408)
    capped = replace(BIG, linear_head=False)
    (only,) = transports(capped, whole, vocab_size=151936, hidden_dtype=DType.auto)
    assert only.want is Want.full_logps
    (short,) = transports(BIG, ScoreRequest(top_k=32), vocab_size=151936, hidden_dtype=DType.auto)
    assert short.bytes_per_token == 4 + 4 + 32 * 8
