"""`hpctrain.launch(function)`: ranks from within a notebook's kernel, and from a script."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.limits import JOB_SECONDS
from jupyter_client.blocking import BlockingKernelClient
from jupyter_client.manager import KernelManager, start_new_kernel

from hpctrain.errors import LaunchError
from hpctrain.launch.function import launch
from hpctrain.launch.function_rank import CALL, Handover
from hpctrain.utils.permissions import new_private_folder

pytestmark = pytest.mark.ranks(2)

DEFINE = """
import sys
import hpctrain
from pathlib import Path

class Answer:
    def __init__(self, total):
        self.total = total

def work(value, how="return"):
    import time
    import torch
    from torch import distributed

    with hpctrain.connect() as world:
        print("rank", world.topology.rank, "is here", flush=True)
        total = torch.tensor(value)
        distributed.all_reduce(total)
        if how == "raise" and world.topology.rank == 1:
            raise KeyError("no such field")
        if how == "wait":
            Path(f"waits-{world.topology.rank}").touch()
            time.sleep(3600)
        return Answer(int(total))
"""

SCRIPT = f"""{DEFINE}
if __name__ == "__main__":
    print("total", hpctrain.launch(work, (3,), np=2).total, "mpi4py" in sys.modules)
"""


class Cell:
    """A cell that is run in a kernel, and what came of it."""

    def __init__(self, client: BlockingKernelClient, code: str) -> None:
        self._client = client
        self.id = client.execute(code)
        self.stdout = ""
        self.error: dict[str, Any] | None = None

    def wait(self) -> Cell:
        while True:
            message = self._client.get_iopub_msg(timeout=JOB_SECONDS)
            if message["parent_header"].get("msg_id") != self.id:
                continue
            content = message["content"]
            if message["msg_type"] == "stream" and content["name"] == "stdout":
                self.stdout += content["text"]
            elif message["msg_type"] == "error":
                self.error = content
            elif message["msg_type"] == "status" and content["execution_state"] == "idle":
                return self


@pytest.fixture
def kernel(tmp_path: Path) -> Iterator[tuple[KernelManager, BlockingKernelClient]]:
    manager, client = start_new_kernel(cwd=str(tmp_path), startup_timeout=JOB_SECONDS)
    try:
        yield manager, client
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


@pytest.mark.filterwarnings("ignore")  # of the kernel's own client
def test_from_a_notebook(
    kernel: tuple[KernelManager, BlockingKernelClient], tmp_path: Path
) -> None:
    manager, client = kernel
    assert Cell(client, DEFINE).wait().error is None
    cell = Cell(client, "print(type(hpctrain.launch(work, (3,), np=2)).__name__, Answer)").wait()
    assert cell.error is None
    assert cell.stdout == "rank 0 is here\nAnswer <class '__main__.Answer'>\n"

    cell = Cell(client, "hpctrain.launch(work, (3, 'raise'), np=2)").wait()
    assert cell.error is not None
    assert cell.error["ename"] == "KeyError"
    text = "\n".join(cell.error["traceback"])
    assert "rank 1@" in text
    assert "no such field" in text

    cell = Cell(client, "hpctrain.launch(work, (3, 'wait'), np=2)")
    _wait_for_files(tmp_path, client)
    manager.interrupt_kernel()
    assert cell.wait().error is not None
    assert cell.error is not None
    assert cell.error["ename"] == "KeyboardInterrupt"

    # The kernel has none of it in it, and lives.
    cell = Cell(client, "print('mpi4py' in sys.modules, 'torch' in sys.modules)").wait()
    assert cell.stdout == "False False\n"


def _wait_for_files(folder: Path, client: BlockingKernelClient) -> None:
    from helpers.waiting import wait_for

    wait_for(lambda: all((folder / f"waits-{rank}").exists() for rank in range(2)), "ranks")


def test_from_a_script(tmp_path: Path) -> None:
    """Whose main no rank runs again."""
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    ended = subprocess.run(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=JOB_SECONDS,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "rank 0 is here\ntotal 6 False\n"


def exits() -> None:
    sys.exit(3)


def test_in_one_process_it_is_a_process_of_its_own() -> None:
    assert launch(os.getpid, np=1) != os.getpid()
    with pytest.raises(SystemExit) as caught:
        launch(exits, np=1)
    assert caught.value.code == 3
    with pytest.raises(LaunchError, match="cannot be handed to other processes"):
        launch(os.getpid, (threading.Lock(),), np=1)
    with pytest.raises(LaunchError, match="at least one process is needed"):
        launch(os.getpid, np=0)


def test_within_a_world_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", "1")
    with pytest.raises(LaunchError, match="has started this process as one already"):
        launch(os.getpid, np=2)


def test_what_others_may_have_written_is_not_unpickled(tmp_path: Path) -> None:
    folder = new_private_folder("hpctrain-test-", tmp_path)
    handover = Handover(folder)
    handover.write(CALL, b"ours")
    assert handover.read(CALL) == b"ours"
    assert (folder / CALL).stat().st_mode & 0o777 == 0o600
    (folder / "planted").symlink_to(folder / CALL)
    with pytest.raises(OSError, match="symbolic links"):
        handover.read("planted")
    handover.close()
    folder.chmod(0o770)
    with pytest.raises(PermissionError, match="not this user's own"):
        Handover(folder)
    folder.chmod(0o700)
    if os.geteuid() != 0:
        pytest.skip("another user's file takes root")
    os.chown(folder, 65534, -1)
    with pytest.raises(PermissionError, match="not this user's own"):
        Handover(folder)
    os.chown(folder, 0, -1)
    os.chown(folder / CALL, 65534, -1)
    handover = Handover(folder)
    with pytest.raises(PermissionError, match="not this user's own"):
        handover.read(CALL)
    handover.close()
