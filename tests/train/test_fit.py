"""The loop: what it learns, writes, resumes from and refuses."""

import contextlib
import json
import os
import signal
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rslora_jax import train
from rslora_jax.models.decoder import SHARDING_RULES
from rslora_jax.parallel import sharding
from rslora_jax.store import checkpoint
from tests.train.tiny import Run

pytestmark = [pytest.mark.by_day_on("oldest"), pytest.mark.xdist_group("fit"), pytest.mark.usefixtures("compile_fast")]


@pytest.fixture(scope="module")
def run():
    return Run()


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """A run of 12 steps in one go."""
    folder = tmp_path_factory.mktemp("whole")
    return run.fit(folder, 12), folder


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_the_base_stays_and_the_held_out_loss_falls(run, whole):
    result, _ = whole
    before = list(result.heldout.values())
    assert list(result.heldout) == [0, 4, 8, 12]
    assert before[-1] < 0.9 * before[0]
    assert result.step == result.saved == 12 and not result.early and result.signal is None
    equal(run.params, Run().params)


def test_the_loss_is_that_of_the_whole_logits_in_numpy(run):
    """The loss takes a short cut through the tokens that carry one; compare with all logits, in float64."""
    batch = run.batches[3]
    adapters = run.lora.init(jax.random.key(5))
    adapters = jax.tree.map(lambda x: x + 0.05, adapters)
    logits = run.lora.fn(
        run.lora.merge(run.params, adapters), batch.tokens_BxT, batch.positions_BxT, batch.segment_ids_BxT
    )
    logits = np.asarray(logits, np.float64)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    picked = np.take_along_axis(logp, np.asarray(batch.targets_BxT)[..., None], -1)[..., 0]
    want = -(picked * batch.loss_mask_BxT).sum()

    def apply(*args, **kwargs):
        return run.lora.apply(run.params, adapters, *args, **kwargs)

    total, count = run.loss(apply, batch)
    assert int(count) == batch.loss_mask_BxT.sum() > 0
    assert float(total) == pytest.approx(want, rel=1e-5)
    assert np.isnan(float(train.token_loss(1)(apply, batch)[0]))


def test_a_run_of_optax_by_hand_gives_the_same_adapters(run, whole):
    result, _ = whole

    def loss(adapters, batch):
        total, count = run.loss(lambda *a, **k: run.lora.fn(run.lora.merge(run.params, adapters), *a, **k), batch)
        return total / count

    adapters = run.lora.init(jax.random.key(1))
    state = run.optimizer.init(adapters)
    gradient = jax.jit(jax.grad(loss))
    for n in range(12):
        grads = gradient(adapters, run.batches[n])
        updates, state = run.optimizer.update(grads, state)
        adapters = optax.apply_updates(adapters, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), result.adapters, adapters)


def test_what_is_written_is_metrics_a_picture_and_checkpoints_of_adapters_alone(run, whole):
    result, folder = whole
    assert {p.name for p in folder.iterdir()} == {".lock", "checkpoints", "loss.png", "metrics.jsonl"}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines == list(result.records)
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 13))
    assert {"loss", "perplexity", "grad_norm", "tokens", "tokens_per_second", "seconds"} <= steps[0].keys()
    assert (folder / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert checkpoint.steps_in(folder) == [9, 12]
    numbers = 3 * run.lora.num_parameters  # adapters, and Adam's two moments
    last = folder / "checkpoints" / "12"
    held = {p: sum(np.size(x) for x in jax.tree.leaves(stored(last, p))) for p in ("adapters", "training")}
    assert numbers <= sum(held.values()) <= numbers + 8


def stored(step, item):
    """Read one item of a checkpoint with orbax alone."""
    import orbax.checkpoint as ocp

    return ocp.PyTreeCheckpointer().restore(step / item)


def test_the_adapters_are_read_back_with_their_config(run, whole):
    result, folder = whole
    config, adapters = checkpoint.load_adapters(folder, params=run.params)
    assert config == run.lora.config
    equal(adapters, result.adapters)
    run.lora.check(run.params, adapters)
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(adapters)), "on no device"
    equal(checkpoint.load_adapters(folder, step=12)[1], adapters)
    mesh = sharding.make_mesh("fsdp=-1")
    params = jax.device_put(run.params, sharding.param_shardings(run.params, mesh, SHARDING_RULES))
    where = sharding.adapter_shardings(run.lora.sites, params)
    placed = checkpoint.load_adapters(folder, params=params, shardings=where)[1]
    equal(placed, adapters)
    assert jax.tree.map(lambda leaf: leaf.sharding, placed) == where
    with pytest.raises(ValueError, match="no checkpoint of step 5: it has steps 9, 12"):
        checkpoint.load_adapters(folder, step=5)
    with pytest.raises(ValueError, match="another base"):
        checkpoint.load_adapters(folder, params=Run(seed=4).params)


def test_a_resumed_run_ends_bit_for_bit_where_an_unbroken_one_does(run, whole, tmp_path):
    result, _ = whole
    run.fit(tmp_path, 5)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "loss"')  # as a crash leaves it
    resumed = run.fit(tmp_path, 12, resume=True)
    equal(resumed.adapters, result.adapters)
    timed = {"seconds", "tokens_per_second", "tflops"}

    def strip(records):
        return [{k: v for k, v in r.items() if k not in timed} for r in records if "loss" in r]

    assert strip(resumed.records) == strip(result.records)


def test_a_resumed_run_compiles_its_step_once(run, tmp_path):
    step = train.make_step(run.lora, run.loss, run.optimizer)
    run.fit(tmp_path, 1)
    before = step._cache_size()
    run.fit(tmp_path, 4, resume=True)
    assert step._cache_size() - before <= 1


def test_what_a_resume_cannot_go_on_from_is_named(run, whole, tmp_path):
    _, folder = whole
    with pytest.raises(ValueError, match="holds no checkpoint to resume"):
        run.fit(tmp_path, 5, resume=True)
    with pytest.raises(ValueError, match="already holds a run, at step 12"):
        run.fit(folder, 20)
    with pytest.raises(ValueError, match="already at step 12"):
        run.fit(folder, 12, resume=True)
    with pytest.raises(ValueError, match=r"adapters/params/layers/.*/kernel/a with shape .*3.* needs .*5"):
        Run(rank=5).fit(folder, 20, resume=True)
    with pytest.raises(ValueError, match=r"another LoraConfig \(scaling is rslora there, lora here\)"):
        Run(scaling="lora").fit(folder, 20, resume=True)
    with pytest.raises(ValueError, match=r"another base \(params/embed/embedding has other values, and 7 more\)"):
        Run(seed=4).fit(folder, 20, resume=True)
    with pytest.raises(ValueError, match=r"no adapters for|no place for"):
        Run(targets="*/q_proj/*").fit(folder, 20, resume=True)
    other = Run()
    other.optimizer = optax.sgd(1e-2)
    with pytest.raises(ValueError, match=r"trained otherwise \(optimizer: .* override optimizer"):
        other.fit(folder, 20, resume=True)
    with pytest.raises(ValueError, match="training/opt_state"):
        other.fit(folder, 20, resume=True, override=["optimizer"])
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file: give a folder"):
        run.fit(tmp_path / "file", 5)
    assert checkpoint.steps_in(folder) == [9, 12]


def test_a_folder_in_use_is_refused(run, tmp_path):
    with (
        checkpoint.open_checkpoints(tmp_path),
        pytest.raises(ValueError, match="in use by another run"),
    ):
        run.fit(tmp_path, 5)
    run.fit(tmp_path, 1)


@pytest.mark.parametrize("bad", [2, 4])
def test_a_loss_that_is_not_finite_stops_at_its_step_and_keeps_the_last_good_adapters(run, tmp_path, bad):
    def loss(apply, batch):
        total, count = run.loss(apply, batch)
        return total * jnp.where(batch.tokens_BxT[0, 0] < 0, jnp.nan, 1.0), count

    class Batches:
        def __getitem__(self, n):
            batch = run.batches[n]
            if n != bad:
                return batch
            tokens = batch.tokens_BxT.copy()
            tokens[0, 0] = -1
            return batch._replace(tokens_BxT=tokens)

    good = run.fit(tmp_path / "good", bad, loss=loss)
    with pytest.raises(train.NonFiniteLoss, match=f"loss of step {bad + 1} is not finite .* adapters of step {bad}"):
        run.fit(tmp_path / "bad", 8, loss=loss, batches=Batches())
    _, adapters = checkpoint.load_adapters(tmp_path / "bad")
    equal(adapters, good.adapters)
    assert checkpoint.steps_in(tmp_path / "bad")[-1] == bad
    last = json.loads((tmp_path / "bad" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == bad + 1 and last["loss"] == "nan"


def test_an_error_in_the_data_loses_nothing(run, tmp_path):
    class Batches:
        def __getitem__(self, n):
            if n == 3:
                raise OSError("the disk is gone")
            return run.batches[n]

    with pytest.raises(OSError, match="the disk is gone"):
        run.fit(tmp_path, 8, batches=Batches())
    assert checkpoint.steps_in(tmp_path)[-1] == 3


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_saves_and_the_run_can_go_on(run, whole, tmp_path, kind, capfd):
    class Batches:
        def __getitem__(self, n):
            if n == 6:
                os.kill(os.getpid(), kind)
            return run.batches[n]

    assert threading.current_thread() is threading.main_thread()
    stopped = run.fit(tmp_path, 12, batches=Batches(), show=True)
    said = capfd.readouterr().err
    assert (said == "stopping after the steps under way; press Ctrl-C again to quit at once\n") == (
        kind == signal.SIGINT
    )
    assert stopped.signal == kind and stopped.step == 7 and checkpoint.steps_in(tmp_path)[-1] == 7
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    equal(run.fit(tmp_path, 12, resume=True, show=True).adapters, whole[0].adapters)
    assert "resuming from step 7 of 12\n" in capfd.readouterr().out


def test_progress_goes_to_the_terminal_as_plain_lines_when_it_is_none(run, tmp_path, capsys):
    run.fit(tmp_path, 3, show=True)
    said = capsys.readouterr().out
    assert "step 0: held-out perplexity" in said
    assert "step 3/3  loss" in said and "tok/s" in said and "left" in said


def of_the_guide():
    guide = (Path(__file__).parents[2] / "docs" / "training" / "README.md").read_text()
    source, names = guide.split("## Where the numbers go")[1].split("```python\n")[1], {}
    exec(source.split("train.fit(")[0], names)
    return names["printed"]


def test_a_writer_of_ones_own_is_told_all_that_is_recorded(run, tmp_path, capsys):
    told, runs, ends = [], [], []

    @contextlib.contextmanager
    def writer(info):
        runs.append(info)
        try:
            yield told.append
        finally:
            ends.append(checkpoint.steps_in(info.folder))

    first = run.fit(tmp_path, 3, writers=[writer], settings={"note": 1}, eval_every=2)
    assert told == list(first.records) and [r["step"] for r in told] == [0, 1, 2, 2, 3, 3]
    told.clear()
    writers = [writer, lambda info: contextlib.nullcontext(dict.clear), of_the_guide()]
    second = run.fit(tmp_path, 5, writers=writers, resume=True)
    assert told == list(second.records[6:]) and [r["step"] for r in told] == [4, 4, 5, 5]
    assert [(r.folder, r.start, r.steps, list(r.records)) for r in runs] == [
        (tmp_path, 0, 3, []),
        (tmp_path, 3, 5, list(first.records)),
    ]
    assert runs[0].settings == {"note": 1} and runs[0].config == run.lora.config
    assert all(r["step"] for r in second.records[1:]), "a writer that changes its record changes no other's"
    assert [steps[-1] for steps in ends] == [3, 5], "the end is saved before writers are closed"
    said = capsys.readouterr().out.splitlines()
    assert said == [f"{tmp_path}: steps 3 to 5, rank 3", *map(str, told)]


@pytest.mark.parametrize("when", ["start", "record", "end"])
def test_an_error_in_a_writer_ends_the_run_and_loses_nothing(run, tmp_path, when):
    @contextlib.contextmanager
    def writer(info):
        def record(entry):
            if when == "record" and entry["step"] == 4:
                raise OSError("the service is gone")

        if when == "start":
            raise OSError("the service is gone")
        yield record
        if when == "end":
            raise OSError("the service is gone")

    with pytest.raises(OSError, match="the service is gone"):
        run.fit(tmp_path, 6, writers=[writer], save_every=100, eval_every=100)
    # At least the step behind the recorded one had begun.
    saved = {"start": [[]], "record": [[5], [6]], "end": [[6]]}[when]
    assert checkpoint.steps_in(tmp_path)[-1:] in saved
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == list(range(1, {"start": 0, "record": 4, "end": 6}[when] + 1))
    assert (tmp_path / "loss.png").exists()
