"""A receiver of weights in a process of its own: a rollout server's endpoints without an engine."""

import sys
from typing import Any, cast

from fastapi import FastAPI, Response

from opd.config.arguments import parse_arguments
from opd.config.serving import ServingConfig
from opd.rollout.app import EngineHost, ServedModel, rollout_app
from opd.serving.server import serve
from opd.sync.receiver import WeightReceiver
from opd.sync.replica import flat_bits

MAX_REQUEST_BYTES = 1 << 30


def main() -> None:
    """Serve as the key=value words of the command line say."""
    receiver = WeightReceiver(lambda tensors, changes, version: None)
    host = EngineHost(
        engine=cast(Any, None),
        model=ServedModel(model="none", dtype="bfloat16", max_length=1, vocab_size=1, stop_ids=[]),
        take=receiver.take,
        state=receiver.state,
    )

    def make_app() -> FastAPI:
        app = rollout_app(lambda: host, token="secret", max_request_bytes=MAX_REQUEST_BYTES)

        @app.get("/state")
        def state() -> Response:
            return Response(
                b"".join(flat_bits(t).numpy().tobytes() for t in receiver.tensors().values())
            )

        return app

    config = parse_arguments(ServingConfig, sys.argv[1:])
    serve(make_app, config, token="secret", variable="OPD_ROLLOUT_TOKEN")


if __name__ == "__main__":
    main()
