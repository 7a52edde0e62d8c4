"""A run that is resumed goes on with the same run, or says why not."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rslora_jax as rslora
from rslora_jax import train
from rslora_jax.store import checkpoint

pytestmark = [pytest.mark.by_day_on("newest"), pytest.mark.usefixtures("compile_fast")]
PARAMS = {"w": jnp.linspace(-1, 1, 40).reshape(8, 5)}
LORA = rslora.wrap(lambda p, x: x @ p["w"], PARAMS, jnp.ones((4, 8)), config=rslora.LoraConfig(rank=3, alpha=7))
ADAPTERS = LORA.init(jax.random.key(0))


def rows(seed, count=12, size=4):
    return [x.astype("f4") for x in np.random.default_rng(seed).normal(size=(count, size, 8))]


def loss(run, batch):
    return jnp.sum((run(batch) - 1) ** 2), jnp.float32(batch.shape[0])


def adam(**options):
    return train.make_optimizer("adam", schedule=train.make_schedule(peak=1e-2, steps=9), options=options)


def fit(folder, steps, **options):
    options = {"batches": rows(1), "heldout": rows(2, 2), "optimizer": adam(), "eval_every": 3} | options
    return train.fit(LORA, PARAMS, ADAPTERS, loss=loss, steps=steps, folder=folder, **{"show": False} | options)


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


class Counted:
    """Batches from an iterator that says where it is as `state` makes it of the number."""

    def __init__(self, batches, state=int, back=int):
        self.batches, self.state, self.back, self.number = batches, state, back, 0

    def __iter__(self):
        return self

    def __next__(self):
        self.number += 1
        return self.batches[self.number - 1]

    def get_state(self):
        return self.state(self.number)

    def set_state(self, state):
        self.number = self.back(state)


CHANGES = {
    "other data": ("data", {"batches": rows(5)}, "the first batch has other values"),
    "fewer rows": ("data", {"batches": rows(1, size=2)}, r"a batch is float32\[2,8\] here, float32\[4,8\] was saved"),
    "other held-out": ("heldout", {"heldout": rows(3, 2)}, "heldout: other batches here than were saved"),
    "no held-out": ("heldout", {"heldout": None}, "heldout: none here"),
    "parts": ("accumulate", {"accumulate": 2}, "accumulate: 2 here, 1 was saved"),
    "rate": (
        "optimizer",
        {"optimizer": train.make_optimizer("adam", schedule=train.make_schedule(peak=2e-2, steps=9))},
        r"make_schedule.peak is 0.02 here, 0.01 was saved",
    ),
    "schedule": (
        "optimizer",
        {"optimizer": train.make_optimizer("adam", schedule=train.make_schedule("linear", peak=1e-2, steps=9))},
        r"make_schedule.name is linear here, cosine was saved",
    ),
    "option": ("optimizer", {"optimizer": adam(b1=0.5)}, r"scale_by_adam.b1 is 0.5 here, 0.9 was saved"),
    "clip": (
        "optimizer",
        {"optimizer": train.make_optimizer("adam", schedule=train.make_schedule(peak=1e-2, steps=9), clip=0.5)},
        r"clip_by_global_norm.max_norm is 0.5 here, 1.0 was saved",
    ),
}


# By day some: what decides is compared by one function.
BY_DAY = ("other data", "no held-out", "rate")


@pytest.mark.parametrize(
    "change", [name if name in BY_DAY else pytest.param(name, marks=pytest.mark.nightly) for name in CHANGES]
)
def test_what_decides_the_course_is_refused_or_overridden_and_recorded(tmp_path, change):
    name, options, said = CHANGES[change]
    fit(tmp_path, 4)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=rf"was trained otherwise \(.*{said}.*override {name} to change it"):
        fit(tmp_path, 6, resume=True, **options)
    assert sorted(tmp_path.rglob("*")) == before
    others = [other for other in ("data", "heldout", "accumulate", "optimizer") if other != name]
    with pytest.raises(ValueError, match="was trained otherwise"):
        fit(tmp_path, 6, resume=True, override=others, **options)
    result = fit(tmp_path, 6, resume=True, override=[name], **options)
    changed = [record["changed"] for record in result.records if "changed" in record]
    assert [[*one] for one in changed] == [[name]] and result.saved == 6
    # And from there on it is the run's own.
    again = fit(tmp_path, 7, resume=True, **options)
    assert [record["changed"] for record in again.records if "changed" in record] == changed


def test_another_held_out_set_is_scored_afresh_and_has_a_best_of_its_own(tmp_path):
    first = fit(tmp_path, 3)
    assert [*first.heldout] == [0, 3]
    harder = [5 + batch for batch in rows(3, 2)]
    second = fit(tmp_path, 6, resume=True, override=["heldout"], heldout=harder, keep=9)
    assert [*second.heldout] == [3, 6] and min(second.heldout.values()) > 2 * max(first.heldout.values())
    best = min((step for step in second.heldout if step > 3), key=second.heldout.__getitem__)
    equal(checkpoint.load_adapters(tmp_path, step="best")[1], checkpoint.load_adapters(tmp_path, step=best)[1])
    whole = fit(tmp_path / "whole", 6)
    equal(second.adapters, whole.adapters)  # what is held out changes nothing that is learnt
    third = fit(tmp_path, 7, resume=True, heldout=harder, keep=9)
    assert [*third.heldout] == [*second.heldout, 7]


def test_settings_that_differ_are_recorded(tmp_path):
    fit(tmp_path, 2, settings={"steps": 2, "note": [1, 2]})
    result = fit(tmp_path, 3, resume=True, settings={"steps": 3, "note": [1, 2], "new": 1})
    assert {"step": 2, "changed": {"steps": [2, 3]}} in result.records
    with pytest.raises(ValueError, match="override has 'rank', which is none of data, heldout, accumulate, optimizer"):
        fit(tmp_path, 4, resume=True, override=["rank"])


@pytest.mark.parametrize(
    ("bad", "by_number"), [(1, False), (2, True), *(pytest.param(n, False, marks=pytest.mark.nightly) for n in (2, 4))]
)
def test_the_batch_at_which_a_run_stopped_is_trained_when_it_goes_on(tmp_path, bad, by_number):
    """The loss is no number once, as on a device that failed; the same batch is good afterwards."""
    poisoned = rows(1)
    poisoned[bad] = np.full_like(poisoned[bad], np.nan)

    def of(batches):
        return batches if by_number else Counted(batches)

    whole = fit(tmp_path / "whole", 6, batches=of(rows(1)))
    with pytest.raises(train.NonFiniteLoss):
        fit(tmp_path / "parts", 6, batches=of(poisoned))
    assert checkpoint.load_about(tmp_path / "parts")["data"]["batch"] == bad
    equal(fit(tmp_path / "parts", 6, batches=of(rows(1)), resume=True).adapters, whole.adapters)


STATES = {
    "bytes": (lambda n: str(n).encode(), int, True),
    "nested": (lambda n: {"at": {"next": [n, None]}}, lambda s: s["at"]["next"][0], True),
    "tuple": (lambda n: (n, "x"), lambda s: s[0], True),
    "numbers as keys": (lambda n: {n: 1}, lambda s: next(iter(s)), False),
    "bytes inside": (lambda n: {"at": str(n).encode()}, lambda s: int(s["at"]), False),
    "an object": (lambda n: {n}, lambda s: next(iter(s)), False),
    "a key": (lambda n: jax.random.key(n), lambda s: 0, False),
}


@pytest.mark.parametrize("kind", STATES)
def test_where_the_batches_are_is_kept_or_refused_before_the_first_step(tmp_path, kind):
    state, back, can = STATES[kind]
    if not can:
        with pytest.raises(
            ValueError, match=r"Counted is, it says in a state that no checkpoint can hold \(.*by number"
        ):
            fit(tmp_path, 4, batches=Counted(rows(1), state, back))
        assert not [*tmp_path.iterdir()]
        return
    whole = fit(tmp_path / "whole", 5, batches=rows(1))
    fit(tmp_path / "parts", 2, batches=Counted(rows(1), state, back))
    parts = fit(tmp_path / "parts", 5, batches=Counted(rows(1), state, back), resume=True)
    equal(parts.adapters, whole.adapters)


def test_settings_that_no_checkpoint_can_hold_are_refused_before_the_first_step(tmp_path):
    with pytest.raises(ValueError, match="settings are kept with the checkpoints as JSON, and these cannot be"):
        fit(tmp_path, 4, settings={"model": {1, 2}})
    assert not [*tmp_path.iterdir()]


def test_metrics_have_the_rate_of_each_step_and_the_epoch(tmp_path):
    schedule = train.make_schedule("linear", peak=1e-2, steps=6)
    batches = rows(1)
    batches[2] = np.full_like(batches[2], np.nan)
    options = {"batches": batches, "optimizer": optax.sgd(schedule), "schedule": schedule, "on_nonfinite": "skip"}
    fit(tmp_path, 3, steps_an_epoch=2.5, **options)
    result = fit(tmp_path, 6, steps_an_epoch=2.5, resume=True, **options)
    steps = [record for record in result.records if "loss" in record]
    assert [record["epoch"] for record in steps] == [0.4, 0.8, 1.2, 1.6, 2.0, 2.4]
    # A batch that is skipped moves the optimiser's count no more than its adapters.
    np.testing.assert_allclose([r["learning_rate"] for r in steps], [float(schedule(n)) for n in (0, 1, 2, 2, 3, 4)])
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["learning_rate"] for line in lines if "loss" in line] == [r["learning_rate"] for r in steps]


def test_a_run_of_before_there_was_a_course_is_gone_on_with_as_it_was(tmp_path):
    whole = fit(tmp_path / "whole", 6)
    fit(tmp_path / "parts", 3)
    for path in (tmp_path / "parts" / "checkpoints").glob("*/about/metadata"):
        told = json.loads(path.read_text())
        del told["course"], told["checksum"], told["data"]["first"]
        path.write_text(json.dumps(told | {"format": 1}))
    result = fit(tmp_path / "parts", 6, resume=True)
    equal(result.adapters, whole.adapters)
    assert result.heldout.keys() >= {0, 3, 6} and not any("changed" in record for record in result.records)
