"""A run packed for a support desk: what is in it, and what must not be."""

from __future__ import annotations

import json
import os
import random
import string
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from hpctrain.batch.exit_status import Outcome, write_outcome
from hpctrain.checkpoint.lease import Lease
from hpctrain.cli import main
from hpctrain.config import Config, to_toml
from hpctrain.config.toml import parse
from hpctrain.config.validate import validate
from hpctrain.errors import ConfigError
from hpctrain.observe.redacting import REDACTED, redact, toml_for_others

FORTY = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder as a job leaves it, after a hang."""
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "digits"
    step = run / "checkpoints" / "step-00000046"
    for folder in (run / "jobs", run / "stacks", step, run / "tensorboard"):
        folder.mkdir(parents=True)
    write_outcome(run, Outcome(code=70, reason="no progress (hang)", step=46, tries=2))
    (run / "config.toml").write_text('[run]\nname = "digits"\n', encoding="utf-8")
    (run / "log.txt").write_text("2026 resumes from step 23\n", encoding="utf-8")
    (run / "metrics.jsonl").write_text('{"kind": "train", "step": 46}\n', encoding="utf-8")
    record = {"git": {"commit": FORTY, "diff": "-my code\n+my secret sauce\n"}, "number": 1}
    (run / "jobs" / "1.json").write_text(json.dumps(record), encoding="utf-8")
    (run / "stacks" / "rank-1.txt").write_text("File train.py, line 3\n", encoding="utf-8")
    (run / "stacks" / "flight-recorder-rank-1.json").write_text("{}", encoding="utf-8")
    (run / "crash-rank-1.json").write_text('{"traceback": "x"}', encoding="utf-8")
    (step / "meta.json").write_text("{}", encoding="utf-8")
    for name in ("model.safetensors", "training.safetensors", "training.json"):
        (step / name).write_bytes(b"weights")
    (run / "tensorboard" / "events.out.tfevents.1").write_bytes(b"events")
    return run


def packed(*arguments: str) -> dict[str, str]:
    """Return what a bundle holds, by name."""
    target = Path("b.tar.gz")
    target.unlink(missing_ok=True)
    assert main(["bundle", *arguments, "--output", str(target)]) == 0
    assert target.stat().st_size < 5_000_000
    assert target.stat().st_mode & 0o777 == 0o600
    with tarfile.open(target) as archive:
        members = archive.getmembers()
        assert all(member.isfile() and ".." not in member.name for member in members)
        return {
            member.name.partition("/")[2]: file.read().decode()
            for member in members
            if (file := archive.extractfile(member)) is not None
        }


def test_what_tells_how_a_run_went_is_packed_and_listed(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Lease(run, {}):
        found = packed("runs/digits")
    assert set(found) == {
        *("exit.json", "lease.json", "config.toml", "log.txt", "metrics.jsonl", "jobs/1.json"),
        *("stacks/rank-1.txt", "stacks/flight-recorder-rank-1.json", "crash-rank-1.json"),
        *("checkpoints/step-00000046/meta.json", "status.txt", "files.txt", "CONTENTS.txt"),
    }
    assert "no progress (hang)" in found["status.txt"]
    assert "checkpoints" in found["files.txt"]
    record = json.loads(found["jobs/1.json"])
    assert record["git"]["commit"] == FORTY
    assert record["git"]["diff"] == "[left out: 26 characters]"
    told = capsys.readouterr().out
    assert all(name in told for name in found if name != "CONTENTS.txt")
    assert "b.tar.gz: " in told


def test_nothing_is_followed_out_of_the_run(run: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("the secret of somebody else", encoding="utf-8")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "rank-0.txt").write_text("the secret too", encoding="utf-8")
    (run / "log.txt").unlink()
    (run / "log.txt").symlink_to(secret)
    (run / "crash-rank-9.json").symlink_to(secret)
    os.mkfifo(run / "check.json")
    for file in (run / "stacks").iterdir():
        file.unlink()
    (run / "stacks").rmdir()
    (run / "stacks").symlink_to(tmp_path / "outside")
    (run / "checkpoints" / "step-00000099").symlink_to(tmp_path / "outside")
    found = packed("runs/digits")
    assert not any("secret" in name or "the secret" in text for name, text in found.items())
    assert not any(name.startswith("stacks") for name in found)
    assert "a link" in found["CONTENTS.txt"]
    assert "not a regular file" in found["CONTENTS.txt"]


def test_it_is_below_five_megabytes_whatever_is_in_it(run: Path) -> None:
    """Of what does not compress, so much that it would be 40 MB."""
    draw = random.Random(1)

    def noise(num_bytes: int) -> str:
        return "".join(draw.choices(string.ascii_letters + "\n", k=num_bytes))

    (run / "log.txt").write_text(noise(1_200_000) + "\nthe last line\n", encoding="utf-8")
    text = noise(60_000)
    for number in range(100):
        (run / "stacks" / f"rank-{number}.txt").write_text(text, encoding="utf-8")
        (run / "jobs" / f"{number}.json").write_text(text, encoding="utf-8")
    found = packed("runs/digits")
    assert found["log.txt"].endswith("the last line\n")
    assert "no room for" in found["CONTENTS.txt"]
    assert "older" in found["CONTENTS.txt"]


def test_names_are_printable_and_stay_inside(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "crash-rank-\x1b[31m\n.json").write_text("{}", encoding="utf-8")
    (run / "stacks" / "rank-\u202e.txt").write_text("x", encoding="utf-8")
    (run / "stacks" / os.fsdecode(b"rank-\xff.txt")).write_text("x", encoding="utf-8")
    found = packed("runs/digits")
    assert r"crash-rank-\x1b[31m\n.json" in found
    assert "\x1b" not in capsys.readouterr().out
    assert r"stacks/rank-\udcff.txt" in found


def test_a_damaged_folder_is_packed_too(run: Path) -> None:
    (run / "exit.json").write_bytes(b"\xff{")
    (run / "lease.json").mkdir()
    (run / "jobs" / "1.json").write_text("{", encoding="utf-8")
    (run / "jobs" / "2.json").write_text("[" * 100_000, encoding="utf-8")
    found = packed("runs/digits")
    assert "cannot be read" in found["status.txt"]
    assert found["jobs/1.json"] == "{"


def test_what_is_no_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert main(["bundle", "empty"]) == 78
    assert main(["bundle", "nowhere"]) == 78
    assert main(["bundle", "runs/digits", "--output", "runs/digits/log.txt"]) == 74
    assert main(["bundle", "runs/digits", "not-there.log"]) == 78
    told = capsys.readouterr().err
    assert "empty holds no run" in told
    assert "nowhere: No such file" in told
    assert "log.txt: File exists" in told
    assert "not-there.log cannot be packed: No such file" in told
    assert (run / "log.txt").read_text(encoding="utf-8").startswith("2026")


def test_more_files_and_a_name_of_its_own(run: Path, tmp_path: Path) -> None:
    Path("digits-7.log").write_text("srun: error\npassword=hunter2\n", encoding="utf-8")
    found = packed("runs/digits", "digits-7.log")
    assert found["more/digits-7.log"] == f"srun: error\npassword={REDACTED}\n"
    assert main(["bundle", "runs/digits"]) == 0
    assert list(tmp_path.glob(f"digits-{time.strftime('%Y')}*.tar.gz"))


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
def test_the_run_of_another_user(run: Path, tmp_path: Path) -> None:
    """Who may read the folder, but not every file in it, nor write there."""
    for folder in (tmp_path, *tmp_path.parents):
        folder.chmod(folder.stat().st_mode | 0o055)
        if folder.name.startswith("pytest-of"):
            break
    (run / "log.txt").chmod(0o600)
    other = tmp_path / "other"
    other.mkdir()
    os.chown(other, 4321, 4321)
    main(["bundle", "--help"])  # imported while this is still root
    if (child := os.fork()) == 0:
        code = 1
        try:
            os.setgroups([])
            os.setgid(4321)
            os.setuid(4321)
            os.chdir(other)
            assert "exit.json" in packed(str(run))
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    with tarfile.open(other / "b.tar.gz") as archive:
        contents = archive.extractfile("digits/CONTENTS.txt")
        assert contents is not None
        assert b"Permission denied" in contents.read()


def test_no_torch_is_loaded(run: Path) -> None:
    code = (
        "import sys; from hpctrain.cli import main; main(['bundle', 'runs/digits']);"
        "sys.exit('torch' in sys.modules or 'mpi4py' in sys.modules)"
    )
    root = str(Path(__file__).parents[3])
    environ = os.environ | {"PYTHONPATH": root}
    subprocess.run([sys.executable, "-c", code], check=True, env=environ)


@pytest.mark.parametrize(
    "text",
    [
        "https://me:SECRET@wandb.example/api",
        "git+https://SECRET@github.com/me/code.git",
        "postgres://me:SECRET@db/x?sslmode=off",
        "https://store/x?X-Amz-Signature=SECRET&a=b",
        "https://store/x?sv=1&sig=SECRET",
        "password=SECRET",
        "PASSWORD: SECRET",
        'db_password = "SECRET with spaces"',
        '{"WANDB_API_KEY": "SECRET"}',
        "{'token': 'SECRET'}",
        "export HF_TOKEN=SECRET",
        "aws_secret_access_key = SECRET/abc+def",
        "train.py --api-key SECRET --lr 1",
        "Authorization: Bearer SECRETSECRET",
        "curl -H 'Authorization: Basic SECRETSECRET'",
        "tracking.api_token=SECRET",
        "-----BEGIN OPENSSH PRIVATE KEY-----\nSECRET\nSECRET\n-----END OPENSSH PRIVATE KEY-----",
        "-----BEGIN RSA PRIVATE KEY-----\nSECRET",
        "key AKIASECRETSECRET1234 used",
        "ghp_SECRETSECRETSECRETSECRET1234567890ab",
        "glpat-SECRETSECRETSECRET12",
        "hf_SECRETSECRETSECRETSECRET1234567890",
        "eyJSECRETSECRET.eyJSECRETSECRET.SECRET",
    ],
)
def test_secrets_are_taken_out(text: str) -> None:
    found, count = redact(text)
    assert "SECRET" not in found
    assert REDACTED in found
    assert count > 0


@pytest.mark.parametrize(
    "piece", ["token", "a.", "eyJaaaaaaaa-", "x://", "password ", "-----BEGIN "]
)
def test_no_text_takes_long(piece: str) -> None:
    """Seconds at most; patterns without bounds took hours."""
    redact(piece * (300_000 // len(piece)))


def test_keys_of_weights_and_biases_are_and_commits_are_not() -> None:
    assert redact(f"wandb login {FORTY}") == (f"wandb login {REDACTED}", 1)
    for text in (f'"commit": "{FORTY}"', f"commit {FORTY}"):
        assert redact(text) == (text, 0)


@pytest.mark.parametrize(
    "text",
    [
        "tokens per second 12,345, 4 tokens",
        '"token": null, "tokens": 4096, "max_tokens = 512"',
        "tokens_per_second=12,345.5",
        "https://docs.example/page?x=1",
        '"use": "my_models:Net", "seed": 1234',
        "rank 3@n2.example.org waits for rank 1@n1",
        "lease.json: nonce 0123456789abcdef",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redact(text) == (text, 0)


MINIMAL = """
[run]
name = "watched"
[model]
use = "mlp"
in_features = 2
out_features = 1
[task]
use = "regression"
inputs = ["x"]
target = "y"
[optimizer]
use = "adamw"
lr = 0.001
[data]
train = "rows"
global_batch_size = 8
[training]
max_steps = 1
"""


def parsed(text: str) -> Config:
    config, mistakes = validate(parse(text, "run.toml"))
    assert config is not None, mistakes
    return config


def watched_config(line: str) -> Config:
    """Return a config with a line of [notify] or of the second of [[trackers]]."""
    trackers = '[[trackers]]\nuse = "builtins:dict"\n'
    head = "[notify]\n" if line.startswith("command") else f"{trackers}{trackers}"
    return parsed(f"{MINIMAL}{head}{line}\n")


@pytest.mark.parametrize(
    "line",
    [
        'api_key = "SECRET"',
        'login = {user = "me", password = "SECRET"}',
        'headers = [["X-Auth-Token", "Bearer SECRETSECRET"]]',
        'server = "https://me:SECRET@host/x"',
        'value = "hf_SECRETSECRETSECRETSECRET"',
        'arguments = {use = "x", token = "SECRET"}',
        'command = ["curl", "-d", "x", "https://hooks.example.com/services/SECRET/SECRET"]',
        'command = ["curl", "https://api.example/botSECRET/sendMessage?chat=1"]',
        'command = ["curl", "-u", "me:SECRET", "https://host.example"]',
        'command = ["curl", "-H", "Authorization: SECRET", "https://host.example"]',
        'command = ["tell", "--access-token", "SECRET"]',
        'command = ["tell", "--password=SECRET", "--to=me"]',
        'command = ["env", "TELEGRAM_TOKEN=SECRET", "tell"]',
    ],
)
def test_copies_of_a_config_hold_no_secret(line: str) -> None:
    """Others read config.toml of a run, its checkpoints and its report; a copy starts no job."""
    copy = toml_for_others(watched_config(line))
    assert "SECRET" not in copy
    assert REDACTED in copy
    with pytest.raises(ConfigError, match="holds no secrets\n  fix: take the config that"):
        toml_for_others(parsed(copy))


@pytest.mark.parametrize(
    "line",
    [
        'command = ["/home/me/bin/tell", "--to", "me@example.org", "https://host.example"]',
        'project = "digits"\nmode = "online"\nserver = "https://host.example/x"',
    ],
)
def test_a_config_without_secrets_is_copied_as_it_is(line: str) -> None:
    config = watched_config(line)
    assert toml_for_others(config) == to_toml(config)
