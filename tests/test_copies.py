"""Copies of a wrapped function: by pickle, by `copy`, in another process; and what they share."""

import copy
import functools
import gc
import pickle
import subprocess
import sys
import warnings
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rslora_jax as rslora
from tests.program_models import normal
from tests.reference import trained

pytestmark = pytest.mark.usefixtures("compile_fast")

PARAMS, X = {"w": normal(0, 12, 14), "v": normal(1, 14, 14)}, normal(2, 5, 12)
CONFIG = rslora.LoraConfig(rank=3, alpha=7, rank_pattern={"v": 5})


def fn(p, x):
    return jax.lax.scan(lambda x, _: (jnp.tanh(x @ p["v"]), None), x @ p["w"], None, length=2)[0]


def loud(p, x):
    y = x @ p["w"]
    return y @ p["v"] if len(x) < 8 else y @ jnp.sort(p["v"])


COPIES = {
    "pickle": lambda lora: pickle.loads(pickle.dumps(lora)),
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "twice": lambda lora: copy.deepcopy(pickle.loads(pickle.dumps(lora))),
}


@pytest.mark.parametrize("how", list(COPIES))
def test_a_copy_gives_the_same_and_stands_alone(how):
    lora = rslora.wrap(fn, PARAMS, X, config=CONFIG)
    adapters = trained(lora)
    want = lora.apply(PARAMS, adapters, X)
    other = COPIES[how](lora)
    assert (other.sites, other.config, str(other)) == (lora.sites, lora.config, str(lora))
    assert type(other.sites) is type(lora.sites)
    np.testing.assert_array_equal(other.apply(PARAMS, adapters, X), want)
    jax.tree.map(np.testing.assert_array_equal, other.merge(PARAMS, adapters), lora.merge(PARAMS, adapters))
    jax.tree.map(np.testing.assert_array_equal, other.init(jax.random.key(3)), lora.init(jax.random.key(3)))
    with pytest.raises(ValueError, match="have no v"):
        other.apply({}, adapters, X)
    gone = weakref.ref(lora.program)
    del lora
    gc.collect()
    assert gone() is None  # the copy holds nothing of it
    np.testing.assert_array_equal(other.apply(PARAMS, adapters, X), want)


def test_a_copy_says_what_was_not_yet_said_and_no_more():
    lora = rslora.wrap(loud, PARAMS, X, config=CONFIG)
    adapters, other = trained(lora), copy.deepcopy(lora)
    for one in (lora, other):
        with pytest.warns(rslora.RsloraWarning, match=r"v is materialised .* \(sort\)"):
            one.apply(PARAMS, adapters, normal(2, 9, 12))
    with pytest.warns(rslora.RsloraWarning):
        said = rslora.wrap(loud, PARAMS, normal(2, 9, 12), config=CONFIG)
    with warnings.catch_warnings():
        warnings.simplefilter("error", rslora.RsloraWarning)
        pickle.loads(pickle.dumps(said)).apply(PARAMS, adapters, normal(2, 9, 12))


def test_a_function_that_cannot_be_pickled_is_named():
    lora = rslora.wrap(lambda p, x: fn(p, x), PARAMS, X, config=CONFIG)
    with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
        pickle.dumps(lora)
    assert copy.deepcopy(lora).fn is lora.fn
    partial = rslora.wrap(functools.partial(fn), PARAMS, X, config=CONFIG)
    assert pickle.loads(pickle.dumps(partial)).sites == partial.sites


@pytest.mark.by_day_on("newest")
def test_another_process_can_read_it(tmp_path):
    lora = rslora.wrap(fn, PARAMS, X, config=CONFIG)
    adapters = trained(lora)
    with open(tmp_path / "lora.pickle", "wb") as file:
        pickle.dump((lora, *jax.tree.map(np.asarray, (PARAMS, adapters, X))), file)
    text = (
        "import pickle, sys; lora, *args = pickle.load(open(sys.argv[1], 'rb')); print(float(lora.apply(*args).sum()))"
    )
    command = [sys.executable, "-c", text, str(tmp_path / "lora.pickle")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    assert float(done.stdout) == pytest.approx(float(lora.apply(PARAMS, adapters, X).sum()), rel=1e-5)
