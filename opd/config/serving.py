"""Settings of every HTTP service: where it listens, and when it ends."""

from dataclasses import dataclass

from opd.config.fields import bounded

ALONE = 0.8
"""gpu_memory_utilization of a server that has its GPU to itself."""


@dataclass(kw_only=True)  # no slots: it is mixed into others
class ServingConfig:
    """Where a service listens."""

    host: str = "127.0.0.1"
    """Address to bind; anything but loopback needs a token in the environment."""
    allowed_hosts: list[str] = bounded([])
    """Names in the Host header that a service without a token accepts besides those of loopback."""
    port: int = bounded(0, least=0, most=65535)
    """Port to bind; 0 takes a free one."""
    port_file: str | None = None
    """File to write the port to once the service is ready."""
    exit_with_parent: bool = False
    """End when the process that started this one has ended."""
