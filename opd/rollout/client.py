"""A rollout engine behind HTTP."""

from collections.abc import Sequence

from opd.interfaces import Progress
from opd.rollout.wire import GenerateRequest, read_answer, request_bytes
from opd.serving.client import ServiceClient
from opd.serving.server import MEDIA_TYPE
from opd.types import Prompt, Rollout, Sampling

REMEDY = "is it running? (start one with `opd rollout --model MODEL --port PORT`)"
WHAT = "the rollout server"


class ServerRollouts:
    """Implements ``RolloutEngine``. The weight sync marks the version.

    A server that holds other weights than those of the version marked is asked again, as one that
    does not answer: a server that was started anew gets its weights meanwhile.
    ``ConnectionError`` when it stays away or behind.
    """

    def __init__(self, service: ServiceClient, *, run: str, progress: Progress) -> None:
        self._service = service
        self._run = run
        self._version = 0
        self._progress = progress

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Rollout]:
        if not prompts:
            return []
        request = GenerateRequest(
            prompts=list(prompts), sampling=sampling, run=self._run, version=self._version
        )
        with self._progress.track("rollout", len(prompts)) as advance:
            answer = self._service.send(
                "POST", "/generate", request_bytes(request), {"Content-Type": MEDIA_TYPE}
            )
            rollouts = read_answer(answer.content, prompts, sampling)
            advance(len(prompts))
        return rollouts

    def mark(self, version: int) -> None:
        """The weights are now those after ``version`` optimizer steps; servers must have them."""
        self._version = version
