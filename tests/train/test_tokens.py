"""The tokens of a data set are the same from this process, from workers, and from the cache."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import textwrap
import warnings
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from rslora_jax.train import tokens as module
from rslora_jax.train.batches import heldout_batches, prepare
from rslora_jax.train.bytelevel import ByteTokenizer
from rslora_jax.train.cache import file_for, load
from rslora_jax.train.encode import encode_example
from rslora_jax.train.examples import Example, Message
from rslora_jax.train.tokens import tokenise
from rslora_jax.train.workers import map_in_processes

pytestmark = pytest.mark.by_day_on("newest")

CHAT = (Message("user", "What is 2 + 2?"), Message("assistant", "the number 4"), Message("user", "Sure?"))
EXAMPLES = [
    example
    for n in range(40)
    for example in (
        Example(f"What is the sum of {n} and {n}?", f"the answer is {2 * n} é∑", origin=f"sums:{n}"),
        Example(CHAT, f"the number {n}"),
        Example("", f"def f{n}(x):\n    return x\n"),
    )
]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(module, "CHARACTERS_A_CHUNK", 300)


def assert_same(left, right) -> None:
    for a, b in zip(left, right, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_workers_give_the_tokens_of_each_example_in_order_and_report(make_tokenizer):
    tokenizer, reports = make_tokenizer("reasoning"), []
    tokens = tokenise(tokenizer, EXAMPLES, workers=2, progress=lambda done, total: reports.append((done, total)))
    for found, example in zip(tokens.by_example(), EXAMPLES, strict=True):
        expected = encode_example(tokenizer, example)
        assert len(found) == len(expected) == (2 if example.prompt == CHAT else 1)
        for left, right in zip(found, expected, strict=True):
            assert_same((left.ids_N, left.is_learnt_N), (right.ids_N, right.is_learnt_N))
    assert_same(tokens, tokenise(tokenizer, EXAMPLES, workers=1))
    assert len(reports) > 10 and reports == sorted(set(reports)) and reports[-1] == (120, 120)


@pytest.mark.nightly
def test_the_first_bad_example_is_the_error_whoever_meets_it(make_tokenizer):
    examples = [
        *EXAMPLES[::3],
        Example(CHAT, "x", origin="mine:7"),
        *EXAMPLES[::3],
        Example(CHAT, "x", origin="mine:8"),
    ]
    messages = []
    for workers in (1, 2):
        with pytest.raises(ValueError) as caught:
            tokenise(make_tokenizer(None), examples, workers=workers)
        messages.append((type(caught.value), str(caught.value)))
    assert messages[0] == messages[1]
    assert messages[0][1].startswith("mine:7 cannot be encoded: it is a chat of several turns")


def has_started_devices(item: str) -> bool:
    print("what a worker prints is no answer")
    if item == "die":
        os._exit(3)
    # Once devices are started, the setting has no effect any more.
    jax.config.update("jax_platforms", "no such platform")
    try:
        jax.devices()
    except RuntimeError:
        return False
    return True


def test_a_worker_starts_no_devices_and_its_death_is_told():
    answers = map_in_processes(has_started_devices, ["tell", "die"], workers=1)
    assert next(answers) is False
    with pytest.raises(ValueError, match=r"came to an early end \(exit status 3\).* give fewer workers"):
        next(answers)


def test_a_script_without_a_main_guard_is_not_run_again_by_its_workers(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(f"""
            import sys
            sys.path.append({str(Path(__file__).parents[2])!r})
            print("begun")
            from rslora_jax.train.workers import map_in_processes
            print(list(map_in_processes(len, ["a", "bcd"], workers=1)))
            from rslora_jax.train import Example, bytelevel, prepare
            class Own(bytelevel.ByteTokenizer): pass
            try:
                prepare(Own(), [Example("a", "b")], max_len=4, workers=2)
            except ValueError as error:
                print(error)
        """)
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment)
    begun, answers, refusal = run.stdout.splitlines()
    assert (begun, answers) == ("begun", "[1, 3]")
    assert refusal.startswith("the class Own of the tokenizer is defined in the script")


@pytest.mark.parametrize(("characters", "cores", "workers"), [(10, 8, 1), (2**21, 8, 1), (2**23, 8, 4), (2**25, 8, 8)])
def test_the_default_number_of_workers_grows_with_the_data_up_to_the_cores(
    make_tokenizer, monkeypatch, characters, cores, workers
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(cores), raising=False)
    half = Example("x" * (characters // 2), "")
    chat = Example((Message("user", "x" * (characters // 2)),), "")
    assert module.workers_for(ByteTokenizer(), [half, chat]) == workers
    unpicklable = dataclasses.replace(make_tokenizer(None), eos=lambda: None)
    assert module.workers_for(unpicklable, [half, chat]) == 1
    monkeypatch.setattr(ByteTokenizer, "__module__", "__main__")
    assert module.workers_for(ByteTokenizer(), [half, chat]) == 1


def test_what_cannot_be_used_is_refused_before_any_work(make_tokenizer, tmp_path):
    with pytest.raises(ValueError, match="workers is 0; it must be at least 1"):
        tokenise(ByteTokenizer(), EXAMPLES, workers=0)
    unpicklable = dataclasses.replace(make_tokenizer(None), eos=lambda: None)
    with pytest.raises(ValueError, match=r"the work cannot be sent to other processes .* give workers=1"):
        tokenise(unpicklable, EXAMPLES, workers=2)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file cannot hold the cache \(file exists\); name a folder"):
        tokenise(ByteTokenizer(), EXAMPLES, cache=tmp_path / "file")


class Counting(ByteTokenizer):
    encoded = 0

    def encode(self, text: str) -> list[int]:
        Counting.encoded += 1
        return super().encode(text)


def test_the_cache_gives_the_same_rows_without_encoding_again(tmp_path):
    examples, folder, reports = EXAMPLES[::3], tmp_path / "new" / "folder", []
    make = partial(prepare, Counting(), examples, packed=False)
    first = make(max_len=40, cache=folder)
    before = Counting.encoded
    second = make(max_len=40, cache=folder, progress=lambda *done: reports.append(done))
    assert Counting.encoded - before < len(examples) / 2  # a few are encoded to name the file
    assert reports == [(40, 40)]
    assert len(list(folder.iterdir())) == 1
    assert second.statistics == first.statistics == make(max_len=40).statistics
    for left, right in zip(heldout_batches(first, batch_size=4), heldout_batches(second, batch_size=4), strict=True):
        assert_same(left, right)
    make(max_len=30, cache=folder)  # what is cut is cut later
    assert len(list(folder.iterdir())) == 1


class Upper(ByteTokenizer):
    def encode(self, text: str) -> list[int]:
        return super().encode(text.upper())


def test_the_name_in_the_cache_depends_on_all_that_the_tokens_depend_on(make_tokenizer, tmp_path, monkeypatch):
    chatml = make_tokenizer("chatml")
    grown = type(chatml.backend).from_str(chatml.backend.to_str())
    grown.add_tokens(["zzz"])
    one = [Example("p", "c"), Example("", "d")]
    many = [Example("p", "c")] * 40
    others = [
        (chatml, many),
        (chatml, [many[0], Example("pc", ""), *many[2:]]),
        (chatml, [many[0], Example("", "pc"), *many[2:]]),
        (chatml, [Example("p", "c"), Example("", "e")]),
        (chatml, [Example("q", "c"), Example("", "d")]),
        (chatml, one[::-1]),
        (chatml, one[:1]),
        (chatml, [Example("pc", ""), Example("", "d")]),
        (chatml, [Example((Message("user", "p"),), "c"), Example("", "d")]),
        (chatml, [Example((Message("system", "p"),), "c"), Example("", "d")]),
        (dataclasses.replace(chatml, backend=grown), one),
        (dataclasses.replace(chatml, eos="</s>"), one),
        (dataclasses.replace(chatml, adds_bos=True), one),
        (make_tokenizer("opened"), one),
        (ByteTokenizer(), one),
        (Upper(), one),
    ]
    names = [file_for(tmp_path, tokenizer, examples).name for tokenizer, examples in [(chatml, one), *others]]
    monkeypatch.setattr(Upper, "encode", lambda self, text: [1])
    names.append(file_for(tmp_path, Upper(), one).name)
    assert len(set(names)) == len(names)
    moved = [dataclasses.replace(example, origin="elsewhere") for example in one]
    copy = dataclasses.replace(chatml, backend=type(chatml.backend).from_str(chatml.backend.to_str()))
    assert file_for(tmp_path, copy, moved).name == names[0]


def test_a_damaged_file_is_told_of_and_written_anew(tmp_path):
    tokens = tokenise(ByteTokenizer(), EXAMPLES[::3], cache=tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 3] ^= 1
    for damaged in (b"", whole[:-30], whole[: len(whole) // 2], b"not a zip file", bytes(flipped)):
        path.write_bytes(damaged)
        with pytest.warns(UserWarning, match=r"npz is damaged \(.*\); the data are tokenised anew"):
            assert_same(tokenise(ByteTokenizer(), EXAMPLES[::3], cache=tmp_path), tokens)
        assert path.read_bytes() == whole
    assert list(tmp_path.iterdir()) == [path]


def test_no_damage_to_a_byte_gives_other_tokens(tmp_path):
    tokens = tokenise(ByteTokenizer(), EXAMPLES[:1], cache=tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    refused = 0
    for place in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[place] ^= 0b100
        path.write_bytes(damaged)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = load(path, 1)
        if found is None:
            refused += 1
        else:
            assert_same(found, tokens)  # the zip file's own times, for one, are nobody's business
    assert refused > 50


def test_the_tokens_of_other_examples_are_not_taken(tmp_path):
    tokenise(ByteTokenizer(), EXAMPLES[:1], cache=tmp_path)
    (path,) = tmp_path.iterdir()
    with pytest.warns(UserWarning, match="damaged"):
        assert load(path, 2) is None


def test_a_cache_that_cannot_be_written_costs_a_warning_only(tmp_path, monkeypatch):
    def full(*arguments, **named):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.warns(UserWarning, match=r"cannot be written \(.*No space left.*\); the next run tokenises again"):
        tokens = tokenise(ByteTokenizer(), EXAMPLES[::3], cache=tmp_path)
    assert_same(tokens, tokenise(ByteTokenizer(), EXAMPLES[::3]))
    assert list(tmp_path.iterdir()) == []
