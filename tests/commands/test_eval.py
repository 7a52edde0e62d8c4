"""`rslora eval` on a tiny model, against the loss summed by hand in float64."""

import json
import math

import jax
import numpy as np
import pytest

from rslora_jax import train
from rslora_jax.cli import main
from rslora_jax.commands import runs
from rslora_jax.commands.heldout import Asked, split
from rslora_jax.models.decoder import Decoder
from rslora_jax.train import score
from rslora_jax.train.encode import encode_example

pytestmark = [pytest.mark.usefixtures("compile_fast"), pytest.mark.by_day_on("oldest")]


def by_hand(place, variables, chosen, max_len):
    """Loss and tokens of each example, one at a time, unpacked, in float64."""
    config, _, tokenizer = place.base
    sums, counts = [], []
    whole = jax.jit(Decoder(config).apply)
    for example in chosen:
        (encoded,) = encode_example(tokenizer, example)
        ids = np.asarray(encoded.ids_N)
        assert len(ids) <= max_len + 1
        padded = np.zeros((1, max_len), np.int32)
        padded[0, : len(ids) - 1] = ids[:-1]
        logits = np.asarray(whole(variables, padded)[0, : len(ids) - 1], np.float64)
        logits -= logits.max(1, keepdims=True)
        logp = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        learnt = encoded.is_learnt_N[1:]
        sums.append(-logp[np.arange(len(ids) - 1), ids[1:]][learnt].sum())
        counts.append(learnt.sum())
    return np.array(sums), np.array(counts, float)


def scored(place, capsys, tmp_path, *flags):
    assert main(["eval", *map(str, flags), "--json", str(tmp_path / "scores.json")]) == 0
    return json.loads((tmp_path / "scores.json").read_text()), capsys.readouterr().out


def test_perplexity_and_its_error_equal_float64_by_hand(place, capsys, tmp_path):
    found, shown = scored(place, capsys, tmp_path, place.folder / "one", place.folder / "two")
    held = split(Asked(str(place.folder / "sums.jsonl"))).heldout
    assert found["examples"] == len(held) == 4
    base, base_tokens = by_hand(place, place.base.variables, held, 48)
    records = {record["model"].rsplit("/")[-1]: record for record in found["models"]}
    for name, record in records.items():
        variables = place.base.variables
        if name != "base":
            lora, adapters = place.runs[name]
            variables = lora.merge(variables, adapters)
        sums, tokens = by_hand(place, variables, held, 48)
        mean = sums.sum() / tokens.sum()
        # The error of a ratio, by hand; and of the change, of which nothing is left where the two are one.
        rest = sums - mean * tokens
        error = math.sqrt(len(held) / (len(held) - 1) * (rest**2).sum()) / tokens.sum()
        change = (sums - base).sum() / tokens.sum()
        assert record["tokens"] == tokens.sum() == base_tokens.sum()
        assert record["loss"] == pytest.approx(mean, rel=1e-5)
        assert record["perplexity"] == pytest.approx(math.exp(mean), rel=1e-4)
        assert record["loss_error"] == pytest.approx(error, rel=1e-4)
        assert record["perplexity_error"] == pytest.approx(error * math.exp(mean), rel=1e-3)
        assert record["loss_change"] == pytest.approx(change, abs=1e-5)
        paired = (sums - base) - change * tokens
        want = math.sqrt(len(held) / (len(held) - 1) * (paired**2).sum()) / tokens.sum()
        assert record["loss_change_error"] == pytest.approx(want, rel=1e-3, abs=1e-6)
        assert f"{record['perplexity']:.2f} ± " in shown
    assert records["base"]["loss_change"] == 0 and "rank" not in records["base"]
    assert records["one"]["rank"] == 3 and records["one"]["step"] == 5
    assert len({record["loss"] for record in records.values()}) == 3


def test_several_sequences_of_an_example_count_as_one(place):
    config, variables, tokenizer = place.base
    texts = [train.Example("", "hello there, " * 20), train.Example("", "one"), train.Example("a", "b")]
    rows = train.prepare(tokenizer, texts, max_len=32)
    assert len(rows.sequences) > 6 and set(rows.owners) == {0, 1, 2}
    lost = score.losses(Decoder(config).apply, variables, rows, batch_size=4)
    assert lost.tokens_E.sum() == rows.statistics.loss_tokens
    for n, text in enumerate(texts):
        alone = score.losses(
            Decoder(config).apply, variables, train.prepare(tokenizer, [text], max_len=32), batch_size=4
        )
        assert lost.sums_E[n] == pytest.approx(alone.mean * alone.tokens_E[0], rel=1e-5)
        assert math.isnan(alone.error)


def test_runs_of_one_rank_share_what_is_compiled_and_keep_their_own_gamma(place):
    folders = [str(place.folder / name) for name in ("one", "two", "wide")]
    loaded = runs.load_runs(folders)
    one, two, wide = loaded.runs
    assert one.lora is two.lora is not wide.lora
    traces = []
    apply, _ = runs.program(loaded, one)

    def counted(*args, **kwargs):
        traces.append(1)
        return apply(*args, **kwargs)

    rows = train.prepare(loaded.tokenizer, split(Asked(str(place.folder / "sums.jsonl"))).heldout, max_len=48)
    lost, seen = {}, []
    for its in (None, one, two):
        apply_, variables = runs.program(loaded, its)
        assert apply_ is apply
        lost[its.name if its else "base"] = score.losses(counted, variables, rows, batch_size=2).mean
        seen.append(len(traces))
    assert len(set(seen)) == 1 and len(set(lost.values())) == 3
    # A gamma that was the other run's would show: by the run's own program it is the same.
    alone = runs.load_runs(folders[1:2])
    apply, variables = runs.program(alone, alone.runs[0])
    assert alone.runs[0].lora.sites != one.lora.sites
    assert score.losses(apply, variables, rows, batch_size=2).mean == pytest.approx(lost[folders[1]], rel=1e-5)


MATCHES = [
    ("#### 18", "#### 18", True),
    ("so 18\n####18", "x\n#### 18", True),
    ("#### $1,234", "#### 1234", True),
    ("#### 1,234.", "#### 1,234", True),
    ("#### 18.00", "#### 18", True),
    ("#### 18.5", "#### 18", False),
    ("#### -3", "#### -3", True),
    ("#### 3", "#### -3", False),
    ("#### -$3", "#### -3", True),
    ("#### 18 apples #### 19", "#### 18", True),
    ("#### 19 or #### 18", "#### 18", False),
    ("The answer is 18.", "#### 18", False),
    ("#### eighteen", "#### 18", False),
    ("#### ...", "#### 18", False),
    ("#### 1.2.3", "#### 18", False),
    ("#### 1801", "#### 180", False),
    ("", "#### 0", False),
    (" Paris\n", "Paris", True),
    ("paris", "Paris", False),
]


@pytest.mark.parametrize(("answer", "wanted", "same"), MATCHES)
def test_an_answer_matches_by_its_number(answer, wanted, same):
    assert score.is_match(answer, wanted) is same


def test_exact_match_counts_what_the_models_write(place, capsys, tmp_path):
    # What the run answers is made the right answer of every other line.
    lines = (place.folder / "sums.jsonl").read_text().splitlines()[:5]
    path, flags = tmp_path / "five.jsonl", ["--exact-match", "--max-new", "6", "--batch-size", "2"]
    path.write_text("\n".join(lines))
    run = place.folder / "one"
    found, _ = scored(place, capsys, tmp_path, run, "--data", path, *flags)
    answers = found["models"][1]["answers"]
    assert len(answers) == 5 and found["models"][0]["answers"] != answers
    records = [json.loads(line) for line in lines]
    for n in (0, 2, 4):
        records[n]["answer"] = answers[n].strip() or "nothing"
    path.write_text("\n".join(map(json.dumps, records)))
    right = sum(bool(answers[n].strip()) for n in (0, 2, 4))
    found, shown = scored(place, capsys, tmp_path, run, "--data", path, *flags)
    record = found["models"][1]
    assert right and (record["right"], record["asked"]) == (right, 5) and f"{right}/5 = " in shown
    assert record["exact_match_error"] == pytest.approx(math.sqrt(right / 5 * (1 - right / 5) / 4))


def test_the_base_alone_can_be_scored(place, capsys, tmp_path):
    lines = (place.folder / "sums.jsonl").read_text().splitlines()
    (tmp_path / "held.jsonl").write_text("\n".join(lines[9::10]))
    data = ["--data", tmp_path / "held.jsonl", "--max-len", 48]
    found, _ = scored(place, capsys, tmp_path, "--model", place.folder / "model.gguf", *data)
    beside, _ = scored(place, capsys, tmp_path, place.folder / "wide")
    assert [record["model"] for record in found["models"]] == ["base"]
    assert found["models"][0]["loss"] == pytest.approx(beside["models"][0]["loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["nowhere"], "nowhere is not a folder: give that of a run"),
        (["one", "--data", "nowhere.jsonl"], "nowhere.jsonl cannot be read"),
        (["one", "--data", "text.txt", "--exact-match"], "these examples are plain text"),
        (["one", "--heldout", "0"], "--heldout: 0 is not a whole number of at least 1"),
        (["one", "--json", "no/where.json"], "no is no folder"),
        (["one", "--exact-match", "--max-new", "127"], "exceed max_len=128"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(flags, said, place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one").symlink_to(place.folder / "one")
    (tmp_path / "one.jsonl").write_text('{"text": "alone"}\n')
    (tmp_path / "text.txt").write_text("some words")
    assert main(["eval", *flags]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rslora: error: ")]
    assert len(errors) == 1 and said in errors[0]
