"""The methods: each makes, for one problem, the function whose gradient is a training step.

All take (adapters, variables, x, target), the adapters in float32 and in one form, and give the loss. A step is
the value and the gradient to the adapters and to the input: the layers stand for the middle of a deep model,
whose gradient to the input is always needed. There is no optimiser in it.
"""

import importlib.util
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util
from jax import Array

import rslora_jax as rslora
from benchmarks.problem import Adapters, Problem, Stack, loss

Step = Callable[[Adapters, Any, Array, Array], Any]

# What the gradient is taken to, by the place of the argument.
ADAPTERS, VARIABLES, INPUT = 0, 1, 2


def floor(problem: Problem) -> Step:
    """The base's forward pass and the gradient to its input: no adapter can do with less."""
    model = Stack(problem.config)
    return lambda adapters, variables, x, target: loss(model.apply(variables, x), target)


def rslora_jax(problem: Problem) -> Step:
    """This library."""
    lora = wrapped(problem, "lora")
    return lambda adapters, variables, x, target: loss(lora.apply(variables, adapters, x), target)


def dora(problem: Problem) -> Step:
    """This library's DoRA; its magnitudes are ones and stay so, as in `torch_peft`."""
    lora = wrapped(problem, "dora")

    def fn(adapters: Adapters, variables: Any, x: Array, target: Array) -> Array:
        shapes = {path: site.factor_shapes["m"] for path, site in lora.sites.items()}
        whole = {path: {**own, "m": jnp.ones(shapes[path])} for path, own in adapters.items()}
        return loss(lora.apply(variables, whole, x), target)

    return fn


def wrapped(problem: Problem, method: str) -> rslora.Lora:
    """Return the layers with adapters."""
    # A rank above the full one of a narrow weight (keys of few heads) is as good a measurement as any.
    config = rslora.LoraConfig(rank=problem.rank, alpha=problem.alpha, allow_large_rank=True, method=method)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "rank .* is above", rslora.RsloraWarning)
        lora = rslora.wrap(Stack(problem.config).apply, problem.variables, problem.x, config=config)
    return lora.on(problem.platform) if problem.platform else lora


def qwix(problem: Problem) -> Step:
    """Qwix's LoRA on the Linen module; its scale is alpha / rank, so its alpha is gamma times the rank."""
    import qwix as library

    provider = library.LoraProvider(module_path=".*", rank=problem.rank, alpha=problem.gamma * problem.rank)
    model = library.apply_lora_to_model(Stack(problem.config), provider)
    dtype = problem.config.dtype

    def fn(adapters: Adapters, variables: Any, x: Array, target: Array) -> Array:
        return loss(model.apply(beside_kernels(variables, adapters, dtype), x), target)

    return fn


def factored(problem: Problem) -> Step:
    """LoRA written into the layers by hand: every nn.Dense gives x W + gamma (x A) B."""
    model, dtype = Stack(problem.config), problem.config.dtype

    def fn(adapters: Adapters, variables: Any, x: Array, target: Array) -> Array:
        with factored_layers(problem.gamma):
            out = model.apply(beside_kernels(variables, adapters, dtype), x)
        return loss(out, target)

    return fn


def factored_layers(gamma: float) -> AbstractContextManager[None]:
    """Return a context in which each layer with factors beside its kernel adds gamma (x A) B."""

    def dense(call: Callable[..., Array], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Array:
        y = call(*args, **kwargs)
        if context.method_name != "__call__" or not context.module.has_variable("params", "kernel_lora_a"):
            return y
        a, b = (context.module.get_variable("params", f"kernel_lora_{f}") for f in "ab")
        return y + (args[0] @ a) @ b * gamma

    return nn.intercept_methods(dense)


def beside_kernels(variables: Any, adapters: Adapters, dtype: Any) -> Any:
    """Return the weights with each kernel's factors beside it, cast to what products are computed in."""
    flat = traverse_util.flatten_dict(variables, sep="/")
    for path, factors in adapters.items():
        flat |= {f"{path}_lora_{name}": factor.astype(dtype) for name, factor in factors.items()}
    return traverse_util.unflatten_dict(flat, sep="/")


def merged(problem: Problem) -> Step:
    """LoRA by hand as one weight: W + gamma A B is formed in float32 and used in place of W."""
    model, dtype = Stack(problem.config), problem.config.dtype

    def fn(adapters: Adapters, variables: Any, x: Array, target: Array) -> Array:
        flat = traverse_util.flatten_dict(variables, sep="/")
        for path, factors in adapters.items():
            a, b = (factors[name].astype(dtype) for name in "ab")
            flat[path] = (flat[path].astype(jnp.float32) + problem.gamma * (a @ b).astype(jnp.float32)).astype(dtype)
        return loss(model.apply(traverse_util.unflatten_dict(flat, sep="/"), x), target)

    return fn


# Name, function, and to what its gradient is taken.
JAX_METHODS: dict[str, tuple[Callable[[Problem], Step], tuple[int, ...]]] = {
    "floor": (floor, (INPUT,)),
    "full": (floor, (VARIABLES, INPUT)),
    "rslora": (rslora_jax, (ADAPTERS, INPUT)),
    "qwix": (qwix, (ADAPTERS, INPUT)),
    "factored": (factored, (ADAPTERS, INPUT)),
    "merged": (merged, (ADAPTERS, INPUT)),
    "dora": (dora, (ADAPTERS, INPUT)),
}
ON_TORCH = ("peft", "peft-compiled", "peft-dora", "torch")
PACKAGES = {"qwix": ("qwix",)} | dict.fromkeys(ON_TORCH, ("torch", "transformers", "peft"))
METHODS = {
    "floor": "base forward and gradient to the input, no adapters",
    "full": "gradient to all weights",
    "rslora": "this library",
    "qwix": "qwix.LoraProvider on the Linen module",
    "factored": "hand-written x W + gamma (x A) B in every nn.Dense",
    "merged": "hand-written x (W + gamma A B)",
    "peft": "Hugging Face PEFT on torch, use_rslora=True",
    "peft-compiled": "the same by torch.compile",
    "dora": "this library's DoRA, the magnitudes left as they are",
    "peft-dora": "PEFT's DoRA on torch, the magnitudes left as they are",
    "torch": "the floor on torch, by the model that PEFT adapts",
}
# Of each, the first that is measured is the one the others must agree with.
ALIKE = (("factored", "rslora", "qwix", "merged", "peft", "peft-compiled"), ("dora", "peft-dora"))
# Measured when they are asked for: the first rounds the update away where weights are bfloat16, and so is no way to
# train there; the second takes a minute to compile.
BY_NAME = ("merged", "peft-compiled")
ADAPTED = tuple(name for names in ALIKE for name in names)


def missing(method: str) -> list[str]:
    """Return the packages that a method needs and that are not installed."""
    return [name for name in PACKAGES.get(method, ()) if importlib.util.find_spec(name) is None]


def jitted(method: str, problem: Problem) -> Any:
    """Return a method's step as a jitted function: (loss, gradients)."""
    build, argnums = JAX_METHODS[method]
    return jax.jit(jax.value_and_grad(build(problem), argnums))


def shapes(problem: Problem, sharding: Any = None) -> Any:
    """Return the shapes of a step's arguments, for lowering without data."""
    arguments = (problem.adapters, problem.variables, problem.x, problem.x)
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), arguments)


def precision(problem: Problem) -> Any:
    """Return the context to lower in: float32 products that are float32 on every kind of device."""
    return jax.default_matmul_precision("highest" if problem.config.dtype == "float32" else None)
