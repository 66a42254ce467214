"""How a response is sent: the exact encodings, their bytes per token, and the cheapest of them."""

from dataclasses import dataclass

from opd.config.student import DType
from opd.teacher.wire import Want
from opd.types import ScoreRequest, TeacherInfo

WIDTHS = {DType.float32: 4, DType.bfloat16: 2}  # bytes of a number


@dataclass(frozen=True, slots=True, kw_only=True)
class Transport:
    """One encoding of a response, and its size for one target token."""

    want: Want
    hidden_dtype: DType
    bytes_per_token: int

    def description(self) -> str:
        """What is sent, as text."""
        names = {
            Want.hidden: f"hidden states in {self.hidden_dtype.value}",
            Want.full_logps: "log-probs of the whole vocabulary",
            Want.logps: "log-probs of the requested ids",
        }
        return names[self.want]


def bytes_per_target(
    info: TeacherInfo,
    *,
    want: Want,
    hidden_dtype: DType = DType.float32,
    support: int = 0,
    vocab_size: int,
) -> int:
    """Size of the response for one target token, ``support`` ids wide: exact but for a short header.

    The sampled log-prob; ids, log-probs and tail of a support; the whole distribution; and the mass
    outside ``vocab_size`` where the teacher has more ids.
    """
    whole = {
        Want.logps: 0,
        Want.hidden: WIDTHS[hidden_dtype] * info.hidden_size,
        Want.full_logps: 4 * vocab_size,
    }
    outside = 4 if vocab_size < info.vocab_size else 0
    return 4 + (8 * support + 4 if support else 0) + whole[want] + outside


def transports(
    info: TeacherInfo,
    request: ScoreRequest,
    *,
    vocab_size: int,
    hidden_dtype: DType,
    named: int = 0,
) -> list[Transport]:
    """Every encoding that can carry what is requested, the cheapest first.

    A soft-capped head is not linear, so its hidden states times a matrix would not be its logits.
    ``hidden_dtype`` auto is bfloat16 for a teacher that computes in bfloat16, which loses nothing, and
    float32 otherwise. ``named`` counts the ids that a rollout's support names per token.
    """
    if hidden_dtype is DType.auto:
        hidden_dtype = DType.bfloat16 if info.dtype == DType.bfloat16.value else DType.float32
    wants = [Want.logps]
    if request.full:
        wants = [Want.full_logps, Want.hidden] if info.linear_head else [Want.full_logps]
    support = min(request.top_k, vocab_size) + (named if request.rollout_support else 0)
    found = [
        Transport(
            want=want,
            hidden_dtype=hidden_dtype,
            bytes_per_token=bytes_per_target(
                info, want=want, hidden_dtype=hidden_dtype, support=support, vocab_size=vocab_size
            ),
        )
        for want in wants
    ]
    return sorted(found, key=lambda transport: transport.bytes_per_token)


def describe_costs(
    info: TeacherInfo,
    request: ScoreRequest,
    *,
    vocab_size: int,
    hidden_dtype: DType,
    named: int = 0,
) -> str:
    """One line: what is sent, at how many bytes a token, and what the other encodings would cost."""
    chosen, *others = transports(
        info, request, vocab_size=vocab_size, hidden_dtype=hidden_dtype, named=named
    )
    line = f"{chosen.description()}, {chosen.bytes_per_token:,} bytes a token"
    for other in others:
        times = other.bytes_per_token / chosen.bytes_per_token
        line += (
            f"; {other.description()} would be {other.bytes_per_token:,}, {times:.1f} times as much"
        )
    return line
