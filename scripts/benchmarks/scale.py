"""The real training step of a decoder too large for this machine: shapes and places, lowered and never run."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import rslora_jax as rslora
from rslora_jax.bare import Bare
from rslora_jax.models.decoder import SHARDING_RULES, Decoder, DecoderConfig, Embed, Layer
from rslora_jax.parallel import sharding
from rslora_jax.sites import from_paths, named_leaves
from rslora_jax.train import TrainState, make_step, token_loss
from rslora_jax.train.batches import Batch
from rslora_jax.train.loss import CHUNK_ON_MESH
from rslora_jax.transform import cost


@dataclasses.dataclass(frozen=True)
class Job:
    """One training step on one mesh.

    Attributes:
      config: the decoder; its layers scanned.
      mesh: of real or of described devices.
      rank, alpha: of every adapter.
      rows, length: of the batch, in tokens.
      pin: say where activations lie, by rows; else XLA finds a place for them.
      split_rank: let adapters lie along their rank too, over the axes that they do not use otherwise.
      platform: what is compiled for, where that is not JAX's backend.
      base: the format of the layers' matrices, as `rslora_jax.quantize` names it, such as "nf4"; None leaves them be.
    """

    config: DecoderConfig
    mesh: Mesh
    rank: int
    rows: int
    length: int
    alpha: float = 16.0
    pin: bool = True
    split_rank: bool = False
    platform: str | None = None
    base: str | None = None

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    @functools.cached_property
    def params(self) -> Any:
        """The base's weights, by `SHARDING_RULES`."""
        shapes = jax.eval_shape(Decoder(self.config).init, jax.random.key(0), TOKENS)
        params = placed(shapes, sharding.param_shardings(shapes, self.mesh, SHARDING_RULES))
        return rslora.quantize(params, self.base)[0] if self.base else params

    @functools.cached_property
    def lora(self) -> rslora.Lora:
        config = rslora.LoraConfig(rank=self.rank, alpha=self.alpha)
        lora = rslora.wrap(self.apply, self.params, TOKENS, config=config)
        return lora.on(self.platform) if self.platform else lora

    @functools.cached_property
    def state(self) -> TrainState:
        """The adapters and AdamW's two moments of each, float32, lying with them."""
        shapes = jax.eval_shape(self.lora.init, jax.random.key(0))
        where = sharding.adapter_shardings(self.lora.sites, self.params, split_rank=self.split_rank)
        state = jax.eval_shape(lambda a: TrainState.create(a, self.optimizer), shapes)
        whole = NamedSharding(self.mesh, PartitionSpec())

        def place(path: Any, leaf: Any) -> NamedSharding:
            return where[path[-2].key][path[-1].key] if leaf.ndim else whole

        return placed(state, jax.tree_util.tree_map_with_path(place, state))

    @functools.cached_property
    def batch(self) -> Batch:
        where = sharding.batch_sharding(self.mesh, self.rows)

        def of(dtype):
            return jax.ShapeDtypeStruct((self.rows, self.length), dtype, sharding=where)

        return Batch(of("int32"), of("int32"), of("float32"), of("int32"), of("int32"))

    @functools.cached_property
    def optimizer(self) -> optax.GradientTransformation:
        return optax.adamw(5e-5)

    @functools.cached_property
    def apply(self) -> Any:
        apply = decoder(self.config, self.mesh if self.pin else None)
        return sharding.pin_packed(apply, self.params, sharding.batch_sharding(self.mesh)) if self.pin else apply

    @property
    def loss(self) -> Any:
        """The loss as `rslora train` has it."""
        return token_loss(self.length, chunk=CHUNK_ON_MESH if self.mesh.size > 1 else None)

    def train_step(self, beside: int = 0) -> Any:
        """Lower the step of `rslora_jax.train.make_step`, with so many bytes of each device taken by something else."""
        step = make_step(self.lora, self.loss, self.optimizer)
        if not beside:
            return step.lower(self.state, self.params, self.batch)
        where = NamedSharding(self.mesh, PartitionSpec())
        other = jax.ShapeDtypeStruct((beside // 8192, 4096), "bfloat16", sharding=where)

        def both(state: Any, params: Any, batch: Any, other: Any) -> Any:
            return step(state, params, batch), other[0, 0] + 1

        return jax.jit(both, donate_argnums=0).lower(self.state, self.params, self.batch, other)

    def base_step(self) -> Any:
        """Lower what the base alone would do: its loss, and the gradient of its norms, which passes every layer."""
        loss, bare = self.loss, Bare(self.apply)

        def base_loss(scales: Any, params: Any, batch: Any) -> Any:
            whole = from_paths(params, named_leaves(params) | scales)
            return loss(functools.partial(bare, whole), batch)[0]

        scales = {path: w for path, w in named_leaves(self.params).items() if path.endswith("scale")}
        return jax.jit(jax.value_and_grad(base_loss)).lower(scales, self.params, self.batch)

    @property
    def scores_flops(self) -> int:
        """The FLOPs of all queries with all keys, and of the weights with the values, of all layers, once."""
        c = self.config
        return 4 * self.tokens * self.length * c.num_heads * c.head_dim * c.num_layers

    @property
    def kernel_flops(self) -> int:
        """The FLOPs of attention in splash attention's kernels: two products in the forward pass, again with remat,
        three for the queries' gradient and four for those of keys and values, of the half of scores that is seen.
        """
        if self.config.attention != "pallas":
            return 0
        passes = 1 + (self.config.remat in ("full", "offload", "products")) + 3 / 2 + 4 / 2
        return int(self.scores_flops * passes) // 2

    def flops(self) -> tuple[int, int]:
        """Return the FLOPs of the base's step and of the whole step, counted by hand from the sizes.

        With `remat` "full" and "offload" a layer's forward pass is made again in the backward pass, all but the last
        product, whose value no gradient needs; with "products" its attention alone. Attention in chunks forms the
        scores once more in the backward pass. Scores of keys that no query sees are counted as well, as in the compiled
        program; those of a kernel not at all, as they are no products of the compiled program: `kernel_flops`.
        """
        c, t, again = self.config, self.tokens, self.config.remat in ("full", "offload")
        attends = 3 + (again or c.remat == "products") + (c.attention == "chunked") / 2
        passes = 0 if c.attention == "pallas" else attends
        base, more = 4 * t * c.width * c.vocab_size + int(self.scores_flops * passes), 0
        summable = jnp.finfo(c.param_dtype).bits >= 32
        for site in self.lora.sites.values():
            layers, i, o = site.shape
            r, last = site.rank, site.path.endswith("down_proj/kernel")
            s = cost.Sizes(2 * t * i * o, 2 * t * i * r, 2 * t * r * o, 2 * r * i * o, i * o, t * r)
            plan = cost.plan(s, summable)
            base += layers * s.base * (2 + (again and not last))
            more += layers * cost.flops(s, plan, summable)
            if again:
                value = s.full + (0 if summable else s.base) if plan.forward else s.meet + s.leave
                more += layers * ((0 if plan.forward else s.meet) if last else value)
        return base, base + more


TOKENS = jax.ShapeDtypeStruct((1, 8), "int32")


def placed(shapes: Any, where: Any) -> Any:
    """Return abstract arrays that say where they lie."""
    return jax.tree.map(lambda s, w: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=w), shapes, where)


@functools.cache
def decoder(config: DecoderConfig, mesh: Mesh | None) -> Any:
    """Return the decoder's `apply`, on a mesh with the residual stream split by rows."""
    apply = Decoder(config).apply
    return sharding.pin_rows(apply, sharding.batch_sharding(mesh), (Embed, Layer)) if mesh else apply


def bytes_on_a_device(tree: Any) -> int:
    """Return how many bytes of placed abstract arrays lie on each device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
