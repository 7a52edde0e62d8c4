"""Steps begun ahead: how many, that nothing is waited for in between, and that the run's course is the same."""

import json
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rslora_jax import train
from rslora_jax.train import ahead, loop
from rslora_jax.train.batch_stream import REMEMBERED
from rslora_jax.train.pace import Pace
from tests.train.tiny import Run

pytestmark = [pytest.mark.by_day_on("newest"), pytest.mark.xdist_group("fit"), pytest.mark.usefixtures("compile_fast")]
STEPS = 12


@pytest.fixture(scope="module")
def run():
    return Run()


@pytest.fixture(scope="module")
def loss(run):
    """The loss of a run, which is not a number where a batch's first token is none; one function compiles once."""

    def loss(apply, batch):
        total, count = run.loss(apply, batch)
        return total * jnp.where(batch.tokens_BxT[0, 0] < 0, jnp.nan, 1.0), count

    return loss


@pytest.fixture(scope="module")
def whole(run, loss, tmp_path_factory):
    """The adapters of a run in one go."""
    return bits(run.fit(tmp_path_factory.mktemp("whole"), STEPS, loss=loss, **QUIET).adapters)


class Later:
    """A number of a step that is not there before something has come to pass."""

    def __init__(self, value, event, patience):
        self.value, self.event, self.patience, self.late = value, event, patience, False

    def block_until_ready(self):
        self.late = not self.event.wait(self.patience)
        return self

    def __float__(self):
        return float(self.value)


class Slow:
    """Batches, and a device that is not done with the fifth of them before a later one is asked for."""

    def __init__(self, run, monkeypatch, until, patience=20):
        self.batches, self.until, self.patience = run.batches, until, patience
        self.reached, self.begun, self.late = threading.Event(), 0, []
        make_step = loop.make_step
        monkeypatch.setattr(loop, "make_step", lambda *args, **kwargs: self.over(make_step(*args, **kwargs)))

    def __getitem__(self, n):
        if n == self.until:
            self.reached.set()
        return self.batches[n]

    def over(self, step):
        def slow(*arguments):
            state, metrics = step(*arguments)
            self.begun += 1
            if self.begun == 5:
                metrics = {name: Later(value, self.reached, self.patience) for name, value in metrics.items()}
                self.late += metrics.values()
            return state, metrics

        return slow


QUIET = {"save_every": 100, "eval_every": 100, "heldout": None}


@pytest.mark.parametrize("most", [pytest.param(1, marks=pytest.mark.nightly), 7])
def test_so_many_steps_are_begun_while_one_is_under_way_and_no_more(run, tmp_path, monkeypatch, most):
    """Behind step 5 `most` are begun: batch 4 + most is asked for before step 5 is over, and the next one is not."""
    monkeypatch.setattr(ahead, "steps_ahead", lambda seconds: most)
    slow = Slow(run, monkeypatch, until=4 + most)
    run.fit(tmp_path / "run", STEPS, batches=slow, **QUIET)
    assert slow.begun == STEPS and not any(number.late for number in slow.late)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [*range(1, STEPS + 1)]
    slow = Slow(run, monkeypatch, until=4 + most + 1, patience=0.1)
    run.fit(tmp_path / "again", STEPS, batches=slow, **QUIET)
    assert any(number.late for number in slow.late)


def test_however_many_are_begun_the_run_is_the_same(run, tmp_path, monkeypatch):
    """Adapters, records, and where it is saved and evaluated; also of one that is resumed in between."""
    found = []
    for most in (1, 16):
        monkeypatch.setattr(ahead, "steps_ahead", lambda seconds, most=most: most)
        run.fit(tmp_path / str(most), 5, save_every=100, eval_every=4)
        result = run.fit(tmp_path / str(most), STEPS, save_every=8, eval_every=5, resume=True)
        timed = {"seconds", "tokens_per_second", "tflops", "mfu"}
        records = [{k: v for k, v in record.items() if k not in timed} for record in result.records]
        found.append((records, result.saved, bits(result.adapters)))
    assert found[0] == found[1]


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize("most", [1, 16])
def test_after_a_loss_that_is_not_finite_the_state_and_the_place_are_those_before_it(
    run, loss, whole, tmp_path, monkeypatch, most
):
    """However many steps were begun behind it; the batches are an iterator, which is to be brought back."""
    monkeypatch.setattr(ahead, "steps_ahead", lambda seconds: most)

    class Batches:
        def __init__(self, bad):
            self.n, self.bad = 0, bad

        def __iter__(self):
            return self

        def __next__(self):
            batch, self.n = run.batches[self.n], self.n + 1
            tokens_BxT = batch.tokens_BxT - (1000 if self.n - 1 == self.bad else 0)
            return batch._replace(tokens_BxT=tokens_BxT)

        def get_state(self):
            return {"n": self.n}

        def set_state(self, state):
            self.n = state["n"]

    with pytest.raises(train.NonFiniteLoss, match="loss of step 7 is not finite"):
        run.fit(tmp_path, 30, batches=Batches(6), loss=loss, **QUIET)
    lines = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [*range(1, 8)]
    resumed = run.fit(tmp_path, STEPS, batches=Batches(None), loss=loss, resume=True, **QUIET)
    assert resumed.records[6]["step"] == 7 and resumed.step == STEPS
    assert bits(resumed.adapters) == whole


def test_an_error_in_the_data_leaves_the_records_of_all_that_is_saved(run, tmp_path, monkeypatch):
    monkeypatch.setattr(ahead, "steps_ahead", lambda seconds: 16)

    class Batches:
        def __getitem__(self, n):
            if n == 9:
                raise OSError("the disk is gone")
            return run.batches[n]

    with pytest.raises(OSError, match="the disk is gone"):
        run.fit(tmp_path, 20, batches=Batches(), **QUIET)
    lines = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [*range(1, 10)]


def test_the_longer_the_steps_the_fewer_are_ahead():
    seconds = np.geomspace(1e-5, 1e3, 100)
    many = [ahead.steps_ahead(s) for s in seconds]
    assert many == sorted(many, reverse=True) and many[-1] == 1 and max(many) <= REMEMBERED - 2
    assert all(n == 1 or n * s <= 0.3 for n, s in zip(many, seconds, strict=True))
    assert ahead.steps_ahead(0.02) == 10


@pytest.mark.parametrize("alone", [False, True])
def test_one_step_alone_is_ahead_where_that_is_asked_for_or_nothing_is_known(alone):
    steps = ahead.Ahead(alone=alone)
    try:
        for number in range(1, 5):
            steps.begin(number, 0, {"loss": np.float32(number)})
        time.sleep(0.01)
        ended = [step.number for step in steps.ended()]
        assert ended == [1, 2, 3] if alone else ended == [1]
        assert [step.metrics["loss"] for step in steps.ended(everything=True)][-1] == 4.0
    finally:
        steps.watch.close()


def test_what_a_step_takes_of_the_host_does_not_grow_with_the_run(run, tmp_path, monkeypatch):
    """Counted: the records of all steps are gone through when the run begins, and when it evaluates."""
    calls = []

    def gives_up(self, records, inner=Pace.gives_up):
        calls.append(len(records))
        return inner(self, records)

    monkeypatch.setattr(Pace, "gives_up", gives_up)
    run.fit(tmp_path, STEPS, patience=3, save_every=5, eval_every=6)
    assert len(calls) == 1 + 3
