"""What every method is measured on: the layers of a Llama without table and head, random data, one set of adapters."""

import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util
from jax import Array

from rslora_jax.models.decoder import DecoderConfig, Layer, RMSNorm
from rslora_jax.models.places import Places
from rslora_jax.models.rope import rotary
from rslora_jax.transform import cost

Adapters = dict[str, dict[str, Array]]

# Llama 3.2 1B and Llama 2 7B; and what is done at once, to try a script out.
PRESETS: dict[str, dict[str, Any]] = {
    "1b": {"width": 2048, "mlp_width": 8192, "layers": 16, "heads": 32, "kv_heads": 8},
    "7b": {"width": 4096, "mlp_width": 11008, "layers": 32, "heads": 32, "kv_heads": 32},
    "tiny": {"width": 64, "mlp_width": 160, "layers": 2, "heads": 4, "kv_heads": 2},
}


class Stack(nn.Module):
    """The layers of `rslora_jax.models.decoder`, from activations to activations.

    A loop and no scan, because XLA's count of FLOPs has the body of a scan only once. No table and no head,
    so that the floor can be the gradient to the input.
    """

    config: DecoderConfig

    @nn.compact
    def __call__(self, x_BxTxD: Array) -> Array:
        c = self.config
        positions_BxT = jnp.broadcast_to(jnp.arange(x_BxTxD.shape[1]), x_BxTxD.shape[:2])
        rope = [rotary(positions_BxT, c.head_dim, c.rope_base)]
        places = {"new": Places(positions_BxT, is_plain=True)}
        for n in range(c.num_layers):
            x_BxTxD, _ = Layer(c, name=f"layers_{n}")(x_BxTxD, rope, places, None)
        return RMSNorm(c, name="norm")(x_BxTxD)


@dataclasses.dataclass(frozen=True)
class Problem:
    """The sizes of one group of measurements.

    Attributes:
      config: the model's sizes and dtype.
      tokens: tokens a step.
      length: tokens a row; tokens / length rows make a batch.
      rank, alpha: of every adapter; its scale is alpha / sqrt(rank).
      platform: what is compiled for, where that is not JAX's backend.
    """

    config: DecoderConfig
    tokens: int
    length: int
    rank: int
    alpha: float
    platform: str | None = None

    @property
    def gamma(self) -> float:
        return self.alpha / math.sqrt(self.rank)

    @functools.cached_property
    def variables(self) -> Any:
        """The shapes of the base's weights."""
        return jax.eval_shape(Stack(self.config).init, jax.random.key(0), self.x)

    @property
    def x(self) -> jax.ShapeDtypeStruct:
        shape = (self.tokens // self.length, self.length, self.config.width)
        return jax.ShapeDtypeStruct(shape, self.config.dtype)

    @property
    def kernels(self) -> dict[str, tuple[int, int]]:
        """(in, out) of every adapted weight, by path."""
        flat = traverse_util.flatten_dict(self.variables, sep="/")
        return {path: leaf.shape for path, leaf in flat.items() if path.endswith("/kernel")}

    @property
    def adapters(self) -> Any:
        """The shapes of the adapters, in the form of `rslora_jax.Lora.init`: float32 in every method."""

        def leaf(*shape):
            return jax.ShapeDtypeStruct(shape, jnp.float32)

        return {p: {"a": leaf(i, self.rank), "b": leaf(self.rank, o)} for p, (i, o) in self.kernels.items()}

    @property
    def summable(self) -> bool:
        """Whether the weights are stored in a dtype in which a sum with an update keeps the update."""
        return jnp.finfo(self.config.param_dtype).bits >= 32

    def planned(self) -> int:
        """Return the FLOPs beside the floor's in the orders that the library chooses, by its own count."""
        return cost.least(self.sizes().values(), self.summable)

    def least(self, method: str) -> int:
        """Return the least FLOPs beside the floor's on paper, over all orders.

        Unlike `planned` it lets every sum W + A B be kept for the backward pass: the library forms a large one
        twice to save memory, and where XLA merges the two, the compiled step is below the library's own count.
        """
        if method == "floor":
            return 0
        if method == "full":
            return sum(s.base for s in self.sizes().values())
        orders = list(itertools.product((False, True), repeat=3))
        plans = [cost.Plan(False, forward, dx, factors, forward and dx) for forward, dx, factors in orders]
        return sum(min(cost.flops(s, p, self.summable) for p in plans) for s in self.sizes().values())

    def sizes(self) -> dict[str, cost.Sizes]:
        """Return the FLOPs of what each adapted product can be made of, by path."""
        t, r = self.tokens, self.rank
        return {
            path: cost.Sizes(
                base=2 * t * i * o,
                meet=2 * t * i * r,
                leave=2 * t * r * o,
                full=2 * r * i * o,
                kept_weight=i * o,
                kept_rows=t * r,
            )
            for path, (i, o) in self.kernels.items()
        }


@dataclasses.dataclass(frozen=True)
class Data:
    """The arrays a step is called with."""

    adapters: Adapters
    variables: Any
    x: Array
    target: Array

    @property
    def arguments(self) -> tuple[Any, ...]:
        return (self.adapters, self.variables, self.x, self.target)


def make_data(problem: Problem, variables: Any = None) -> Data:
    """Return random weights, adapters (neither factor zero), inputs and targets; the weights may be given."""
    w_key, a_key, x_key, y_key = jax.random.split(jax.random.key(0), 4)
    if variables is None:
        variables = jax.jit(Stack(problem.config).init)(w_key, problem.x)
    leaves, tree = jax.tree.flatten(problem.adapters)
    keys = jax.random.split(a_key, len(leaves))

    # Of the size of a trained update, so that a wrong scale would show.
    def normal(key, leaf):
        return jax.random.normal(key, leaf.shape, leaf.dtype) * 0.3 / math.sqrt(leaf.shape[0])

    adapters = jax.tree.unflatten(tree, [normal(k, leaf) for k, leaf in zip(keys, leaves, strict=True)])
    x, target = (jax.random.normal(key, problem.x.shape, problem.x.dtype) for key in (x_key, y_key))
    return Data(adapters, variables, x, target)


def loss(out: Array, target: Array) -> Array:
    """Return half the squared distance of each token's output to its target, averaged over tokens."""
    return 0.5 * jnp.mean(jnp.sum(jnp.square(out.astype(jnp.float32) - target.astype(jnp.float32)), axis=-1))
