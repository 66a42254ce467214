"""One seed per prompt, so that samples do not depend on the order of requests."""

import hashlib

from opd.types import Prompt, Sampling


def request_seed(prompt: Prompt, sampling: Sampling) -> int:
    """31 bits from the sampling seed and the prompt's uid; sample i draws from this plus i."""
    digest = hashlib.blake2b(f"{sampling.seed}:{prompt.uid}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") >> 1
