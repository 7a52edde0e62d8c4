"""What goes wrong, and is survived: kills, damaged files, a full disk, losses that are not finite or do not fall."""

import json
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rslora_jax import train
from rslora_jax.store import checkpoint
from tests.train.tiny import Run

pytestmark = [pytest.mark.by_day_on("oldest"), pytest.mark.xdist_group("fit"), pytest.mark.usefixtures("compile_fast")]
# For the processes that tests start; with another optimisation there would be other roundings.
QUICK = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "COLUMNS": "200"}


@pytest.fixture(scope="module")
def run():
    return Run()


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("kills", [1, pytest.param(60, marks=pytest.mark.nightly)])
def test_a_run_killed_at_random_moments_ends_bit_for_bit_as_one_that_was_not(kills):
    command = [sys.executable, "scripts/survive.py", "--kills", str(kills), "--steps", str(40 * kills + 20)]
    done = subprocess.run(command, capture_output=True, text=True, env=QUICK)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    said = done.stdout.splitlines()[-1]
    assert "NOT" not in said and int(said.split()[1]) >= max(1, kills // 2)


def files(step):
    return sorted(path for path in step.rglob("*") if path.is_file() and path.stat().st_size)


@pytest.fixture(scope="module")
def two_steps(run, tmp_path_factory):
    """A run of 6 steps, with checkpoints of step 3 and 6; and what it is after 9."""
    folder = tmp_path_factory.mktemp("whole")
    run.fit(folder, 6, save_every=3, heldout=None)
    whole = run.fit(tmp_path_factory.mktemp("unbroken"), 9, save_every=3, heldout=None)
    return folder, whole.adapters


HARMS = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "missing": lambda path: path.unlink(),
    "one bit": lambda path: path.write_bytes(bytes([path.read_bytes()[0] ^ 4]) + path.read_bytes()[1:]),
    "in the middle": lambda path: path.write_bytes(
        (b := path.read_bytes())[: len(b) // 2] + bytes([b[len(b) // 2] ^ 1]) + b[len(b) // 2 + 1 :]
    ),
}


@pytest.mark.parametrize("harm", HARMS)
def test_whatever_file_is_damaged_no_wrong_number_is_read(run, two_steps, tmp_path, harm):
    """Each file in turn: the checkpoint is refused and the one before is taken, or what it gives is what was saved."""
    folder, _ = two_steps
    want = checkpoint.load_adapters(folder)[1]
    seen = []
    for number, path in enumerate(files(folder / "checkpoints" / "6")):
        copy = tmp_path / str(number)
        (copy / "checkpoints").mkdir(parents=True)
        for step in ("3", "6"):
            subprocess.run(["cp", "-r", folder / "checkpoints" / step, copy / "checkpoints"], check=True)
        HARMS[harm](copy / path.relative_to(folder))
        try:
            equal(checkpoint.load_adapters(copy)[1], want)
        except checkpoint.Damaged as error:
            assert str(copy / "checkpoints" / "6") in str(error)
            seen.append(path)
    assert len(seen) >= 2


def test_a_checkpoint_put_together_from_two_is_refused(two_steps, tmp_path):
    """Every file is whole, and the numbers are those of another step: only the checksums can tell."""
    folder, _ = two_steps
    (tmp_path / "checkpoints").mkdir()
    subprocess.run(["cp", "-r", folder / "checkpoints" / "6", tmp_path / "checkpoints"], check=True)
    subprocess.run(["rm", "-r", tmp_path / "checkpoints" / "6" / "adapters"], check=True)
    subprocess.run(["cp", "-r", folder / "checkpoints" / "3" / "adapters", tmp_path / "checkpoints" / "6"], check=True)
    with pytest.raises(checkpoint.Damaged, match=r"adapters/params/.* is not what was saved"):
        checkpoint.load_adapters(tmp_path)


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(run, two_steps, tmp_path, capsys):
    folder, after_nine = two_steps
    subprocess.run(["cp", "-r", folder, tmp_path], check=True)
    folder = tmp_path / folder.name
    for path in files(folder / "checkpoints" / "6" / "training"):  # some hold nothing that is read
        os.truncate(path, path.stat().st_size - 5)
    capsys.readouterr()
    resumed = run.fit(folder, 9, save_every=3, heldout=None, resume=True, show=True)
    said = capsys.readouterr().out
    assert f"{folder}/checkpoints/6/training is damaged" in said and f"kept as {folder}/damaged-6" in said
    assert [r["step"] for r in resumed.records] == list(range(1, 10))
    equal(resumed.adapters, after_nine)
    assert checkpoint.steps_in(folder)[-2:] == [6, 9] and (folder / "damaged-6").is_dir()
    for step in checkpoint.steps_in(folder):
        for path in files(folder / "checkpoints" / str(step)):
            os.truncate(path, 10)
    with pytest.raises(ValueError, match="has no checkpoint that is whole"):
        run.fit(folder, 12, resume=True)


def test_a_full_disk_ends_no_run_and_harms_no_earlier_checkpoint(run, tmp_path):
    """From step 7 on no file may grow beyond 2,000 bytes, which is what a full disk does to writes."""
    script = """
        import resource, sys
        from tests.train.tiny import Run
        run = Run()
        class Batches:
            def __getitem__(self, n):
                if n == 7:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
                return run.batches[n]
        result = run.fit(sys.argv[1], 8, batches=Batches(), save_every=2, heldout=None, show=True)
        print("ended", result.step, result.saved)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=QUICK | {"JAX_ENABLE_COMPILATION_CACHE": "0"})
    assert done.returncode == 0, done.stderr[-3000:]
    # That of step 6 may have been under way in the background.
    saved = int(done.stdout.split()[-1])
    assert saved in (4, 6) and done.stdout.splitlines()[-1] == f"ended 8 {saved}"
    said = f"a checkpoint could not be written, and the last checkpoint is that of step {saved}; training goes on"
    assert said in done.stdout
    assert checkpoint.steps_in(tmp_path)[-1] == saved
    resumed = run.fit(tmp_path, 8, save_every=2, heldout=None, resume=True)
    equal(resumed.adapters, run.fit(tmp_path / "unbroken", 8, heldout=None).adapters)


@pytest.mark.nightly
@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="a small disk is mounted")
def test_a_disk_that_is_full_indeed_costs_no_adapters_and_is_told_though_nothing_is_shown(tmp_path):
    script = """
        import os, sys
        from tests.train.tiny import Run
        run, folder = Run(), sys.argv[1]
        class Batches:
            def __getitem__(self, n):
                if n == 5:
                    with open(folder + "/fill", "wb", buffering=0) as file:
                        for size in (4096, 1):
                            try:
                                while True:
                                    file.write(bytes(size))
                            except OSError:
                                pass
                return run.batches[n]
        result = run.fit(folder + "/run", 8, batches=Batches(), save_every=2, tensorboard=True)
        print("ended", result.step, result.saved, len(result.adapters))
    """
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
        done = subprocess.run(
            command, capture_output=True, text=True, env=QUICK | {"JAX_ENABLE_COMPILATION_CACHE": "0"}
        )
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)
    assert done.returncode == 0, done.stderr[-3000:]
    ended, step, saved, count = done.stdout.splitlines()[-1].split()
    assert (ended, step, count) == ("ended", "8", str(len(Run().lora.sites))) and int(saved) < 8
    assert "RsloraWarning: step" in done.stderr and f"the last checkpoint is that of step {saved}" in done.stderr


def test_the_best_checkpoint_is_kept_and_training_stops_when_nothing_gets_better(run, tmp_path):
    """After six steps the loss is climbed and not descended: the held-out loss falls, then rises."""

    def rates(count):
        return jnp.where(count < 6, 1e-2, -1e-2)

    result = run.fit(tmp_path, 60, optimizer=optax.adam(rates), eval_every=2, patience=3, save_every=1, keep=2)
    losses = {r["step"]: r["heldout_loss"] for r in result.records if "heldout_loss" in r}
    best = min(losses, key=losses.__getitem__)
    assert result.early and result.signal is None
    assert 0 < best < result.step == best + 6 < 60, losses
    assert checkpoint.steps_in(tmp_path) == sorted({best, result.step - 1, result.step})
    _, adapters = checkpoint.load_adapters(tmp_path, step="best")
    equal(adapters, checkpoint.load_adapters(tmp_path, step=best)[1])
    evaluate = train.make_evaluate(run.lora, run.loss)
    sums = [evaluate(run.params, adapters, b) for b in train.heldout_batches(run.held, batch_size=4)]
    loss = float(sum(s for s, _ in sums) / sum(c for _, c in sums))
    assert loss == pytest.approx(losses[best], rel=1e-6)


def test_batches_that_are_not_finite_are_skipped_counted_and_not_for_ever(run, tmp_path, capsys):
    class Batches:
        def __init__(self, bad):
            self.bad = bad

        def __getitem__(self, n):
            batch = run.batches[n]
            return batch._replace(tokens_BxT=np.where(n in self.bad, -1, batch.tokens_BxT).astype(np.int32))

    def loss(apply, batch):
        total, count = run.loss(apply, batch)
        return total * jnp.where(batch.tokens_BxT[0, 0] < 0, jnp.nan, 1.0), count

    options = {"loss": loss, "heldout": None, "on_nonfinite": "skip"}
    result = run.fit(tmp_path / "some", 9, batches=Batches({2, 3, 7}), show=True, **options)
    assert result.step == 9 and [r["step"] for r in result.records if r.get("skipped")] == [3, 4, 8]
    assert "the loss of step 3 is not finite" in (said := capsys.readouterr().out) and "the batch is skipped" in said
    # As if they had not been there.
    good = run.fit(tmp_path / "good", 6, batches=[run.batches[n] for n in (0, 1, 4, 5, 6, 8)], **options)
    equal(result.adapters, good.adapters)
    with pytest.raises(train.NonFiniteLoss, match=r"the loss of step 14 is not finite .* of step 4 are saved"):
        run.fit(tmp_path / "all", 40, batches=Batches(set(range(4, 40))), save_every=5, **options)
    equal(checkpoint.load_adapters(tmp_path / "all")[1], run.fit(tmp_path / "four", 4, **options).adapters)


def test_an_iterator_of_grains_goes_on_where_it_was(run, tmp_path):
    def batches():
        return train.train_batches(run.rows, batch_size=4).to_iter_dataset()

    whole = run.fit(tmp_path / "whole", 7, batches=run.batches, heldout=None)
    run.fit(tmp_path / "parts", 3, batches=batches(), heldout=None)
    parts = run.fit(tmp_path / "parts", 7, batches=batches(), heldout=None, resume=True)
    equal(parts.adapters, whole.adapters)
    with pytest.raises(ValueError, match="with batches by number or with an iterator, and now has the other"):
        run.fit(tmp_path / "parts", 9, batches=run.batches, heldout=None, resume=True)
    with pytest.raises(ValueError, match="generator cannot say where it is"):
        run.fit(tmp_path / "no", 9, batches=(b for b in [run.batches[0]]), heldout=None)


def test_a_loss_that_draws_goes_on_drawing_where_it_was(run, tmp_path):
    def loss(apply, batch, key):
        total, count = run.loss(apply, batch)
        return total if key is None else total * (1 + jax.random.uniform(key)), count

    options = {"loss": loss, "key": jax.random.key(3), "heldout": None}
    whole = run.fit(tmp_path / "whole", 6, **options)
    run.fit(tmp_path / "parts", 2, **options)
    parts = run.fit(tmp_path / "parts", 6, **(options | {"key": jax.random.key(99)}), resume=True)
    equal(parts.adapters, whole.adapters)
    values = [r["loss"] for r in whole.records if "loss" in r]
    assert values == [r["loss"] for r in parts.records if "loss" in r]
    evaluate, batch = train.make_evaluate(run.lora, loss, keyed=True), run.batches[0]
    drawn, count = evaluate(run.params, run.adapters, batch)
    assert float(drawn / count) == pytest.approx(values[0], rel=1) and float(drawn / count) < values[0]


def test_metrics_are_whole_after_a_crash_while_they_are_written_anew(run, tmp_path):
    """A resume writes the file anew: until that is done, the old one stays."""
    run.fit(tmp_path, 2, heldout=None)
    (tmp_path / "metrics.tmp").write_text('{"step": 1, "lo')  # as a kill in the middle leaves it
    resumed = run.fit(tmp_path, 3, heldout=None, resume=True)
    assert [r["step"] for r in resumed.records] == [1, 2, 3]
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").open()] == [1, 2, 3]
