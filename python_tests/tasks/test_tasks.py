"""Task classifiers on a few prompts of four tasks: they tell them apart, know what they do not know, and keep it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import emoe
from emoe import cli, tasks
from emoe.errors import CheckpointError, ConfigError
from emoe.tasks import calibration, keywords

PROMPTS = Path(__file__).parents[1] / "data" / "tasks.jsonl"
STRANGE = [
    "",
    " \n\t",
    "今天天气很好",
    "🙂🙂",
    "qwrtz plmkn vvv",
    "\x00\x01",
    "Über den Wolken muß die Freiheit wohl grenzenlos sein",
]


def of_split(split):
    prompts = tasks.load_prompts(PROMPTS, split)
    return [prompt.prompt for prompt in prompts], [prompt.task for prompt in prompts]


@pytest.fixture(scope="module")
def words_as_embeddings():
    """A tokenizer of the prompts' words, and a table in which words of one task lie together, as a model's do."""
    split = pre_tokenizers.BertPreTokenizer()
    used: dict[str, set[str]] = {}
    for prompt in tasks.load_prompts(PROMPTS):
        for word, _ in split.pre_tokenize_str(prompt.prompt.lower()):
            used.setdefault(word, set()).add(prompt.task)
    rows = {word: row for row, word in enumerate(["?unk", *sorted(used)])}
    tokenizer = Tokenizer(models.WordLevel(rows, unk_token="?unk"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = split
    generator = torch.Generator().manual_seed(0)
    topics = {task: torch.randn(64, generator=generator) for task in ("code", "math", "summarization", "translation")}
    table = torch.randn(len(rows), 64, generator=generator)
    for word, found in used.items():
        table[rows[word]] += torch.stack([topics[task] for task in sorted(found)]).mean(dim=0)
    embedding = torch.nn.Embedding.from_pretrained(table.to(torch.bfloat16))
    return embedding, PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?unk")


@pytest.fixture(scope="module", params=["keywords", "embeddings"])
def fitted(request, words_as_embeddings):
    return tasks.make(request.param, *words_as_embeddings).fit(*of_split("train"))


def test_prompts_of_known_tasks_are_told_apart(fitted):
    matrix = fitted.confusion(*of_split("dev"))
    assert matrix.total == 12
    assert matrix.wrong == 0
    assert matrix.correct >= 0.8


def test_probabilities_sum_to_one_and_the_likeliest_is_the_answer(fitted):
    answer = fitted.classify("Translate to German: The cat is in the house.")
    assert answer.task == "translation"
    assert sum(answer.probabilities.values()) == pytest.approx(1)
    assert max(answer.probabilities, key=answer.probabilities.get) == answer.task
    assert fitted.threshold <= answer.confidence <= 1
    assert answer.milliseconds > 0


@pytest.mark.parametrize("text", STRANGE)
def test_text_like_none_of_the_tasks_is_unknown(fitted, text):
    answer = fitted.classify(text)
    assert answer.task is None
    assert sum(answer.probabilities.values()) == pytest.approx(1)


def test_a_task_that_was_not_learned_is_mostly_unknown(words_as_embeddings):
    texts, labels = of_split("train")
    for kind in tasks.KINDS:
        known = [number for number, label in enumerate(labels) if label != "summarization"]
        fitted = tasks.make(kind, *words_as_embeddings).fit([texts[i] for i in known], [labels[i] for i in known])
        matrix = fitted.confusion(*of_split("dev"))
        assert matrix.rows[-1] == "summarization"
        assert matrix.counts[-1, -1] == 3
        assert matrix.correct >= 0.9


def test_a_text_is_classified_the_same_alone_and_among_others(fitted):
    texts, _ = of_split("dev")
    together = fitted.classify_all([*texts, ""])
    for text, answer in zip([*texts, ""], together, strict=True):
        alone = fitted.classify(text)
        assert alone.task == answer.task
        assert alone.confidence == pytest.approx(answer.confidence, abs=1e-9)


def test_fitting_is_deterministic(fitted, words_as_embeddings):
    again = tasks.make(fitted.kind, *words_as_embeddings).fit(*of_split("train"))
    texts, _ = of_split("dev")
    assert [a.confidence for a in again.classify_all(texts)] == [a.confidence for a in fitted.classify_all(texts)]


def test_a_threshold_of_one_leaves_nothing_known_and_zero_leaves_only_wordless_text_unknown(words_as_embeddings):
    texts, labels = of_split("train")
    for kind in tasks.KINDS:
        strict = tasks.make(kind, *words_as_embeddings, threshold=1.0).fit(texts, labels)
        lax = tasks.make(kind, *words_as_embeddings, threshold=0.0).fit(texts, labels)
        assert strict.confusion(texts, labels).unknown == 1
        assert lax.confusion(texts, labels).unknown == 0
        assert lax.classify("").task is None


def test_a_saved_classifier_answers_as_before(fitted, words_as_embeddings, tmp_path):
    path = fitted.save(tmp_path / "tasks.safetensors")
    loaded = emoe.TaskClassifier.load(path, *words_as_embeddings)
    assert loaded.kind == fitted.kind
    texts = [*of_split("dev")[0], *STRANGE]
    for before, after in zip(fitted.classify_all(texts), loaded.classify_all(texts), strict=True):
        assert after.task == before.task
        assert after.confidence == pytest.approx(before.confidence, abs=1e-9)
    assert list(tmp_path.iterdir()) == [path]


def test_a_very_long_text_is_judged_by_its_beginning_and_end(fitted):
    begin, end = "Translate to German: The cat sleeps.", " So it does." * keywords.MOST_CHARACTERS
    text = begin + " It is a cat." * keywords.MOST_CHARACTERS + end
    other = begin + " It is a cat." * keywords.MOST_CHARACTERS + " def f(x): return x" * 20_000 + end
    assert fitted.classify(text).probabilities == fitted.classify(other).probabilities
    assert keywords.clipped(text) == keywords.clipped(other)
    assert len(keywords.clipped(text)) <= keywords.MOST_CHARACTERS + 1


def test_two_tasks_suffice_and_one_does_not(words_as_embeddings):
    texts, labels = of_split("train")
    two = [number for number, label in enumerate(labels) if label in ("math", "code")]
    for kind in tasks.KINDS:
        fitted = tasks.make(kind, *words_as_embeddings).fit([texts[i] for i in two], [labels[i] for i in two])
        assert fitted.names == ("code", "math")
        with pytest.raises(ConfigError, match="two tasks"):
            tasks.make(kind, *words_as_embeddings).fit(texts[:3], ["math"] * 3)


@pytest.mark.parametrize(
    ("texts", "labels", "said"),
    [
        (["a b", "c"], ["x"], "2 prompts and 1 tasks"),
        (["a b", "c d", "e f"], ["x", "x", "y"], "'y' has one prompt"),
        (["a b", "c d", "", " "], ["x", "x", "y", "y"], "'y' has fewer than two prompts with words"),
        ([""] * 4, ["x", "x", "y", "y"], "'x' has fewer than two prompts with words"),
    ],
)
def test_prompts_that_cannot_be_learned_from_are_named(texts, labels, said, words_as_embeddings):
    for kind in tasks.KINDS:
        with pytest.raises(ConfigError, match=said):
            tasks.make(kind, *words_as_embeddings).fit(texts, labels)


def test_keywords_are_words_that_the_task_has_and_others_have_not():
    fitted = tasks.KeywordClassifier().fit(*of_split("train"))
    assert "how" in [word for word, _ in fitted.keywords("math")]
    assert {"def", "return"} <= {word for word, _ in fitted.keywords("code")}
    assert {"translate", "german"} <= {word for word, _ in fitted.keywords("translation")}
    weights = [weight for _, weight in fitted.keywords("code")]
    assert weights == sorted(weights, reverse=True)


def test_words_of_any_script_are_found():
    assert keywords.words("Straße 12 >>> f(x)") == ["strasse", "0", ">>>", "f", "(", "x", ")"]
    assert keywords.words("今天 12") == ["今", "天", "0"]
    assert keywords.words("") == []


def test_mistakes_of_options_and_files_are_named(words_as_embeddings, tmp_path):
    with pytest.raises(ConfigError, match="keywords, embeddings"):
        tasks.make("guess")
    with pytest.raises(ConfigError, match="model and its tokenizer"):
        tasks.make("embeddings")
    with pytest.raises(ConfigError, match="threshold=2"):
        tasks.make("keywords", threshold=2)
    with pytest.raises(ConfigError, match="knows no tasks"):
        tasks.make("keywords").classify("x")
    with pytest.raises(ConfigError, match="knows no tasks"):
        tasks.make("keywords").save(tmp_path / "x")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.safetensors"):
        emoe.TaskClassifier.load(tmp_path / "nowhere.safetensors")
    (tmp_path / "bad").write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match="bad"):
        emoe.TaskClassifier.load(tmp_path / "bad")
    path = tasks.make("embeddings", *words_as_embeddings).fit(*of_split("train")).save(tmp_path / "e")
    with pytest.raises(ConfigError, match="model and its tokenizer"):
        emoe.TaskClassifier.load(path)
    with pytest.raises(ConfigError, match=r"\[5, 64\]"):
        emoe.TaskClassifier.load(path, torch.nn.Embedding(5, 64), words_as_embeddings[1])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"task": "x"}', ":1: expected an object"),
        ('{"task": "", "prompt": "y"}', ":1: expected an object"),
        ('{"task": "x", "prompt": " "}', ":1: expected an object"),
        ('{"task": "x", "prompt": "y", "reference": 3}', ":1: expected an object"),
        ('{"task": "x", "prompt": "y"}\n[]', ":2: expected an object"),
        ('{"task": "x", "prompt": "y"}\n{', ":2: not a JSON object"),
        ('{"task": "x", "prompt": "y", "split": "exam"}', "train, dev, test"),
        ("", "no prompts"),
    ],
)
def test_a_broken_prompts_file_is_refused_with_its_line(text, said, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        tasks.load_prompts(path)


def test_an_unknown_task_of_a_prompts_file_is_refused_with_those_there():
    with pytest.raises(ConfigError, match="code, math, summarization, translation"):
        tasks.load_prompts(PROMPTS, tasks=["cooking"])
    assert {prompt.task for prompt in tasks.load_prompts(PROMPTS, "dev", ["code"])} == {"code"}


def test_a_split_that_a_prompts_file_lacks_is_refused_with_those_there(tmp_path, capsys):
    path, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    rows = [("dev", "x"), ("dev", "y"), ("test", "x")]
    path.write_text("\n".join(f'{{"task": "{task}", "prompt": "a", "split": "{split}"}}' for split, task in rows))
    said = r"prompts\.jsonl: no prompts of split 'train'; its splits are: dev \(2\), test \(1\)"
    with pytest.raises(ConfigError, match=said):
        tasks.load_prompts(path, "train")
    with pytest.raises(ConfigError, match=r"no prompts of split 'test'; its splits are: dev \(1\)"):
        tasks.load_prompts(path, "test", ["y"])
    assert cli.main(["profile", "tasks", "--prompts", str(path), "--out", str(out)]) == 2
    assert re.search(said, capsys.readouterr().err)


def test_a_confusion_matrix_counts_unknown_tasks_as_right_when_they_stay_unknown():
    matrix = tasks.ConfusionMatrix.of(["a", "b"], [("a", "a"), ("a", "b"), ("b", None), ("c", None), ("c", "a")])
    assert matrix.rows == ("a", "b", "c")
    assert matrix.columns == ("a", "b", "unknown")
    assert matrix.counts.tolist() == [[1, 1, 0], [0, 0, 1], [1, 0, 1]]
    assert matrix.correct == pytest.approx(2 / 5)
    assert matrix.wrong == pytest.approx(2 / 5)
    assert matrix.unknown == pytest.approx(2 / 5)
    assert "unknown" in str(matrix).splitlines()[0]
    assert json.loads(json.dumps(matrix.to_dict()))["prompts"] == 5


def test_confidence_never_falls_when_a_signal_rises():
    generator = np.random.default_rng(0)
    inputs = generator.normal(size=(200, 2))
    fitted = calibration.Confidence.fit(inputs, inputs[:, 0] - inputs[:, 1] > 0)
    assert (fitted.weights >= 0).all()
    assert fitted(np.array([[2.0, 0.0]]))[0] > fitted(np.array([[-2.0, 0.0]]))[0]


def test_the_command_fits_prints_the_matrix_and_writes_a_file_that_loads(tmp_path, capsys):
    out = tmp_path / "tasks.safetensors"
    assert cli.main(["profile", "tasks", "--prompts", str(PROMPTS), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "unknown" in printed
    assert "ms a prompt" in printed
    assert emoe.TaskClassifier.load(out).names == ("code", "math", "summarization", "translation")
    assert cli.main(["profile", "--json", "tasks", "--prompts", str(PROMPTS), "--out", str(out)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["split"] == "dev"
    assert report["confusion"]["columns"][-1] == "unknown"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["profile"], "COMMAND"),
        (["profile", "tasks", "--out", "x"], "--prompts"),
        (["profile", "tasks", "--prompts", "/nowhere", "--out", "x"], "/nowhere"),
        (["profile", "tasks", "--prompts", str(PROMPTS), "--out", "/no/where/x"], "/no/where/x"),
        (["profile", "tasks", "--prompts", str(PROMPTS), "--out", "x", "--kind", "embeddings"], "--model"),
        (["profile", "tasks", "--prompts", str(PROMPTS), "--out", "x", "--kind", "luck"], "keywords"),
        (["profile", "sensitivity", "--prompts", str(PROMPTS), "--out", "x"], "--model"),
    ],
)
def test_a_mistake_gives_one_line_and_status_2(words, said, capsys):
    assert cli.main(words) == 2
    err = capsys.readouterr().err
    assert said in err
    assert len(err.strip().splitlines()) == 1


def test_with_two_tasks_text_that_speaks_for_neither_is_unknown():
    sums = [f"add {number} and {number + 3} to get the sum" for number in range(12)]
    words = [f"translate the word number{number} into french" for number in range(12)]
    classifier = tasks.KeywordClassifier().fit(sums + words, ["math"] * 12 + ["translation"] * 12)
    assert classifier.classify("zebra crossing tomorrow").task is None
    assert classifier.classify("add 4 and 5 to get the sum").task == "math"
