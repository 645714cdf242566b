"""Texts become tokens, windows and bits per byte: by bytes and by files of Hugging Face's tokenizers."""

import json
import math
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, Commands, events
from torch.utils.data import default_collate

from distgrow.config.load import parse
from distgrow.core.errors import ConfigError
from distgrow.data.texts import texts_of
from distgrow.data.tokenized import Tokenized
from distgrow.data.tokenizer import Bytes, FromFile
from distgrow.report.runs import read
from distgrow.tasks.corpus import Corpus

GPT = {"kind": "gpt", "layers": 1, "width": 16, "heads": 2, "positions": "rotary", "mlp": "swiglu"}
DOCUMENTS = ["Ein Öhr, ein Wort.", "", "zwei Wörter — und mehr Wörter", "drei " * 90, "ß€😀" * 9]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A folder with a document in each file."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for number, document in enumerate(DOCUMENTS):
        (folder / f"{number}.txt").write_text(document, encoding="utf-8")
    return folder


@pytest.fixture
def tokenizer_file(tmp_path: Path) -> Path:
    """A byte-level BPE of 270 tokens, trained on the documents."""
    tokenizers = pytest.importorskip("tokenizers", reason="needs the extra 'tokenizers'")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(DOCUMENTS, tokenizers.trainers.BpeTrainer(vocab_size=270, initial_alphabet=alphabet))
    made.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def written(tmp_path: Path, kind: str) -> Path:
    """The documents as rows of a file."""
    file = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        file.write_text("".join(json.dumps({"n": 1, "text": each}) + "\n" for each in DOCUMENTS), encoding="utf-8")
        return file
    pa = pytest.importorskip("pyarrow", reason="needs the extra 'files'")
    from pyarrow import feather, parquet

    table = pa.table({"text": DOCUMENTS})
    parquet.write_table(table, file) if kind == "parquet" else feather.write_feather(table, str(file))
    return file


@pytest.mark.parametrize("kind", ["txt", "parquet", "arrow", "jsonl"])
def test_bytes_of_all_documents_come_back_whole_from_every_kind_of_file(kind: str, texts: Path, tmp_path: Path) -> None:
    path = texts if kind == "txt" else written(tmp_path, kind)
    made = Tokenized(texts_of(str(path), "text"), Bytes(), folder=tmp_path / "cache")
    assert [bytes(made[k].astype(np.uint8).tolist()).decode() for k in range(len(made))] == DOCUMENTS
    assert made.bytes == made.tokens == sum(len(each.encode()) for each in DOCUMENTS)
    windows = Corpus(path=str(path), tokenizer="bytes", length=10, cache=str(tmp_path / "cache")).training()
    assert [*windows[0]["input_ids"]] == [*DOCUMENTS[0].encode()[:10]]


@pytest.mark.parametrize("share", [0.01, 0.1, 0.35, 0.5, 0.9])
def test_two_parts_of_the_texts_are_the_whole_and_cut_no_character(share: float, texts: Path, tmp_path: Path) -> None:
    parts = [
        Tokenized(texts_of(str(texts), "text"), Bytes(), part=part, folder=tmp_path)
        for part in ((0.0, share), (share, 1.0))
    ]
    found = [[bytes(each[k].astype(np.uint8).tolist()).decode() for k in range(len(each))] for each in parts]
    assert "".join(found[0]) + "".join(found[1]) == "".join(DOCUMENTS)
    assert len("".join(found[0]).encode()) == pytest.approx(
        share * sum(len(each.encode()) for each in DOCUMENTS), abs=4
    )


def test_tokens_of_a_file_decode_to_the_documents_and_are_fewer(
    texts: Path, tokenizer_file: Path, tmp_path: Path
) -> None:
    tokenizer = FromFile(tokenizer_file, "task.tokenizer")
    made = Tokenized(texts_of(str(texts), "text"), tokenizer, folder=tmp_path / "cache")
    assert [tokenizer.decode(made[k].tolist()) for k in range(len(made))] == DOCUMENTS
    assert made.bytes == sum(len(each.encode()) for each in DOCUMENTS) > made.tokens
    assert made.lengths.tolist() == [len(made[k]) for k in range(len(made))]


def test_texts_that_change_or_another_tokenizer_are_tokenized_anew(
    texts: Path, tokenizer_file: Path, tmp_path: Path
) -> None:
    def tokens(tokenizer: Any) -> int:
        return Tokenized(texts_of(str(texts), "text"), tokenizer, folder=tmp_path / "cache").tokens

    before = tokens(Bytes())
    assert tokens(FromFile(tokenizer_file, "task.tokenizer")) != before
    (texts / "1.txt").write_text("four")
    assert tokens(Bytes()) == before + 4


def test_bits_per_byte_are_the_nats_of_all_tokens_by_the_bytes_of_the_text(texts: Path, tokenizer_file: Path) -> None:
    for name, end in (("bytes", None), ("bytes", 256), (str(tokenizer_file), 300)):
        settings: dict[str, Any] = {"tokenizer": name, "end": end, "cache": str(texts.parent / "cache")}
        task = Corpus(path=str(texts), test=str(texts), length=7, **settings).build(None)
        assert task.metrics is not None
        rows = [task.test[k] for k in range(len(task.test))]
        with torch.no_grad():
            found = task.metrics(task.model.eval(), default_collate(rows))
            each = [float(task.loss(task.model, default_collate([row]))) for row in rows]
        documents = Tokenized(
            texts_of(str(texts), "text"),
            Bytes() if name == "bytes" else FromFile(tokenizer_file, "t"),
            folder=texts.parent / "cache",
        )
        tokens = documents.tokens + (0 if end is None else len(DOCUMENTS))
        assert found["loss"][0] / found["loss"][1] == pytest.approx(np.mean(each), rel=1e-5)
        bits = found["bits_per_byte"][0] / found["bits_per_byte"][1]
        assert bits == pytest.approx(np.mean(each) / math.log(2) * tokens / documents.bytes, rel=1e-5)


def config(folder: Path, **task: Any) -> dict[str, Any]:
    return {
        "task": {"kind": "corpus", "tokenizer": "bytes", "length": 16, "test": 0.2, "cache": f"{folder}/cache", **task},
        "model": GPT, "growth": {"kind": "exponential", "start": {"tokens": 64}, "cap": {"tokens": 256}},
        "stages": {"every": {"tokens": 256}}, "budget": {"tokens": 1024}, "run": {"dir": str(folder / "run")},
    }  # fmt: skip


def test_a_run_on_texts_counts_tokens_and_resumes(texts: Path, tmp_path: Path) -> None:
    values = config(tmp_path, path=str(texts), end=256)
    result = parse(values).fit()
    assert result.progress.tokens == 1024
    assert parse(values).fit(resume=True).progress == result.progress
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert "mfu" not in {key for line in lines for key in line}
    assert [line["batch"] for line in lines if line["event"] == "stage"] == [4, 8, 16]


def test_a_sample_is_reproducible_and_changes_nothing_of_the_training(texts: Path, tmp_path: Path) -> None:
    made, losses = [], []
    for number, sample in enumerate((None, 12, 12)):
        values = config(tmp_path, path=str(texts), sample=sample, prompt="Ein ")
        values["model"] = {**GPT, "dropout": 0.2}
        values["run"]["dir"] = str(tmp_path / f"run{number}")
        result = parse(values).fit()
        lines = [json.loads(line) for line in (result.dir / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["loss"] for line in lines if line["event"] in ("step", "eval")])
        made.append((result.dir / "samples.jsonl").read_text() if sample else None)
        assert (result.dir / "samples.jsonl").exists() == (sample is not None)
    assert losses[0] == losses[1] == losses[2]
    assert made[1] == made[2]
    assert json.loads(str(made[1]))["made"].startswith("Ein ")
    [record] = read([str(tmp_path / "run1")])
    assert record.sample == json.loads(str(made[1]))["made"]
    assert [read([str(tmp_path / "run0")])[0].sample] == [None]


def refused(message: str, **task: Any) -> None:
    with pytest.raises(ConfigError, match=message):
        parse({"task": {"kind": "corpus", "length": 8, **task}, "budget": {"epochs": 1}}).task.build(None)


def test_texts_and_tokenizers_that_cannot_be_are_refused(texts: Path, tokenizer_file: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    rows = str(written(tmp_path, "jsonl"))
    refused(r"task.tokenizer=.*broken.json.*does not parse", path=str(texts), tokenizer=str(broken))
    refused(r"task.tokenizer=.*none.json.*cannot be read", path=str(texts), tokenizer=str(tmp_path / "none.json"))
    refused(r"vocabulary=269 .*from 270", path=str(texts), tokenizer=str(tokenizer_file), vocabulary=269)
    refused(r"vocabulary=256 .*end=256.*from 257", path=str(texts), tokenizer="bytes", vocabulary=256, end=256)
    refused("has no words", path=rows, tokenizer="bytes", column="words")
    refused("row 0 holds a int, no text", path=rows, tokenizer="bytes", column="n")
    refused("no file there", path=str(tmp_path / "nothing"), tokenizer="bytes")
    refused("too few for one window", path=str(texts), tokenizer="bytes", length=10**6)
    refused("vocabulary is not given", path=str(texts))
    refused("test=0.1 is a share of texts", path=str(texts), vocabulary=9, test=0.1)
    refused("sample=9 tokens cannot be shown", path=str(texts), vocabulary=9, sample=9)
    refused("test=0.1 is a share of one corpus", mixture=[{"path": str(texts)}], tokenizer="bytes", test=0.1)


def test_a_file_cannot_be_the_cache(texts: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    refused("cache=.*taken", path=str(texts), tokenizer="bytes", cache=str(tmp_path / "taken"))


def test_the_config_of_the_gpt_trains_and_learns(distgrow: Commands) -> None:
    """As it is, but for a smaller model and budget: on bytes that no download brings."""
    small = ["model.layers=1", "model.width=32", "task.length=32", "budget.tokens=32768", "growth.start={tokens: 512}"]
    text = Path(sysconfig.get_paths()["stdlib"]) / "argparse.py"
    small += [
        "run.dir=run",
        f"task.path={text}",
        "run.eval.every_tokens=16384",
        "task.sample=20",
        "growth.cap={tokens: 4096}",
    ]
    assert distgrow("train", str(ROOT / "configs/gpt.yaml"), *small).code == 0
    bits = [line["bits_per_byte"] for line in events(distgrow.folder / "run", "eval")]
    assert len(bits) == 2
    assert bits[-1] < 5.5 < math.log2(257)
    assert json.loads((distgrow.folder / "run/samples.jsonl").read_text())["made"].startswith("def ")


def test_a_tokenizer_that_does_not_parse_ends_with_exit_code_2(distgrow: Commands) -> None:
    (distgrow.folder / "broken.json").write_text("{")
    ended = distgrow("train", str(ROOT / "configs/gpt.yaml"), "task.tokenizer=broken.json", "run.dir=run")
    assert ended.code == 2
    assert "task.tokenizer=broken.json" in ended.err
    assert "Traceback" not in ended.err
