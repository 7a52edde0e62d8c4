"""The command: what it refuses, what it shows, and a short run on the real model."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import pytest

from rslora_jax.cli import main, parser
from rslora_jax.commands.heldout import Asked, split
from rslora_jax.store import checkpoint
from tests.commands.conftest import SUMS, tiny_model

SHORT = ["--max-len", "64", "--heldout", "2", "--rank", "3", "--alpha", "7", "--batch-size", "1"]


@pytest.fixture
def smollm2():
    from rslora_jax.interop.gguf import find_smollm2

    try:
        return find_smollm2()
    except ValueError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--data", "missing.jsonl"], "missing.jsonl cannot be read"),
        (["--data", "empty.jsonl"], "empty.jsonl holds no examples"),
        (["--data", "bad.jsonl"], 'bad.jsonl:2 lacks the key "completion"'),
        (["--model", "missing.gguf"], "missing.gguf is not a file"),
        (["--model", "short.gguf"], "short.gguf"),
        (["--rank", "0"], "--rank: 0 is not a whole number of at least 1"),
        (["--alpha", "-1"], "--alpha: -1 is not a number above 0"),
        (["--resume"], "holds no checkpoint to resume from"),
        (["--out", "bad.jsonl"], "bad.jsonl is a file"),
        (["--steps", "0"], "--steps"),
        (["--batch-size", "0"], "--batch-size"),
        (["--learning-rate", "0"], "--learning-rate"),
        (["--batch-size", "6", "--accumulate", "4"], "--batch-size 6 is not a multiple of --accumulate 4"),
        (["--optimizer", "adamm"], "adamw"),
        (["--optimizer-option", "b3=0.9"], "b2"),
        (["--mesh", "data=0"], "is not a new name=size"),
        (["--distributed", "here"], "--distributed here is not HOST:PORT,PROCESSES,NUMBER"),
        (["--data", "data.xlsx"], ".parquet"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "p", "completion": "c"}\n{"prompt": "p"}\n')
    (tmp_path / "short.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    before = set(tmp_path.iterdir())
    assert main(["train", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("rslora: error: ") and said in err and err.count("\n") == 1
    assert set(tmp_path.iterdir()) == before


def test_a_target_that_is_no_weight_is_named_with_what_comes_close(smollm2, tmp_path, capsys):
    assert main(["train", "--targets", "*/q_porj/kernel", "--out", str(tmp_path / "run")]) == 2
    err = capsys.readouterr().err
    assert "matches no weight" in err and "q_proj/kernel" in err


def test_help_shows_examples_and_defaults(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "rslora train --data mine.jsonl" in text and "(default rslora-run)" in text and "--resume" in text


def test_every_flag_can_be_a_setting_of_a_resumed_run():
    saved = vars(parser().parse_args(["train", "--rank", "5", "--targets", "*/q_proj/*", "--data", "mine.jsonl"]))
    again = vars(parser(saved).parse_args(["train", "--steps", "9"]))
    assert again == saved | {"steps": 9}


@pytest.mark.parametrize("count", [1, 2, 9, 10, 11, 40])
def test_ones_own_data_are_split_and_nothing_is_lost(count, tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps({"text": f"line {n}"}) + "\n" for n in range(count)))
    found = split(Asked(str(path)))
    training, held = found.training, found.heldout
    texts = [example.completion for example in (*training, *held)]
    assert sorted(texts) == sorted(f"line {n}" for n in range(count))
    assert len(held) == max(count // 10, min(count - 1, 1))


@pytest.mark.by_day_on("oldest")
@pytest.mark.usefixtures("compile_fast")
def test_a_short_run_on_the_real_model_and_its_resume(smollm2, tmp_path, capsys):
    data = tmp_path / "mine.jsonl"
    lines = [{"question": f"What is {n} plus {n}?", "answer": f"It is {2 * n}."} for n in range(20)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "run"
    common = ["train", "--out", str(out), "--learning-rate", "0.003"]
    assert main([*common, *SHORT, "--data", str(data), "--steps", "3"]) == 0
    said = capsys.readouterr().out
    for part in ("params/layers/attn/q_proj/kernel", "parameters to train", "training data: 18 examples"):
        assert part in said
    assert "base model: " in said and "before: " in said and "after: " in said and "wanted: It is 18." in said
    first, last = map(float, re.search(r"held-out perplexity ([\d.]+) before, ([\d.]+) after 3", said).groups())
    assert last < first
    adapters, base = map(float, re.search(r"adapters ([\d.]+) MB.* not in it, ([\d.]+) MB", said).groups())
    assert 2 < adapters < 10 and base == pytest.approx(96.6, abs=0.1)
    assert main([*common, "--resume", "--steps", "4"]) == 0
    said = capsys.readouterr().out
    assert "step 4/4" in said and "rank" in said
    config, _ = checkpoint.load_adapters(out)
    assert config.rank == 3 and config.alpha == 7
    assert main([*common, "--steps", "9"]) == 2
    assert "already holds a run, at step 4" in capsys.readouterr().err


@pytest.mark.by_day_on("oldest")
def test_on_a_terminal_a_bar_shows_the_numbers_and_control_c_says_how_to_resume(tmp_path):
    """The command as a user meets it: its own process, a terminal, the key pressed while it trains."""
    model, data = tiny_model().write(tmp_path / "tiny.gguf"), tmp_path / "sums.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in SUMS))
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", "import sys; from rslora_jax.cli import main; sys.exit(main(sys.argv[1:]))"]
    environment = os.environ | {"COLUMNS": "160", "LINES": "40", "TERM": "xterm"}
    run = subprocess.Popen(
        [*command, "train", *SHORT, "--model", model, "--data", data, "--steps", "100000", "--out", "run"],
        stdout=theirs,
        stderr=theirs,
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)},
    )
    os.close(theirs)
    said, deadline, pressed = b"", time.monotonic() + 240, False
    while time.monotonic() < deadline:
        if select.select([ours], [], [], 1)[0]:
            try:
                chunk = os.read(ours, 65536)
            except OSError:
                break
            said += chunk
        if not pressed and re.search(rb" [1-9]\d*/100000", said):
            pressed = True
            run.send_signal(signal.SIGINT)
        if run.poll() is not None and not select.select([ours], [], [], 0)[0]:
            break
    text = said.decode(errors="replace")
    assert run.wait(timeout=60) == 130, text[-3000:]
    assert re.search(r"loss \d+\.\d+  ppl [\d.]+  grad [\d.]+  \d+ tok/s  [\d:]+ left", text)
    step = checkpoint.steps_in(tmp_path / "run")[-1]
    assert 1 <= step < 100_000
    assert f"stopped before step 100000; step {step} is saved; to go on: rslora train --resume --out run" in text
