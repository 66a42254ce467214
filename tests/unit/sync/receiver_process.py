"""A receiver of weights in a process of its own: the doors of a rollout server, no engine behind."""

import argparse
from typing import Any, cast

from fastapi import Response

from opd.rollout.app import Hosted, ServedModel, rollout_app
from opd.serving.server import serve
from opd.sync.replica import flat_bits
from opd.sync.sparse import WeightReceiver


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--port-file")
    parser.add_argument("--exit-with-parent", action="store_true")
    parser.add_argument("--bytes-of-body", type=int, default=1 << 30)
    told = parser.parse_args()
    receiver = WeightReceiver(lambda tensors, changes, version: None)
    hosted = Hosted(
        engine=cast(Any, None),
        model=ServedModel(model="none", dtype="bfloat16", max_length=1, stop_ids=[]),
        take=receiver.take,
        held=receiver.held,
    )

    def make():
        app = rollout_app(lambda: hosted, token="secret", max_body_bytes=told.bytes_of_body)

        @app.get("/state")
        def state() -> Response:
            return Response(
                b"".join(flat_bits(t).numpy().tobytes() for t in receiver.tensors().values())
            )

        return app

    serve(
        make,
        host="127.0.0.1",
        port=told.port,
        port_file=told.port_file,
        token="secret",
        variable="OPD_ROLLOUT_TOKEN",
        exit_with_parent=told.exit_with_parent,
    )


if __name__ == "__main__":
    main()
