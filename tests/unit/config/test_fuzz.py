"""Thousands of broken configs: each is rejected with its place and an explanation."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hpctrain.config import load, to_toml
from hpctrain.errors import ConfigError, ExitCode

ROOT = Path(__file__).parents[3]
EXAMPLES = {
    path.name: path.read_text(encoding="utf-8") for path in (ROOT / "configs").glob("*.toml")
}
MUTANTS_PER_SEED = 125
SEEDS = range(24)

NUMBERS = (
    *("0", "-1", "1", "3", "2.5", "1e309", "-1e-400", "nan", "-inf", "0x10", "0b2", "1_000", "01"),
    *("9223372036854775807", "9223372036854775808", "9" * 5000, "0x" + "f" * 5000, "1." + "0" * 99),
)
WORDS = (
    *("true", "false", "True", "none", "null", "auto", '""', '"x"', "'a/b'", '"../../etc"', '"*"'),
    *(
        '"auto"',
        '"\\u0000"',
        '"\\ud800"',
        '"ü\\u202e\\U0001F600"',
        '"\x1b[31m"',
        '"' + "ü" * 300 + '"',
    ),
    *('"""a\nb"""', "'''\n[run]\n'''", '"adamv"', '"nccl"', '"cpu"', '"bf16"', '"~/x"', '"["'),
    *('"os:path"', '"os:nothing"', '"no.such.module:Name"', '"this:s"', '":"', '"a:b:c"', '"a.b"'),
)
NESTS = (
    *("[]", "[1]", '["a"]', '["image", 1]', "{}", "{ a = 1 }", '[["a"]]', "[{}]", "{ use = {} }"),
    *("[" * 30 + "]" * 30, "[" * 3000, "[" * 3000 + "]" * 3000, "{ a = " * 500, "{a=" * 30 + "1"),
    *("1979-05-27", "07:32:00", "1979-05-27T07:32:00Z", "[1979-05-27]", "=", "#", "\ufeff1", ""),
)
VALUES = NUMBERS + WORDS + NESTS
TABLES = (
    "zzz",
    "data",
    "run.name",
    "model.x",
    "[data]",
    "[model.layers]",
    "task.arguments",
    "a" * 99,
)


class Damage:
    """One way or another to spoil a text, drawn by a seed."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)

    def spoil(self, text: str) -> str:
        """Return the text with one random piece of damage; a text too short is left alone."""
        self.lines = text.split("\n")
        self.keys = [
            number
            for number, line in enumerate(self.lines)
            if "=" in line and not line.lstrip().startswith("#")
        ]
        return self.draw.choice(self.ways)(self, text) if self.keys else text

    def _misspelt(self, word: str) -> str:
        at = self.draw.randrange(len(word) + 1)
        letter = self.draw.choice(["x", "é", " ", ".", '"', "=", "\0"])
        choices = [
            word[:at] + word[at + 1 :],
            word[:at] + letter + word[at:],
            word.upper(),
            word * 50,
        ]
        return self.draw.choice(choices)

    def _with_line(self, change: Callable[[str, str], str]) -> str:
        """Replace the line of a random key by what `change` makes of (key, line)."""
        at = self.draw.choice(self.keys)
        line = self.lines[at]
        key = line.partition("=")[0].strip()
        return "\n".join([*self.lines[:at], change(key, line), *self.lines[at + 1 :]])

    def value(self, _: str) -> str:
        return self._with_line(lambda key, _: f"{key} = {self.draw.choice(VALUES)}")

    def value_of_another_key(self, _: str) -> str:
        other = self.lines[self.draw.choice(self.keys)].partition("=")[2]
        return self._with_line(lambda key, _: f"{key} ={other}")

    def key(self, _: str) -> str:
        return self._with_line(lambda key, line: line.replace(key, self._misspelt(key), 1))

    def table_for_value(self, _: str) -> str:
        forms = [
            "{0}.inner = {1}",
            "{0} = {{ inner = {1} }}",
            "{0} = [{1}]",
            "{0}." + "a." * 99 + "b = {1}",
        ]
        form = self.draw.choice(forms)
        return self._with_line(lambda key, _: form.format(key, self.draw.choice(VALUES)))

    def drop_line(self, _: str) -> str:
        return self._with_line(lambda key, line: "")

    def double_line(self, _: str) -> str:
        return self._with_line(lambda key, line: f"{line}\n{line}")

    def move_line(self, _: str) -> str:
        moved = self.lines[self.draw.choice(self.keys)]
        return self._with_line(lambda key, line: f"{line}\n{moved}")

    def key_before_all(self, text: str) -> str:
        return self.lines[self.draw.choice(self.keys)] + "\n" + text

    def cut_end(self, text: str) -> str:
        return text[: self.draw.randrange(len(text))]

    def cut_start(self, text: str) -> str:
        return text[self.draw.randrange(len(text)) :]

    def character(self, text: str) -> str:
        at = self.draw.randrange(len(text))
        letters = [
            chr(self.draw.randrange(0x3000)),
            chr(self.draw.randrange(0x10000)),
            *"\r\t\0\"'[]{}#=.,",
        ]
        return text[:at] + self.draw.choice(letters) + text[at + self.draw.randrange(2) :]

    def new_table(self, text: str) -> str:
        return f"{text}\n[{self.draw.choice(TABLES)}]\nk = {self.draw.choice(VALUES)}\n"

    def section(self, text: str) -> str:
        headers = re.findall(r"^\[(\w+)\]", text, re.MULTILINE)
        if not headers:
            return text
        one, other = self.draw.choice(headers), self.draw.choice(headers)
        new = self.draw.choice(
            [f"[{other}]", f"[{self._misspelt(one)}]", "", f"[[{one}]]", f"[{one}.{other}]"]
        )
        return text.replace(f"[{one}]", new, 1)

    def swap_sections(self, text: str) -> str:
        """Order the sections anew: which changes nothing."""
        first, *sections = re.split(r"^(?=\[)", text, flags=re.MULTILINE)
        self.draw.shuffle(sections)
        return first + "".join(sections)

    def reverse_lines(self, _: str) -> str:
        at = self.draw.randrange(len(self.lines))
        return "\n".join([*self.lines[:at], *reversed(self.lines[at:])])

    def line_ends(self, text: str) -> str:
        return text.replace("\n", self.draw.choice(["\r\n", "\r", "\r\r\n", "\n\n", "\u2028"]))

    ways: tuple[Callable[[Damage, str], str], ...] = (
        *(value, value, value, value_of_another_key, key, key, table_for_value, drop_line),
        *(double_line, move_line, key_before_all, cut_end, cut_start, character, character),
        *(new_table, section, section, swap_sections, reverse_lines, line_ends),
    )


def mutants(seed: int) -> Iterator[bytes]:
    """Yield the files of one seed: one to five pieces of damage, sometimes in the bytes too."""
    damage = Damage(seed)
    draw = damage.draw
    for _ in range(MUTANTS_PER_SEED):
        text = EXAMPLES[draw.choice(sorted(EXAMPLES))]
        for _ in range(draw.choice([1, 1, 1, 2, 5])):
            text = damage.spoil(text)
        content = text.encode("utf-8", "surrogatepass")
        if content and draw.random() < 0.05:
            at = draw.randrange(len(content))
            content = content[:at] + bytes([draw.randrange(256)]) + content[at + 1 :]
        yield content


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory in which the examples are valid."""
    for data in ("digits", "stdlib"):
        for name in ("train", "validation"):
            (tmp_path / "data" / data / name).mkdir(parents=True)
    (tmp_path / "data" / "weather").mkdir()
    (tmp_path / "data" / "weather" / "2000.h5").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def assert_told(error: ConfigError, content: bytes) -> None:
    """Check that a refusal has the exit code, names a place and can be printed anywhere."""
    assert error.exit_code == ExitCode.CONFIG
    first, *mistakes = str(error).split("\n")
    assert all(line.isprintable() for line in (first, *mistakes)), content
    assert all(len(line) < 400 for line in (first, *mistakes)), content
    if counted := re.fullmatch(r"mutant\.toml: (\d+) mistakes?", first):
        assert int(counted[1]) == len(mistakes), content
        for line in mistakes:
            # With a line, unless a whole section is missing, which stands nowhere.
            assert re.match(r"  line \d+ +\S.*: |  +\w+(\.\w+)?: missing", line), (line, content)
    else:
        assert re.match(r"mutant\.toml, line \d+", first), (first, content)


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_the_examples_are_valid(site: Path, name: str) -> None:
    Path(name).write_text(EXAMPLES[name], encoding="utf-8")
    config = load(name)
    Path("saved.toml").write_text(to_toml(config, with_job=True), encoding="utf-8")
    assert load("saved.toml") == config


def test_the_damage_does_not_kill_everything(site: Path) -> None:
    """Else the mutants would only ever try the parser."""
    outcomes = {"syntax": 0, "mistakes": 0, "valid": 0}
    for content in mutants(0):
        (site / "mutant.toml").write_bytes(content)
        try:
            load("mutant.toml")
        except ConfigError as error:
            outcomes["mistakes" if " mistake" in str(error).split("\n")[0] else "syntax"] += 1
        else:
            outcomes["valid"] += 1
    assert min(outcomes.values()) >= MUTANTS_PER_SEED // 20, outcomes


@pytest.mark.parametrize("seed", SEEDS)
def test_mutants(site: Path, seed: int) -> None:
    path = site / "mutant.toml"
    for content in mutants(seed):
        path.write_bytes(content)
        error = None
        try:
            config = load("mutant.toml")
        except ConfigError as refusal:
            error = refusal
        if error is not None:
            assert_told(error, content)
            continue
        Path("saved.toml").write_text(to_toml(config, with_job=True), encoding="utf-8", newline="")
        assert load("saved.toml") == config, content


@pytest.mark.parametrize("seed", SEEDS)
def test_overrides(site: Path, seed: int) -> None:
    """Any text after any key is a value, or a mistake that names the override."""
    Path("c.toml").write_text(EXAMPLES["run.toml"], encoding="utf-8")
    draw = random.Random(seed)
    keys = ["run.name", "task.inputs", "data.train", "optimizer.lr", "training.compile", "zzz.a"]
    keys += ["model.use", "model.a.b.c", "run", "", "run.", "a b.c", "model" + ".x" * 40, "data.ü"]
    for _ in range(25):
        override = f"{draw.choice(keys)}{draw.choice('===:')}{draw.choice(VALUES)}"
        try:
            config = load("c.toml", [override])
        except ConfigError as refusal:
            message = str(refusal)
        else:
            Path("saved.toml").write_text(
                to_toml(config, with_job=True), encoding="utf-8", newline=""
            )
            assert load("saved.toml") == config, override
            continue
        first, *mistakes = message.split("\n")
        assert re.fullmatch(r"c\.toml: \d mistakes?", first), (message, override)
        assert all(line.startswith("  override  ") for line in mistakes), (message, override)
        assert message.replace("\n", "").isprintable(), override
