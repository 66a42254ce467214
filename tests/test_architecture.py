"""The floors hold, heavy imports stay at home, and the light modules are light."""

import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent


def test_every_import_contract_is_kept() -> None:
    done = subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--no-cache"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def test_config_types_and_interfaces_need_no_torch() -> None:
    code = "import sys, opd.config, opd.types, opd.interfaces; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_command_line_starts_without_torch_or_vllm() -> None:
    code = (
        "import sys, opd.cli.main, opd.run.train; "
        "sys.exit(str({'torch', 'vllm', 'deepspeed', 'transformers'} & set(sys.modules)) "
        "if {'torch', 'vllm', 'deepspeed', 'transformers'} & set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_torch_distributed_stays_in_world_and_sync() -> None:
    allowed = {"world.py"}
    users = {
        path.relative_to(REPOSITORY / "opd").as_posix()
        for path in (REPOSITORY / "opd").rglob("*.py")
        if "torch.distributed" in path.read_text()
    }
    assert {u for u in users if not u.startswith("sync/")} <= allowed


def test_the_configuration_page_is_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, "docs/make_configuration.py", "--check"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_no_two_test_modules_share_a_name() -> None:
    """pytest imports them by their file's name, and stops at the second one."""
    names = sorted(path.name for path in (REPOSITORY / "tests").rglob("test_*.py"))
    assert names == sorted(set(names))
