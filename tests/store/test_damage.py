"""What is damage and what is not: no bit of what is told is taken for another, and nothing whole is moved."""

import json
import os
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rslora_jax as rslora
from rslora_jax.store import about, checkpoint
from rslora_jax.train import fit

pytestmark = [pytest.mark.by_day_on("newest"), pytest.mark.usefixtures("compile_fast")]
CONFIG = rslora.LoraConfig(rank=3, alpha=10)
ADAPTERS = {"w": {"a": np.arange(24, dtype="f4").reshape(8, 3), "b": np.ones((3, 5), "f4")}}
TELLS = {"base": {"w": "float32[8,5] 0011"}, "settings": {"learning_rate": 1e-3}, "data": {"batch": 7, "at": [1, 2]}}


def save(folder, *steps, training=None):
    with checkpoint.open_checkpoints(folder, keep=9) as opened:
        for step in steps:
            told = {"config": CONFIG.to_dict(), **TELLS, "data": {"batch": step}}
            checkpoint.save(opened, step, ADAPTERS, training or {"step": np.full((), step, np.int32)}, told, 1.5)


def restore(folder, training=None):
    said = []
    with checkpoint.open_checkpoints(folder, resume=True) as opened:
        _, _, found = checkpoint.restore(
            opened, ADAPTERS, training or {"step": np.zeros((), np.int32)}, {}, said.append
        )
    return found, said


def file_of(folder, step):
    return folder / "checkpoints" / str(step) / "about" / "metadata"


@pytest.mark.parametrize("count", [250, pytest.param(10**6, marks=pytest.mark.nightly)])
def test_a_bit_of_what_is_told_is_never_taken_for_another(tmp_path, count):
    save(tmp_path, 3)
    path = file_of(tmp_path, 3)
    whole, want = path.read_bytes(), about.read_about(path.parent.parent)
    bits = np.random.default_rng(0).permutation(8 * len(whole))[:count]
    refused = 0
    for bit in bits:
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        try:
            assert about.read_about(path.parent.parent) == want, (bit, chr(changed[bit // 8]))
        except checkpoint.Damaged as error:
            refused += 1
            assert len(str(error)) < 600 and "\n" not in str(error)
    assert refused > 0.99 * len(bits)  # the rest is such as 1E-03 for 1e-03


@pytest.mark.parametrize(
    "change", [{"config": CONFIG.to_dict() | {"alpha": 30.0}}, {"data": {"batch": 9}}, {"format": 1}, {"checksum": ""}]
)
def test_where_what_is_told_is_changed_the_checkpoint_before_it_is_taken(tmp_path, change):
    save(tmp_path, 3, 5)
    told = json.loads(file_of(tmp_path, 5).read_text())
    file_of(tmp_path, 5).write_text(json.dumps(told | change))
    with pytest.raises(checkpoint.Damaged, match=r"checkpoints/5/about is damaged \(it is not what was saved\)"):
        checkpoint.load_adapters(tmp_path)
    found, said = restore(tmp_path)
    assert found["data"] == {"batch": 3} and len(said) == 1 and f"kept as {tmp_path}/damaged-5" in said[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "checkpoints", "damaged-5"]


@pytest.mark.parametrize("format", [None, 0, 1])
def test_what_was_told_before_there_was_a_checksum_is_taken_as_it_is(tmp_path, format):
    save(tmp_path, 3)
    told = json.loads(file_of(tmp_path, 3).read_text())
    del told["checksum"], told["format"]
    file_of(tmp_path, 3).write_text(json.dumps(told if format is None else told | {"format": format}))
    assert restore(tmp_path)[0]["data"] == {"batch": 3}
    assert checkpoint.load_adapters(tmp_path)[0] == CONFIG
    file_of(tmp_path, 3).write_text(json.dumps(told | {"format": 2}))
    with pytest.raises(checkpoint.Damaged):
        checkpoint.load_adapters(tmp_path)


def test_a_state_of_another_dtype_is_refused_and_not_moved(tmp_path):
    """What bfloat16 moments could not read, float32 ones can still."""
    params, x = {"w": jnp.linspace(-1, 1, 40).reshape(8, 5)}, jnp.ones((4, 8))
    lora = rslora.wrap(lambda p, x: x @ p["w"], params, x, config=CONFIG)
    start = lora.init(jax.random.key(0))

    def loss(run, batch):
        return jnp.sum((run(batch) - 1) ** 2), jnp.float32(len(batch))

    def go(steps, resume, dtype, start=start, override=("optimizer",)):
        options = {"batches": [x] * 9, "loss": loss, "optimizer": optax.adam(1e-2, mu_dtype=dtype), "show": False}
        return fit(
            lora, params, start, steps=steps, folder=tmp_path, resume=resume, save_every=2, **options, override=override
        )

    go(4, False, None)
    with pytest.raises(ValueError, match=r"scale_by_adam.mu_dtype is bfloat16 here, None was saved"):
        go(6, True, "bfloat16", override=())
    with pytest.raises(ValueError, match=r"^.*/4 holds training/opt_state/0/mu/w/a in float32, .* needs bfloat16") as e:
        go(6, True, "bfloat16")
    assert not isinstance(e.value, checkpoint.Damaged)
    low = {"w": {name: leaf.astype("float16") for name, leaf in start["w"].items()}}
    with pytest.raises(ValueError, match=r"holds adapters/w/a in float32, where this run needs float16"):
        go(6, True, None, low)
    assert not [*tmp_path.glob("damaged*")] and checkpoint.steps_in(tmp_path) == [2, 4]
    assert go(6, True, None).saved == 6


@pytest.mark.parametrize("free", [0, 1, 2])
def test_what_cannot_be_read_just_now_is_no_damage(tmp_path, free):
    save(tmp_path, 3, 5)
    before = sorted(tmp_path.rglob("*"))
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    with checkpoint.open_checkpoints(tmp_path, resume=True) as opened:
        taken = max(int(name) for name in os.listdir("/proc/self/fd"))
        resource.setrlimit(resource.RLIMIT_NOFILE, (taken, limit[1]))  # as where other programs took them all
        held = []
        try:
            while True:
                held.append(os.open("/dev/null", os.O_RDONLY))
        except OSError:
            pass
        for one in held[:free]:
            os.close(one)
        try:
            with pytest.raises(ValueError, match=r"cannot be read.*: it is left as it is") as error:
                checkpoint.restore(opened, ADAPTERS, {"step": np.zeros((), np.int32)}, {})
        finally:
            for one in held[free:]:
                os.close(one)
            resource.setrlimit(resource.RLIMIT_NOFILE, limit)
        assert not isinstance(error.value, checkpoint.Damaged)
    assert sorted(tmp_path.rglob("*")) == before
    assert restore(tmp_path)[0]["data"] == {"batch": 5}


def test_where_nothing_is_whole_nothing_is_moved(tmp_path):
    save(tmp_path, 3, 5)
    for step in (3, 5):
        file_of(tmp_path, step).write_text("{")
    with pytest.raises(ValueError, match=r"has no checkpoint that is whole \(.*5/about is damaged .*: start again"):
        restore(tmp_path)
    assert checkpoint.steps_in(tmp_path) == [3, 5] and not [*tmp_path.glob("damaged*")]


def test_where_the_one_before_is_refused_nothing_is_moved(tmp_path):
    save(tmp_path, 3, 5)
    shutil.rmtree(tmp_path / "checkpoints" / "5" / "adapters")
    with pytest.raises(ValueError, match=r"checkpoints/3 has no training for moment"):
        restore(tmp_path, {"step": np.zeros((), np.int32), "moment": np.zeros(3, "f4")})
    assert checkpoint.steps_in(tmp_path) == [3, 5] and not [*tmp_path.glob("damaged*")]
