"""Texts by a tokenizer file: the tokens are those that the tokenizers library makes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers.packing import run
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from hpctrain.convert.sources import text as tokens
from hpctrain.convert.sources.columns import text_pieces
from hpctrain.data.files.discovery import open_dataset
from hpctrain.data.reading.rows import read_rows
from hpctrain.errors import DatasetError, UsageError

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "the",
    "lazy",
    "dog",
    "und",
    "der",
    "Bär",
    "läuft",
    "東京",
    "🙂",
]


def texts() -> list[str]:
    draw = np.random.default_rng(0)
    return [" ".join(draw.choice(WORDS, draw.integers(0, 40))) + "\n" for _ in range(60)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Train a byte-level BPE, as GPT-2's, and save it with what must not count here."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<s>", "<|endoftext|>", "[stop]"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(texts(), trainer)
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", made.token_to_id("<s>"))]
    )
    made.enable_truncation(5)
    made.enable_padding(length=5)
    made.save(str(path))
    return str(path)


def expected(tokenizer: str, documents: list[str], end: str = "<|endoftext|>") -> np.ndarray:
    itself = Tokenizer.from_file(tokenizer)
    itself.no_truncation()
    itself.no_padding()
    stop = itself.token_to_id(end)
    ids = [[*itself.encode(each, add_special_tokens=False).ids, stop] for each in documents]
    return np.concatenate([np.array(each) for each in ids])


def stored(folder: Path, kind: str) -> list[str]:
    """Write the texts; return what to name them by."""
    folder.mkdir()
    if kind == "jsonl":
        for name, part in {"b-2": texts()[:25], "b-10": texts()[25:]}.items():
            lines = [json.dumps({"id": i, "text": text}) for i, text in enumerate(part)]
            (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
        return [f"{folder}/*.jsonl"]
    if kind == "parquet":
        frame = pd.DataFrame({"n": range(60), "body": texts()})
        frame.to_parquet(folder / "x.parquet", row_group_size=7)
        assert text_pieces(str(folder / "x.parquet")) == 9
        return [f"{folder}/x.parquet:body"]
    for number, text in enumerate(texts()):
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    return [str(folder)]


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_rows_are_the_tokens_of_all_texts(
    tmp_path: Path, tokenizer: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "PIECE_BYTES", 300)  # pieces end within lines and letters
    named = stored(tmp_path / "in", kind)
    whole = expected(tokenizer, texts())
    out = tmp_path / "out"
    pack = (*named, str(out), "--tokenizer", tokenizer, "--tokens", "17")
    assert "packed" in run(*pack)
    dataset = open_dataset(str(out))
    assert dataset.fields["tokens"].dtype == "uint16"
    rows = read_rows(dataset, np.arange(dataset.samples))["tokens"]
    np.testing.assert_array_equal(rows, whole[: len(rows) * 17].reshape(-1, 17))
    assert len(rows) == len(whole) // 17
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    # What is there is not turned into tokens again.
    monkeypatch.setattr(tokens, "tokenized", None)
    assert "packed already" in run(*pack)


def test_what_ends_a_text(tmp_path: Path, tokenizer: str) -> None:
    numbers = Tokenizer.from_file(tokenizer).get_vocab()
    assert tokens.vocabulary_of(tokenizer, None).end == numbers["<|endoftext|>"]
    assert tokens.vocabulary_of(tokenizer, "[stop]").end == numbers["[stop]"]
    with pytest.raises(UsageError, match=r"no token <stop>.*--end-of-text"):
        tokens.vocabulary_of(tokenizer, "<stop>")
    beside = tmp_path / "tokenizer.json"
    beside.write_bytes(Path(tokenizer).read_bytes())
    config = tmp_path / "tokenizer_config.json"
    for said in ("[stop]", {"content": "[stop]", "lstrip": False}):
        config.write_text(json.dumps({"eos_token": said}))
        assert tokens.vocabulary_of(str(beside), None).end == numbers["[stop]"]
    config.unlink()
    plain = Tokenizer(models.WordLevel({"a": 0, "b": 70_000}, unk_token="a"))
    plain.save(str(beside))
    with pytest.raises(UsageError, match="which of its tokens ends a text"):
        tokens.vocabulary_of(str(beside), None)
    assert tokens.vocabulary_of(str(beside), "b").dtype == "int32"


def test_texts_that_are_none(tmp_path: Path, tokenizer: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"txt": "b"}\n')
    (tmp_path / "b.jsonl").write_text('{"text": "a"}\n{"text": \n')
    pd.DataFrame({"text": [1, 2]}).to_parquet(tmp_path / "c.parquet")
    (tmp_path / "d.txt").write_bytes(b"\xff\xfe")
    for name, words in {
        "a.jsonl": r'a\.jsonl: the line that begins at byte 14 holds no text "text"',
        "b.jsonl": r"b\.jsonl: the line that begins at byte 14",
        "c.parquet": 'column "text" is int64, and no text',
        "d.txt": r"d\.txt: this file cannot be read",
    }.items():
        (piece,) = tokens.pieces_of([str(tmp_path / name)])
        with pytest.raises(DatasetError, match=words):
            list(tokens.documents(piece, "text"))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DatasetError, match=r"tokenizer\.json: this file cannot be read"):
        tokens.vocabulary_of(str(tmp_path / "tokenizer.json"), None)


def test_pieces_cut_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every line is in one piece, wherever pieces are cut."""
    lines = [json.dumps({"text": "x" * length}) for length in (0, 1, 5, 40, 2, 0, 3)]
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    for size in range(1, path.stat().st_size + 2):
        monkeypatch.setattr(tokens, "PIECE_BYTES", size)
        found = [
            each for p in tokens.pieces_of([str(path)]) for each in tokens.documents(p, "text")
        ]
        assert found == ["x" * length for length in (0, 1, 5, 40, 2, 0, 3)]


def test_options_that_mean_nothing(tmp_path: Path, tokenizer: str) -> None:
    with pytest.raises(UsageError, match="without --axis"):
        run("x.txt", str(tmp_path / "o"), "--tokenizer", tokenizer, "--axis", "1")
    with pytest.raises(UsageError, match=r"--end-of-text .* --tokenizer"):
        run("x.txt", str(tmp_path / "o"), "--end-of-text", "</s>")
