"""A child whose parent is killed ends, whenever that happens."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from opd.serving.parent import PARENT

CHILD = """
import os, sys, time
from pathlib import Path
time.sleep(float(sys.argv[2]))  # imports of libraries
from opd.serving.parent import watch_parent
watch_parent(lambda: os._exit(3))
Path(sys.argv[1]).write_text("watching")
time.sleep(600)
"""
PARENT_CODE = """
import os, subprocess, sys, time
from opd.serving.parent import parent_variable
child = subprocess.Popen([sys.executable, "-c", *sys.argv[1:]], env=os.environ | parent_variable())
print(child.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("imports_s", [0.0, 3.0], ids=["while it works", "while it starts"])
def test_a_child_ends_with_its_parent(tmp_path: Path, imports_s: float) -> None:
    mark = tmp_path / "mark"
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT_CODE, CHILD, str(mark), str(imports_s)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    while not imports_s and not mark.exists():
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs([child], timeout=120)
    assert not alive


def test_a_process_without_a_named_parent_watches_the_one_that_it_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(PARENT, raising=False)
    code = "import time; from opd.serving.parent import watch_parent; import os\n"
    code += "watch_parent(lambda: os._exit(3)); time.sleep(2)"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ, check=False).returncode == 0
