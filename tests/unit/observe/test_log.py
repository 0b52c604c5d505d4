"""The log of one speaking rank, the silence of the others, and no trace of either afterwards."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.limits import JOB_SECONDS

from hpctrain.errors import CheckpointError, ConfigError
from hpctrain.observe import log
from hpctrain.observe.progress import Progress
from hpctrain.utils.streams import quiet_native_libraries

ours = logging.getLogger("hpctrain.training.job")
theirs = logging.getLogger("some.library")


@pytest.fixture(autouse=True)
def nothing_leaks() -> Iterator[None]:
    def state() -> tuple[object, ...]:
        root, package = logging.getLogger(), logging.getLogger("hpctrain")
        return (
            list(root.handlers),
            root.level,
            list(package.handlers),
            package.level,
            list(warnings.filters),
            warnings.showwarning,
        )

    before = state()
    yield
    assert state() == before


def test_console_and_file(tmp_path: Path) -> None:
    console = io.StringIO()
    (tmp_path / "log.txt").write_text("an earlier job\n", encoding="utf-8")
    with log.start(tmp_path, is_reporter=True, stream=console):
        ours.info("run %s\n  folder  runs/ü\n", "digits")
        ours.debug("not told")
        ours.warning("slow disk")
        ours.error("no disk")
        theirs.info("not told")
        theirs.warning("careful")
    assert console.getvalue() == (
        "run digits\n  folder  runs/ü\n\n"
        "warning: slow disk\nerror: no disk\nwarning: some.library: careful\n"
    )
    earlier, *lines = (tmp_path / "log.txt").read_text(encoding="utf-8").splitlines()
    assert earlier == "an earlier job"
    stamp = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
    assert all(re.match(stamp, line) for line in lines)
    assert [re.sub(stamp, "", line) for line in lines] == [
        "  run digits",
        "    folder  runs/ü",
        "",
        "  warning: slow disk",
        "  error: no disk",
        "  warning: some.library: careful",
    ]


@pytest.mark.filterwarnings("always")
def test_warnings_of_other_ranks_are_in_one_file(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for rank in (3, 7):
        with log.start(tmp_path, is_reporter=False, who=f"rank {rank} on nid1"):
            ours.info("not told")
            ours.warning("slow\ndisk \x1b[31m")
            theirs.error("careful")
            warnings.warn("deprecated", FutureWarning, stacklevel=1)
            for count in range(300):
                ours.warning("again %d", count) if rank == 7 else None
    assert capfd.readouterr() == ("", "")
    told = [line[21:] for line in (tmp_path / "ranks.log").read_text().splitlines()]
    assert told[:3] == [
        "rank 3 on nid1: warning: slow",
        r"rank 3 on nid1: disk \x1b[31m",
        "rank 3 on nid1: error: some.library: careful",
    ]
    assert "rank 3 on nid1: warning: deprecated (FutureWarning" in told[3]
    assert [line[:14] for line in told[:5]] == [*["rank 3 on nid1"] * 4, "rank 7 on nid1"]
    assert len(told) == 4 + log.MOST_LINES + 1
    assert told[-1] == f"rank 7 on nid1: no more than {log.MOST_LINES} lines of a rank"
    # None of its folder, and none without a warning.
    with log.start(tmp_path / "absent", is_reporter=False, who="rank 1 on nid1"):
        ours.warning("lost")
    with log.start(tmp_path, is_reporter=True, stream=io.StringIO(), who="rank 0 on nid0"):
        ours.warning("in log.txt")
    assert len((tmp_path / "ranks.log").read_text().splitlines()) == len(told)
    (tmp_path / "ranks.log").unlink()
    (tmp_path / "ranks.log").symlink_to(tmp_path / "planted")
    with log.start(tmp_path, is_reporter=False, who="rank 1 on nid1"):
        ours.warning("lost")
    assert not (tmp_path / "planted").exists()
    (tmp_path / "ranks.log").unlink()
    monkeypatch.setenv("HPCTRAIN_LOG", "debug")
    with log.start(tmp_path, is_reporter=False, who="rank 1 on nid1"):
        ours.debug("in detail")
        theirs.debug("not ours")
    assert (tmp_path / "ranks.log").read_text().endswith("rank 1 on nid1: in detail\n")


def test_what_the_environment_asks_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPCTRAIN_LOG", "debug, JSON")
    console = io.StringIO()
    with log.start(tmp_path, is_reporter=True, stream=console, who="rank 0 on nid1"):
        ours.debug("in detail")
        theirs.warning("two\nlines")
    assert console.getvalue() == "in detail\nwarning: some.library: two\nlines\n"
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(line["level"], line["logger"], line["rank"], line["message"]) for line in lines] == [
        ("debug", ours.name, "rank 0 on nid1", "in detail"),
        ("warning", theirs.name, "rank 0 on nid1", "two\nlines"),
    ]
    monkeypatch.setenv("HPCTRAIN_LOG", "debug,verbos")
    with pytest.raises(ConfigError, match="'verbos' is none of debug, json"), log.start(None, True):
        raise AssertionError


def test_other_ranks_are_silent(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with log.start(tmp_path, is_reporter=False):
        ours.error("an error")
        theirs.error("an error")
        warnings.simplefilter("always")
        warnings.warn("a warning", UserWarning, stacklevel=1)
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_without_a_folder_there_is_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with log.start(None, is_reporter=True):
        ours.info("hello")
    assert capsys.readouterr() == ("", "hello\n")
    assert list(tmp_path.iterdir()) == []


def test_restored_after_an_error(tmp_path: Path) -> None:
    with (
        pytest.raises(ZeroDivisionError),
        log.start(tmp_path, is_reporter=True, stream=io.StringIO()),
    ):
        raise ZeroDivisionError


def test_unwritable_folder(tmp_path: Path) -> None:
    folder = tmp_path / "missing"
    with pytest.raises(CheckpointError) as caught, log.start(folder, is_reporter=True):
        pass
    assert str(folder / "log.txt") in str(caught.value)
    assert "run.directory" in str(caught.value)


def warn_at(line: int, message: str, filename: str = "/env/site-packages/lib/net.py") -> None:
    warnings.warn_explicit(message, UserWarning, filename, line)


def told(messages: list[tuple[int, str]]) -> list[str]:
    console = io.StringIO()
    with log.start(None, is_reporter=True, stream=console):
        warnings.simplefilter("always")
        for line, message in messages:
            warn_at(line, message)
    return console.getvalue().splitlines()


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([(3, "bad\n  shape")], ["warning: bad shape (UserWarning, lib/net.py:3)"]),
        # Once per text, wherever it comes from.
        ([(3, "a"), (3, "a"), (4, "a")], ["warning: a (UserWarning, lib/net.py:3)"]),
        (
            [(3, "a"), (3, "b"), (5, "c")],
            [
                "warning: a (UserWarning, lib/net.py:3)",
                "warning: b (UserWarning, lib/net.py:3)",
                "warning: c (UserWarning, lib/net.py:5)",
            ],
        ),
        # A number in the text does not make it news for ever.
        (
            [(3, f"step {i}") for i in range(50)],
            [f"warning: step {i} (UserWarning, lib/net.py:3)" for i in range(3)],
        ),
    ],
)
def test_warnings_are_told_once(messages: list[tuple[int, str]], expected: list[str]) -> None:
    assert told(messages) == expected


@pytest.mark.parametrize(
    ("filename", "expected"),
    [
        ("/opt/env/lib/python3.11/site-packages/torch/nn/loss.py", "torch/nn/loss.py"),
        ("/usr/lib/python3/dist-packages/h5py/x.py", "h5py/x.py"),
        ("{here}/models/net.py", "models/net.py"),
        ("/elsewhere/net.py", "/elsewhere/net.py"),
        ("<string>", "<string>"),
    ],
)
def test_origin(
    filename: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert log.short_path(filename.format(here=tmp_path)) == expected


PROGRAM = """
import warnings
from hpctrain.observe import log
with log.start(None, is_reporter=True):
    warnings.warn("`broadcast_buffers` is deprecated. Use ...", FutureWarning)
    warnings.warn("`something` is deprecated. Use ...", FutureWarning)
"""


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], ["warning: `something` is deprecated. Use ... (FutureWarning, <string>:6)"]),
        # Whoever asks for warnings sees them all.
        (
            ["-W", "default"],
            [
                "warning: `broadcast_buffers` is deprecated. Use ... (FutureWarning, <string>:5)",
                "warning: `something` is deprecated. Use ... (FutureWarning, <string>:6)",
            ],
        ),
    ],
)
def test_meaningless_warnings(options: list[str], expected: list[str]) -> None:
    result = subprocess.run(
        [sys.executable, "-E", *options, "-c", PROGRAM],
        capture_output=True,
        text=True,
        check=True,
        timeout=JOB_SECONDS,
    )
    assert result.stderr.splitlines() == expected


def test_library_handlers_do_not_bypass_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_LOGS", raising=False)
    library, own = logging.getLogger("torch._tested"), io.StringIO()
    handler = logging.StreamHandler(own)
    library.addHandler(handler)
    library.propagate = False
    try:
        console = io.StringIO()
        with log.start(None, is_reporter=True, stream=console):
            library.warning("recompiling")
        assert console.getvalue() == "warning: torch._tested: recompiling\n"
        assert library.handlers == [handler]
        assert not library.propagate
        # Whoever has asked for torch's logs gets them as torch writes them.
        monkeypatch.setenv("TORCH_LOGS", "+dynamo")
        with log.start(None, is_reporter=True, stream=console):
            library.warning("again")
        assert own.getvalue() == "again\n"
    finally:
        library.removeHandler(handler)
        library.propagate = True


def test_lines_go_above_the_bar() -> None:
    console = io.StringIO()
    with log.start(None, is_reporter=True, stream=console):
        progress = Progress(10, mode="bar", stream=console, clock=lambda: 0.0)
        progress.update(3, 0)
        before = len(console.getvalue())
        ours.info("saved")
        cleared, line, redrawn = console.getvalue()[before:].rpartition("saved\n")
        progress.close()
    assert line
    assert cleared.strip("\r ") == ""
    assert len(cleared) > 80  # the whole bar was wiped out
    assert redrawn.startswith("\r 30%|")


def test_full_disk_costs_lines_not_the_job(tmp_path: Path) -> None:
    console = io.StringIO()
    with (
        log.start(tmp_path, is_reporter=True, stream=console),
        Path("/dev/full").open("wb") as full,
    ):
        (handler,) = (h for h in logging.root.handlers if isinstance(h, log.RunLogHandler))
        os.dup2(full.fileno(), handler.stream._file._file.fileno())
        ours.info("one")
        ours.info("two")
    first, warning, second = console.getvalue().splitlines()
    assert (first, second) == ("one", "two")
    assert warning.startswith("warning: ")
    assert "log.txt has gaps" in warning
    assert "No space left" in warning


@pytest.mark.parametrize(
    ("environ", "expected"), [({}, "ERROR"), ({"TORCH_CPP_LOG_LEVEL": "INFO"}, "INFO")]
)
def test_native_libraries_are_quiet_unless_asked(environ: dict[str, str], expected: str) -> None:
    quiet_native_libraries(environ)
    assert environ == {"TORCH_CPP_LOG_LEVEL": expected}


# Of NCCL 2.32.3 as nvidia-nccl-cu12 of PyPI has it, with NCCL_DEBUG=INFO on a node without a GPU;
# the names of host and network are ours. It prints to stdout, what it warns of too.
NCCL = """\
n0:11733:11733 [0] NCCL INFO ENV/Plugin: Could not find: libnccl-env.so
n0:11733:11733 [0] NCCL INFO Bootstrap: Using eth0:192.0.2.2<0>

[2026-11-29 17:28:15] n0:11733:11733 [0] misc/cudawrap.cc:329 (initOnceFunc) NCCL WARN Cuda \
failure 'CUDA driver version is insufficient for CUDA runtime version'
n0:11733:11774 [0] NCCL INFO Socket handshake magic 0x564ab9f2fc4b9d6c (built-in default)
"""

NATIVE = """
import ctypes, os, signal, subprocess, sys
from pathlib import Path
from hpctrain.observe import log

with log.start(Path(sys.argv[1]), is_reporter=False, who="rank 3 on n0"):
    print("of Python", file=sys.stderr)
    os.write(2, b"NCCL WARN no route\\x1b[31m\\nhalf of")
    os.write(2, b" a line\\n")
    script = "echo of a child >&2; yes filler | head -n $0 >&2"
    subprocess.run(["sh", "-c", script, sys.argv[2]])
    print("of Python, too")
    libc = ctypes.CDLL(None)
    for line in sys.argv[4].encode().splitlines():
        libc.puts(line)
        libc.fflush(None)
    os.write(1, b"no line feed, " + b"x" * 5000)
    os.write(2, b"Fatal error in MPI_Recv")
    if sys.argv[3] != "0":
        os.kill(os.getpid(), int(sys.argv[3]))
os.write(2, b"\\nafterwards\\n")
print("of Python afterwards", file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("variable", "value", "number", "is_tagged"),
    [
        ("HPCTRAIN_LOG", "native", 0, True),
        ("HPCTRAIN_LOG", "native", int(signal.SIGKILL), True),
        ("NCCL_DEBUG", "WARN", int(signal.SIGABRT), True),
        ("HPCTRAIN_LOG", "json", 0, False),
    ],
)
def test_what_c_libraries_print_is_tagged(
    tmp_path: Path, variable: str, value: str, number: int, is_tagged: bool
) -> None:
    """With rank and host, in ranks.log as on stderr, to the last byte before a rank is killed."""
    ended = subprocess.run(
        [
            sys.executable,
            "-c",
            NATIVE,
            str(tmp_path),
            "300000" if number else "3",
            str(number),
            NCCL,
        ],
        env={"PATH": os.environ["PATH"], variable: value},
        capture_output=True,
        text=True,
        timeout=JOB_SECONDS,
        check=False,
    )
    assert ended.returncode == -number
    lines = ended.stderr.splitlines()
    assert {"of Python", "NCCL WARN no route\x1b[31m", "half of a line", "of a child"} < set(lines)
    assert lines.count("filler") == (300_000 if number else 3)
    assert "Fatal error in MPI_Recv" in ended.stderr
    unended = f"no line feed, {'x' * 5000}"
    assert f"{NCCL}{unended}" in ended.stdout
    path = tmp_path / log.RANKS_FILE
    if not is_tagged:
        assert not path.exists()
        return
    assert path.stat().st_size < 1_100_000
    found = path.read_text(encoding="utf-8").splitlines()
    assert all(re.match(r"\S+ \S+  rank 3 on n0: std(out|err): ", line) for line in found)
    errors, out = (
        [part[1] for line in found if (part := line.split(name, 1))[1:]]
        for name in (" stderr: ", " stdout: ")
    )
    assert errors[:3] == [r"NCCL WARN no route\x1b[31m", "half of a line", "of a child"]
    if number:
        assert found[-1].endswith("no more than 1,048,576 bytes of a rank")
        return
    assert errors[3:] == ["filler"] * 3 + ["Fatal error in MPI_Recv"]
    assert {"afterwards", "of Python afterwards"} < set(lines)
    told = [line for line in NCCL.splitlines() if line]
    assert out[: len(told)] == told
    assert "".join(out[len(told) :]) == unended
    assert max(map(len, out)) <= 2000
