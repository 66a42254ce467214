"""A rollout server as a process: ``python -m opd.run.serve --model ...``, or ``opd rollout``."""

import logging
import os
import sys
from functools import partial
from typing import TYPE_CHECKING

from opd import build

if TYPE_CHECKING:
    from opd.rollout.options import RolloutServerOptions


def main(options: "RolloutServerOptions") -> None:
    """Start the engine and serve until SIGTERM or SIGINT.

    ``ValueError`` when the address is taken, or not loopback and there is no token.
    """
    from opd.rollout.app import rollout_app
    from opd.rollout.options import TOKEN_VARIABLE
    from opd.serving.server import serve

    token = os.environ.get(TOKEN_VARIABLE)
    serve(
        lambda: rollout_app(
            partial(build.build_host, options), token=token, max_body_bytes=options.max_body_bytes
        ),
        host=options.host,
        port=options.port,
        port_file=options.port_file,
        token=token,
        variable=TOKEN_VARIABLE,
        exit_with_parent=options.exit_with_parent,
    )


if __name__ == "__main__":
    from opd.rollout.options import RolloutServerOptions
    from opd.serving.options import parse_options

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        main(parse_options(RolloutServerOptions, "python -m opd.run.serve"))
    except ValueError as error:
        sys.exit(f"opd rollout: {error}")
