"""Every public optimiser of the installed optax, beside optax by hand on the merged model."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import rslora_jax as rslora
from rslora_jax import train
from rslora_jax.store import checkpoint
from rslora_jax.train.saving import from_checkpoint, training
from tests.train.optimizer_problem import Problem, equal, near, squares

pytestmark = [pytest.mark.by_day_on("oldest"), pytest.mark.usefixtures("compile_fast")]

SGD = optax.sgd(1e-2)
GIVEN = {  # what the makers of optimisers cannot do without, by the names of their arguments
    "adv_optimizer": optax.sgd(0.1),
    "base_optimizer": SGD,
    "clipping": 0.1,
    "decay": 0.9,
    "eta": 0.01,
    "every_k_schedule": 2,
    "f": lambda u, _: u,
    "fast_optimizer": SGD,
    "freeze_mask": False,
    "gamma": 0.5,
    "inner": SGD,
    "l2_norm_clip": 1.0,
    "learning_rate": 1e-2,
    "mask": True,
    "max_backtracking_steps": 4,
    "max_consecutive_errors": 2,
    "max_delta": 1.0,
    "max_linesearch_steps": 4,
    "max_norm": 1.0,
    "measure": optax.tree.norm,
    "measure_name": "norm",
    "measures": {"norm": contrib.normalize()},
    "noise_multiplier": 0.1,
    "opt": SGD,
    "optimizer": SGD,
    "param_labels": lambda p: {path: {"a": "a", "b": "b"} for path in p},
    "seed": 0,
    "should_transform_fn": lambda step: step >= 0,
    "slow_step_size": 0.5,
    "step_size": 0.1,
    "step_size_fn": lambda n: 1 / (n + 1),
    "sync_period": 2,
    "threshold": 1.0,
    "transforms": {"a": SGD, "b": optax.adam(1e-2)},
    "tx": SGD,
}
# Those that train no adapters by a gradient alone, and the refusal.
REFUSED = {
    # Gradients of each example are not what a step has.
    "differentially_private_aggregate": r"differentially_private_aggregate cannot .* update of shape \(5, 3\)",
    "dpsgd": r"chain\(differentially_private_aggregate, identity, scale\) cannot .* update of shape \(5, 3\)",
    "measure_with_ema": r"chain\(stateless, ema\) cannot .* update of shape \(\)",  # a number, for a monitor
    "scale_by_muon": "scale_by_muon cannot .* structure",  # it is to be told the axes of each array
}


# What optax by hand is to be given, beside the gradient, by those that ask.
SEARCH = ("value", "grad", "value_fn")
ASK = {
    **dict.fromkeys(["lbfgs", "scale_by_zoom_linesearch", "scale_by_backtracking_linesearch"], SEARCH),
    **dict.fromkeys(["momo", "momo_adam", "polyak_sgd", "scale_by_polyak", "reduce_on_plateau"], ("value",)),
    **dict.fromkeys(["sophia", "hutchinson_estimator_diag_hessian"], ("obj_fn",)),
}


def makers():
    """What optax and optax.contrib make optimisers with, by name."""
    found = {}
    for name, function in [*inspect.getmembers(optax), *inspect.getmembers(contrib)]:
        if name.startswith("_") or not (inspect.isfunction(function) or name == "MultiSteps"):
            continue
        signature = inspect.signature(function)
        says = f"{function.__doc__} {signature.return_annotation}"
        if name == "MultiSteps" or ("GradientTransformation" in says and "params" not in signature.parameters):
            found[name] = function
    return found


# Parts of optimisers, as they are in those that are tested by day.
AT_NIGHT = [name for name in sorted(makers()) if name.startswith("scale_by_") and name not in {*ASK, *REFUSED}]
BY_DAY = sorted({*makers()} - {*AT_NIGHT})


def make(name):
    function = makers()[name]
    if name == "chain":
        return function(optax.clip(1.0), SGD)
    if name == "named_chain":
        return function(("clip", optax.clip(1.0)), ("sgd", SGD))
    if name.startswith("inject"):
        return function(optax.adam)(learning_rate=1e-2)
    takes = inspect.signature(function).parameters.values()
    return function(**{p.name: GIVEN[p.name] for p in takes if p.default is p.empty})


@pytest.fixture(scope="module")
def problem():
    return Problem()


def saved_and_read(folder, state, fresh):
    """A state through a checkpoint, into that of a new process."""
    with checkpoint.open_checkpoints(folder) as saved:
        checkpoint.save(saved, 1, state.to_use, training(state), {"config": {}, "base": {}})
    with checkpoint.open_checkpoints(folder, resume=True) as saved:
        restored = checkpoint.restore(saved, fresh.adapters, training(fresh), {})
    return from_checkpoint(fresh, restored)


def check(problem, optimizer, ask, folder):
    """Two steps are those of optax by hand; the second, resumed, is bit for bit the same; one program did both."""
    step = train.make_step(problem.lora, squares, optimizer)

    def create():
        return train.TrainState.create(problem.adapters, optimizer)

    state, metrics = step(create(), problem.params, problem.batches[0])
    assert float(metrics["loss"]) == pytest.approx(float(problem.mean(problem.adapters, problem.batches[0])), rel=1e-5)
    again = saved_and_read(folder, state, create())
    equal(again, state)
    ended, _ = step(state, problem.params, problem.batches[1])
    near(ended.adapters, problem.by_hand(optimizer, ask, 2))
    assert step._cache_size() == 1
    equal(step(again, problem.params, problem.batches[1])[0], ended)
    create()  # what the optimiser itself holds was not given away


@pytest.mark.filterwarnings("ignore:Specifying a key", "ignore:muon takes arrays of two axes")
@pytest.mark.parametrize("name", [*BY_DAY, *(pytest.param(name, marks=pytest.mark.nightly) for name in AT_NIGHT)])
def test_every_optimiser_of_optax_trains_adapters_or_is_refused_by_name(problem, tmp_path, name):
    optimizer = make(name)
    if name in REFUSED:
        with pytest.raises(ValueError, match=f"^the optimiser {REFUSED[name]}"):
            check(problem, optimizer, (), tmp_path)
        return
    check(problem, optimizer, ASK.get(name, ()), tmp_path)


def put_together():
    """Optimisers of several, and what they ask for."""
    polyak, free = optax.polyak_sgd(), contrib.schedule_free_adamw(1e-2)

    def by_factor(tree):
        return {path: {"a": "a", "b": "b"} for path in tree}

    storing = optax.scale_by_backtracking_linesearch(4, store_grad=True)
    normalized, axes = optax.chain(contrib.normalize(), optax.sgd(0.1)), Problem().lora
    return {
        "polyak if finite": (optax.apply_if_finite(polyak, 3), ["value"]),
        "polyak every second step": (optax.MultiSteps(polyak, 2).gradient_transformation(), ["value"]),
        "lbfgs every second step": (optax.MultiSteps(optax.lbfgs(), 2), SEARCH),
        "adam behind a plateau": (optax.chain(optax.adam(1e-2), contrib.reduce_on_plateau()), ["value"]),
        "a search that keeps the gradient": (optax.chain(optax.sgd(1.0), storing), SEARCH),
        "a search behind a clip": (optax.chain(optax.clip(0.1), optax.lbfgs()), SEARCH),
        "sam by itself": (contrib.sam(SGD, normalized, opaque_mode=True), ["grad_fn"]),
        "sam in a chain": (optax.chain(optax.clip(1.0), contrib.sam(SGD, normalized, opaque_mode=True)), ["grad_fn"]),
        "two kinds": (optax.partition({"a": free, "b": polyak}, by_factor), ["value"]),
        "muon on stacks": (contrib.muon(1e-2, muon_weight_dimension_numbers=train.muon_axes(axes)), []),
        "noise of rbg": (optax.noisy_sgd(1e-2, key=jax.random.key(3, impl="rbg")), []),
        "a raw key of sophia's": (
            contrib.sophia(1e-2, hessian_diagonal_fn=contrib.hutchinson_estimator_diag_hessian(jax.random.PRNGKey(5))),
            ["obj_fn"],
        ),
        "skips": (optax.MultiSteps(SGD, 2, should_skip_update_fn=optax.skip_not_finite), []),
    }


@pytest.mark.filterwarnings("error::rslora_jax.RsloraWarning")
@pytest.mark.parametrize("name", put_together())
def test_optimisers_of_several(problem, tmp_path, name):
    check(problem, *put_together()[name], tmp_path)


def test_an_optimiser_that_cannot_be_is_refused_before_a_run_begins(problem, tmp_path):
    def go(optimizer):
        return train.fit(
            problem.lora,
            problem.params,
            problem.adapters,
            batches=problem.batches,
            loss=squares,
            optimizer=optimizer,
            steps=2,
            folder=tmp_path / "run",
            show=False,
        )

    with pytest.raises(ValueError, match=r"^the optimiser chain\(clip, scale_by_muon\) cannot train adapters: "):
        go(optax.chain(optax.clip(1.0), contrib.scale_by_muon()))
    with pytest.raises(ValueError, match=r"^the optimiser adam cannot train adapters: .*no attribute 'init'"):
        go(optax.adam)

    def needs(updates, state, params, *, curvature):
        return (updates, state)

    with pytest.raises(
        ValueError, match=r"^the optimiser .* cannot train adapters: .*missing 1 required .* 'curvature'"
    ):
        go(optax.GradientTransformationExtraArgs(lambda params: (), needs))
    assert not (tmp_path / "run").exists()


def test_muon_by_itself_says_that_it_leaves_stacks_to_adam(problem):
    with pytest.warns(rslora.RsloraWarning, match=r"leaves all these adapters.*muon_axes\(lora\)"):
        train.TrainState.create(problem.adapters, contrib.muon(1e-2))


@pytest.mark.parametrize("name", ["adam", "polyak_sgd", "schedule_free_adamw", "sam", "lookahead"])
def test_what_does_not_search_takes_one_forward_pass(problem, name):
    traced = []

    def loss(run, batch):
        traced.append(1)
        return squares(run, batch)

    def flops(optimizer):
        step = train.make_step(problem.lora, loss, optimizer)
        state = jax.eval_shape(lambda: train.TrainState.create(problem.adapters, optimizer))
        return step.lower(state, problem.params, problem.batches[0]).compile().cost_analysis()["flops"]

    cost = flops(make(name))
    assert len(traced) == 1
    update = 60 * sum(x.size for x in jax.tree.leaves(problem.adapters))  # what is done to each number of the adapters
    gradient = (
        jax.jit(
            jax.value_and_grad(
                lambda a: squares(functools.partial(problem.lora.apply, problem.params, a), problem.batches[0])[0]
            )
        )
        .lower(problem.adapters)
        .compile()
        .cost_analysis()["flops"]
    )
    assert cost < gradient + update
    assert flops(make("lbfgs")) > cost + 0.5 * gradient and len(traced) > 2


def test_a_search_over_a_batch_in_parts_is_that_over_the_whole(problem):
    """The objective is the mean over the batch, not over one part, and its scalar is in every part."""
    optimizer = optax.lbfgs()
    x = np.swapaxes(problem.batches[0], 0, 1)
    batch = {"x": x, "weight": np.float32([1, 0, 3, 2]), "scale": 0.5}

    def rows(run, batch):
        errors = jnp.sum((run(jnp.swapaxes(batch["x"], 0, 1)) - 1) ** 2, axis=(1, 2))
        return batch["scale"] * jnp.sum(batch["weight"] * errors), jnp.sum(batch["weight"])

    found = []
    for parts in (1, 2, 4):
        step = train.make_step(problem.lora, rows, optimizer, accumulate=parts)
        state = train.TrainState.create(problem.adapters, optimizer)
        for _ in range(2):
            state, metrics = step(state, problem.params, batch)
        found.append((state.adapters, metrics["loss"]))
    for got in found[1:]:
        near(got, found[0], 1e-3)

    def mean(adapters):
        w = problem.params["w"] + 7 / np.sqrt(3) * adapters["w"]["a"] @ adapters["w"]["b"]
        errors = jnp.sum((jnp.einsum("bni,nio->bno", x, w) - 1) ** 2, axis=(1, 2))
        return 0.5 * jnp.sum(batch["weight"] * errors) / 6

    adapters, state = problem.adapters, optimizer.init(problem.adapters)
    for _ in range(2):
        value, grad = jax.value_and_grad(mean)(adapters)
        updates, state = optimizer.update(grad, state, adapters, value=value, grad=grad, value_fn=mean)
        adapters = optax.apply_updates(adapters, updates)
    near(found[0], (adapters, value), 1e-3)


def test_adapters_to_use_are_those_that_the_optimiser_means(problem):
    def after(optimizer, steps):
        step, state = train.make_step(problem.lora, squares, optimizer), None
        state = train.TrainState.create(problem.adapters, optimizer)
        for x in problem.batches[:steps]:
            state, _ = step(state, problem.params, x)
        return state

    def descend(adapters, x, rate, at=None):
        grads = jax.grad(problem.mean)(adapters if at is None else at, x)
        return jax.tree.map(lambda a, g: a - rate * g, adapters, grads)

    first, second, third = problem.batches
    # Schedule-free: x is the mean of the z, as the weights are equal (arXiv 2405.15682, eq. 3 to 5).
    z = x = problem.adapters
    for n, batch in enumerate(problem.batches):
        y = jax.tree.map(lambda z, x: 0.1 * z + 0.9 * x, z, x)
        z = descend(z, batch, 0.05, at=y)
        x = jax.tree.map(lambda x, z, n=n: x + (z - x) / (n + 1), x, z)
    for optimizer in (contrib.schedule_free_sgd(0.05), optax.chain(optax.clip(9.0), contrib.schedule_free_sgd(0.05))):
        state = after(optimizer, 3)
        near(state.to_use, x)
        assert all(np.abs(a - b).max() > 1e-4 for a, b in zip(*map(jax.tree.leaves, (state.adapters, x)), strict=True))
    # Lookahead: the slow adapters go half the way of two fast steps.
    fast = descend(descend(problem.adapters, first, 1e-2), second, 1e-2)
    slow = jax.tree.map(lambda slow, fast: slow + 0.5 * (fast - slow), problem.adapters, fast)
    state = after(make("lookahead"), 3)
    near(state.to_use, slow)
    near(state.adapters, descend(slow, third, 1e-2))
    # Sam: every second step is one of sgd, with the gradient of the shifted adapters; in between, they are shifted.
    sam = contrib.sam(optax.sgd(1e-2), optax.chain(contrib.normalize(), optax.sgd(0.1)))
    grads = jax.grad(problem.mean)(problem.adapters, first)
    shifted = jax.tree.map(lambda a, g: a + 0.1 * g / optax.tree.norm(grads), problem.adapters, grads)
    near(after(sam, 1).adapters, shifted)
    near(after(sam, 1).to_use, problem.adapters)
    near(after(sam, 2).to_use, descend(problem.adapters, second, 1e-2, at=shifted))
    assert after(optax.adam(1e-2), 1).to_use is not None
    state = after(optax.adam(1e-2), 1)
    assert state.to_use is state.adapters


@pytest.mark.parametrize("optimizer", [contrib.schedule_free_sgd, optax.polyak_sgd, contrib.momo])
def test_trials_of_a_sweep_are_the_runs_alone(problem, optimizer):
    def source(seed):
        return [x + seed for x in problem.batches]

    trials = [train.Trial(0.02), train.Trial(0.05, seed=1)]
    found = train.sweep(
        *(problem.lora, problem.params, trials),
        **{"batches": source, "loss": squares, "optimizer": optimizer, "steps": 3, "heldout": problem.batches[:1]},
    )
    for outcome in found:
        one = optimizer(outcome.trial.learning_rate)
        step = train.make_step(problem.lora, squares, one)
        state = train.TrainState.create(problem.lora.init(jax.random.key(outcome.trial.seed)), one)
        for x in source(outcome.trial.seed):
            state, _ = step(state, problem.params, x)
        near(outcome.adapters, state.to_use)
        held = float(problem.mean(state.to_use, problem.batches[0]))
        assert outcome.heldout[3].loss == pytest.approx(held, rel=1e-4)


def test_a_sweep_may_search(problem):
    def make_it(rate):
        return optax.chain(optax.sgd(rate), optax.scale_by_backtracking_linesearch(4))

    def batches(seed):
        return problem.batches

    options = {"batches": batches, "loss": squares, "optimizer": make_it, "steps": 2}
    rates = (0.5, 2.0)
    found = train.sweep(problem.lora, problem.params, [train.Trial(rate) for rate in rates], **options)
    for rate, outcome in zip(rates, found, strict=True):
        step = train.make_step(problem.lora, squares, make_it(rate))
        state = train.TrainState.create(problem.lora.init(jax.random.key(0)), make_it(rate))
        for x in problem.batches[:2]:
            state, _ = step(state, problem.params, x)
        near(outcome.adapters, state.adapters)


@pytest.mark.parametrize("name", ["schedule_free_sgd", "lookahead", "sam"])
def test_a_run_evaluates_and_keeps_the_adapters_to_use(problem, tmp_path, name):
    """And goes on from those it trains, bit for bit. The batches have a scalar."""
    optimizer = make(name)

    def loss(run, batch):
        total, count = squares(run, batch["x"])
        return total * batch["scale"], count

    batches = [{"x": x, "scale": 0.5} for x in problem.batches * 2]

    def fit(folder, steps, **options):
        return train.fit(
            *(problem.lora, problem.params, problem.adapters),
            **{"batches": batches, "loss": loss, "optimizer": optimizer, "steps": steps, "folder": tmp_path / folder},
            **{"heldout": batches[:1], "eval_every": 1, "save_every": 1, "show": False, "keep": 9} | options,
        )

    step, state = train.make_step(problem.lora, loss, optimizer), train.TrainState.create(problem.adapters, optimizer)
    whole = fit("whole", 5)
    for n in range(5):
        state, _ = step(state, problem.params, batches[n])
        held = [r["heldout_loss"] for r in whole.records if "heldout_loss" in r and r["step"] == n + 1]
        assert held[0] == pytest.approx(0.5 * float(problem.mean(state.to_use, problem.batches[0])), rel=1e-5)
        kept = checkpoint.load_adapters(tmp_path / "whole", params=problem.params, step=n + 1)[1]
        near(kept, state.to_use)
    near(whole.adapters, state.to_use)
    fit("parts", 3)
    parts = fit("parts", 5, resume=True)
    equal(parts.adapters, whole.adapters)
    assert [r.get("loss") for r in parts.records] == [r.get("loss") for r in whole.records]
