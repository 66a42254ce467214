"""A process with a vLLM engine leaves no file of vLLM's in the temporary folder, however it ends."""

import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import numpy as np
import pytest

from opd.config.student import DType
from opd.config.teacher import TeacherServerConfig
from opd.run.teacher_servers import running_teacher
from opd.serving.app import MEDIA_TYPE
from opd.teacher.wire import WireRequest, read_response, request_bytes

SCRIPT = Path(__file__).parent / "engine_process.py"


def files_of_vllm(folder: Path) -> list[str]:
    """All but the cache that PyTorch keeps in every temporary folder on purpose."""
    return [p.name for p in folder.iterdir() if not p.name.startswith("torchinductor_")]


@pytest.mark.parametrize(
    ("kind", "model", "ending"),
    [
        ("rollout", "student", "return"),
        ("rollout", "student", "exit"),
        ("teacher", "teacher", "kill"),
    ],
)
def test_an_engine_in_the_process_leaves_nothing(
    kind: str, model: str, ending: str, quickstart: Path, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), kind, str(quickstart / model), ending],
        env=os.environ | {"TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.stdout.splitlines()[-1:] == ["done"], done.stderr[-3000:]
    assert files_of_vllm(tmp_path) == []


def test_a_server_of_two_workers_leaves_nothing(
    quickstart: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TeacherServerConfig(
        model=str(quickstart / "teacher"),
        dtype=DType.float32,
        kv_cache_memory_bytes=32 << 20,
        tensor_parallel_size=2,
    )
    request = WireRequest(
        token_ids=np.array([4, 5, 6], np.int32),
        lengths=np.array([3], np.int32),
        starts=np.array([1], np.int32),
        vocab_size=32,
    )
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    with TemporaryDirectory() as folder:  # tmp_path is too long for the path of a socket
        monkeypatch.setenv("TMPDIR", folder)
        with running_teacher(config, log_path=tmp_path / "log", wait_s=300) as server:
            response = httpx.post(
                f"{server.url}/score",
                content=request_bytes(request),
                headers={"Authorization": f"Bearer {server.token}", "Content-Type": MEDIA_TYPE},
                timeout=1200,
            )
            assert len(read_response(response.content).logps) == 2
        deadline = time.monotonic() + 300  # the workers end by themselves, after the server
        while files_of_vllm(Path(folder)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert files_of_vllm(Path(folder)) == []
