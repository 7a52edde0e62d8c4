"""LoftQ beside numpy in float64 and PEFT's own, and the other starts on bases that are stored already."""

import math
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import rslora_jax as rslora
from rslora_jax import starts
from rslora_jax.stored import NF4, dense, float8, int8, is_stored, nf4
from tests.program_models import normal
from tests.reference import assert_near
from tests.starts.test_starts import matrices, products

pytestmark = [pytest.mark.usefixtures("compile_fast"), pytest.mark.by_day_on("newest")]
AT_NIGHT = pytest.mark.nightly
KEY = jax.random.key(3)
ROUND = {"nf4": nf4, "int8": int8, "float8": float8}


def plain(p, x):
    return jnp.tanh(x @ p["up"]) @ p["down"] + p["lm_head"][0]


def scanned(p, x):
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]


def between(p, x):  # the stack is the middle axis
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, jnp.moveaxis(p["w"], 1, 0))[0]


def heads(p, x):
    return jnp.einsum("bhd,hdo->bo", jnp.einsum("bi,ihd->bhd", x, p["q"]), p["out"])


CASES = {
    "plain": (plain, {"up": normal(0, 64, 96), "down": normal(1, 96, 64), "lm_head": normal(2, 64, 64)}, {}),
    "scanned": (scanned, {"w": normal(0, 3, 64, 64)}, {}),
    "between": (between, {"w": normal(0, 64, 2, 64)}, {}),
    "heads": (heads, {"q": normal(0, 64, 4, 16), "out": normal(1, 4, 16, 24)}, {}),
    "odd": (lambda p, x: x[:, :41] @ p["w"], {"w": normal(0, 41, 9)}, {}),
}
DAY = {("plain", "nf4", 1), ("scanned", "nf4", 3)}


def made(name, method="lora"):
    fn, params, config = CASES[name]
    lora = rslora.wrap(fn, params, normal(9, 2, 64), config=rslora.LoraConfig(rank=3, alpha=7, method=method, **config))
    return lora, params


def by_hand(site, w, stored_of, steps):
    """Give gamma A B of each matrix by the paper's algorithm 1, in float64, with what is rounded as given."""
    order = (*site.stack_axes, *site.in_axes, *site.out_axes)
    update = np.zeros(w.shape)
    for _ in range(steps):
        lost = matrices(
            site, np.asarray(w, np.float64) - np.asarray(stored_of(jnp.asarray(w - update, "float32")), np.float64)
        )
        u, s, vt = np.linalg.svd(lost, full_matrices=False)
        found = (u[..., : site.rank] * s[..., None, : site.rank]) @ vt[..., : site.rank, :]
        shape = [w.shape[n] for n in order]
        update = found.reshape(shape).transpose(np.argsort(order))
    return found


@pytest.mark.parametrize(
    ("name", "format", "steps"),
    [
        case if case in DAY else pytest.param(*case, marks=AT_NIGHT)
        for case in [(n, f, s) for n in CASES for f in ROUND for s in (1, 3)]
    ],
)
def test_the_update_is_the_principal_part_of_what_rounding_loses(name, format, steps):
    lora, params = made(name)
    small, adapters = starts.loftq(lora, params, KEY, format=format, steps=steps)
    once, _ = rslora.quantize(params, format, lora=lora)
    for path, site in lora.sites.items():
        stored, w = small[path], params[path]
        assert is_stored(stored) and jax.tree.structure(stored) == jax.tree.structure(once[path])

        def again(w, path=path):
            return rslora.quantize({path: w}, format, lora=lora, targets=path)[0][path].dense()

        want = by_hand(site, w, again, steps)
        # More turns may round a number on an edge otherwise.
        assert_near(products(site, adapters[path])[0], want, 1e-3 if steps == 1 else 0.15)
        lost = np.linalg.norm(np.asarray(dense(once[path]) - w, np.float64))
        left = np.linalg.norm(np.asarray(lora.merge(small, adapters)[path] - w, np.float64))
        assert left < lost
        if steps == 1:
            for one, other in zip(jax.tree.leaves(stored), jax.tree.leaves(once[path]), strict=True):
                np.testing.assert_array_equal(one, other)
    assert name != "plain" or not is_stored(small["lm_head"])


def test_more_turns_lose_less_and_dora_keeps_the_norms_of_the_weights_as_they_were():
    lora, params = made("plain", "dora")
    left = []
    for steps in (1, 5):
        small, adapters = starts.loftq(lora, params, KEY, steps=steps)
        norms = np.linalg.norm(np.asarray(params["up"], np.float64), axis=0)
        assert_near(adapters["up"]["m"], norms, 1e-5)
        left.append(
            np.linalg.norm(
                np.asarray(dense(small["up"]), np.float64)
                + products(lora.sites["up"], adapters["up"])[0][0]
                - params["up"]
            )
        )
    assert left[1] < left[0]


def test_layers_have_their_own_ranks_and_scales():
    params, ranks = {"layers": {"w": normal(0, 3, 64, 64)}}, (3, 5, 2)
    config = rslora.LoraConfig(rank=3, alpha=7, rank_pattern={"layers/{1}/w": 5, "layers/{2}/w": 2})
    lora = rslora.wrap(lambda p, x: scanned(p["layers"], x), params, normal(9, 2, 64), config=config)
    small, adapters = starts.loftq(lora, params, KEY)
    adapters, w = adapters["layers/w"], small["layers"]["w"]
    assert isinstance(w, NF4) and w.stack == (3,) and adapters["a"].shape == (3, 64, 5)
    for n, rank in enumerate(ranks):
        lost = np.asarray(params["layers"]["w"][n] - w.dense()[n], np.float64)
        u, s, vt = np.linalg.svd(lost)
        a, b = (np.asarray(adapters[name][n], np.float64) for name in "ab")
        assert_near(7 / math.sqrt(rank) * a @ b, u[:, :rank] * s[:rank] @ vt[:rank], 1e-3)


WRONG = {
    "steps=0 is no number of turns": {"steps": 0},
    "the format 'nf' is not known: did you mean nf4": {"format": "nf"},
    "block=63 is no size of blocks": {"block": 63},
}


@pytest.mark.parametrize(("says", "options"), WRONG.items())
def test_what_cannot_be_done_is_said(says, options):
    lora, params = made("odd")
    with pytest.raises(ValueError, match=says):
        starts.loftq(lora, params, KEY, **options)


def test_stored_bases_start_where_the_base_is_left_as_it_is_and_else_it_is_said():
    lora, params = made("plain")
    small, _ = rslora.quantize(params, "nf4")
    x = normal(9, 2, 64)
    even = rslora.wrap(plain, small, x, config=rslora.LoraConfig(rank=4, alpha=7))
    for begun, of in [(starts.orthogonal(even, small, KEY), even), (starts.eva(lora, small, KEY, [(x,)]), lora)]:
        base, adapters = begun
        assert base is small
        assert_near(of.apply(base, adapters, x), of.fn({n: dense(w) for n, w in small.items()}, x), 1e-5)

    def loss(run, x):
        return run(x).sum(), 1

    for begin in (starts.pissa, starts.olora, starts.loftq, lambda *args: starts.lora_ga(*args, loss, [x])):
        with pytest.raises(ValueError, match=r"up is stored as NF4, .* `starts.loftq`.*`quantize`"):
            begin(lora, small, KEY)


@pytest.mark.reference
@pytest.mark.parametrize(("bits", "steps"), [(4, 1), pytest.param(4, 3, marks=AT_NIGHT)])
def test_the_product_is_that_of_peft(bits, steps, monkeypatch):
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch = pytest.importorskip("torch")
    pytest.importorskip("bitsandbytes")
    utils = pytest.importorskip("peft.utils.loftq_utils")
    to = torch.Tensor.to

    def on_cpu(self, *args, **kwargs):  # it asks for an accelerator by name
        args = tuple("cpu" if str(of).startswith("cuda") else of for of in args)
        return to(self, *args, **{n: "cpu" if str(of).startswith("cuda") else of for n, of in kwargs.items()})

    monkeypatch.setattr(torch.Tensor, "to", on_cpu)
    w = np.asarray(normal(0, 64, 96))
    base, a, b = utils.loftq_init(torch.from_numpy(w.T.copy()), bits, 3, num_iter=steps)
    lora = rslora.wrap(
        lambda p, x: x @ p["w"], {"w": w}, np.ones((1, 64), "f4"), config=rslora.LoraConfig(rank=3, alpha=7)
    )
    small, adapters = starts.loftq(lora, {"w": jnp.asarray(w)}, KEY, steps=steps, double=False)
    got = products(lora.sites["w"], adapters["w"])[0][0]
    assert_near(got, (b @ a).detach().numpy().T, 1e-3 if steps == 1 else 0.1)
    same = np.abs(np.asarray(dense(small["w"])) - base.detach().numpy().T) < (1e-3 if steps > 1 else 1e-30)
    assert same.all() if steps == 1 else same.mean() > 0.95
