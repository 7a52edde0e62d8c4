"""`wrap`: make a function of (parameters, data) a function of (parameters, adapters, data)."""

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from rslora_jax.adapters import (
    Adapters,
    adapter_shapes,
    array_leaves,
    check_adapters,
    init_adapters,
    sites_by_weight,
    varied,
    views_of,
)
from rslora_jax.config import LoraConfig
from rslora_jax.described import described
from rslora_jax.methods.random import site_key
from rslora_jax.module_names import with_globs
from rslora_jax.pytrees import Params
from rslora_jax.selection import select
from rslora_jax.sites import Site, from_paths, named_leaves, no_parameters
from rslora_jax.stored.form import is_stored, like_dense, memory_of
from rslora_jax.table import not_adapted, table
from rslora_jax.transform.discover import discover
from rslora_jax.transform.dropout import with_mask
from rslora_jax.transform.interpreter import Walk, as_arrays
from rslora_jax.transform.program import Program, is_array
from rslora_jax.transform.rules import RULES
from rslora_jax.transform.views import View, materialise

_DEFAULT = LoraConfig()


class RsloraWarning(UserWarning):
    """Said once where a weight has no low-rank form or a rank is larger than it need be."""


@dataclasses.dataclass
class _Fallbacks:
    """What is done where a weight is materialised: each primitive is said once for each weight, or refused.

    Attributes:
      config: says which of the two.
      seen: the primitives by weight.
      quiet: say nothing, as while a function is wrapped, which says all at once.
    """

    config: LoraConfig
    seen: dict[str, set[str]]
    quiet: bool = True

    def __call__(self, view: View, primitive: str) -> None:
        for name in view.sites:
            if primitive in self.seen[name]:
                continue
            if view.uses:
                raise ValueError(
                    f"{name} is to adapt one use of its weight, which meets an operation without a low-rank form "
                    f"({primitive}): leave out @{name.rpartition('@')[2]}, which adapts all uses"
                )
            text = (
                f"{name} is materialised by a use that has no low-rank form ({primitive}): exact, but it costs memory"
            )
            if self.config.on_fallback == "error":
                raise ValueError(f"{text}; exclude it, or set on_fallback='warn'")
            self.seen[name].add(primitive)
            if not self.quiet:
                warnings.warn(text, RsloraWarning, stacklevel=2)


@dataclasses.dataclass(frozen=True, eq=False)
class Lora:
    """A function with adapters: what `wrap` returns.

    It can be pickled and copied where `fn` can; what has been traced and compiled stays behind.

    Attributes:
      fn: the function that was wrapped.
      config: what was asked for.
      sites: the adapted weights by path, in the order in which the function uses them.
      left_out: the reason, by path, for each parameter on which the outputs depend and that is not adapted; and, by
        their pattern (`path/{0,3}`), for the layers that are not of a stacked one that is.
      unused: the paths of the parameters on which no output depends.
      kinds: what the weights among the parameters are, adapted or not, as `Site.kind` says, by path.
      tied: the paths of the parameters that are both looked up and multiplied, as a table that is the head too.
      shapes: the shape of each parameter that is an array, by path.
      platform: what it is compiled for; None for JAX's own backend. See `on`.
      program, walk: what has been traced of it, and how `apply` goes through that.
      compiled: what others have compiled of it (`kept_with_lora`).
    """

    fn: Callable[..., Any]
    config: LoraConfig
    sites: Mapping[str, Site]
    left_out: Mapping[str, str]
    unused: tuple[str, ...]
    kinds: Mapping[str, str]
    tied: tuple[str, ...]
    shapes: Mapping[str, tuple[int, ...]]
    platform: str | None
    program: Program
    walk: Walk
    compiled: dict[Any, Any] = dataclasses.field(default_factory=dict)

    def init(self, key: Array, params: Params = None) -> Adapters:
        """Return fresh adapters, with which `apply` starts as `fn`: of LoRA, A random and B zero.

        Args:
          key: a PRNG key.
          params: the base, for methods that start from its values.

        Returns:
          `{path: {name: array}}` in the config's dtype, and nothing else: of LoRA, "a" of shape (*stack, *in, r) and
          "b" of shape (*stack, r, *out).

        Raises:
          ValueError: the method needs the base, and it was not given.
        """
        return init_adapters(self.sites, key, self.config, params)

    def apply(
        self, params: Params, adapters: Adapters, *args: Any, dropout_key: Array | None = None, **kwargs: Any
    ) -> Any:
        """Evaluate the function with every adapted weight W acting as W + gamma A B.

        Gives what `fn(merge(params, adapters), *args, **kwargs)` gives, without forming that sum unless
        this is cheaper, and composes with jit, grad, vmap, scan and the rest.

        Args:
          params, adapters: the base, and what `init` gives.
          *args, **kwargs: the function's own.
          dropout_key: a PRNG key of this step, with which adapters drop a part of the data they see
            (`LoraConfig.dropout`): every weight, use and layer its own. Without one nothing is dropped, as in
            evaluation.

        Raises:
          ValueError: where the adapters or the parameters are not of the shapes wrapped; it names the
            path and both shapes.
        """
        self.check(params, adapters)
        params, adapters = varied(params, self.sites, adapters)
        dress = functools.partial(self._masked, dropout_key) if dropout_key is not None else lambda view: view
        return self.walked(self.walk, params, adapters, args, kwargs, dress)

    def _masked(self, key: Array, view: View) -> View:
        """Return the view of an adapted weight with what it draws its masks from."""
        site = self.sites[view.sites[0]]
        rate = self.config.dropout if site.scaled else 0
        return with_mask(view, site_key(key, site.path), rate, site.stack_axes) if rate else view

    def walked(
        self,
        walk: Walk,
        params: Params,
        adapters: Adapters,
        args: tuple,
        kwargs: dict[str, Any],
        dress: Callable[[View], View] = lambda view: view,
    ) -> Any:
        """Evaluate the function by a walk of the caller's own, and with views that `dress` gives what goes along."""
        jaxpr, tree, leaves = self.program.trace(params, args, kwargs)
        outs = walk.run(jaxpr, views_of(leaves, list(array_leaves(params)), self.sites, adapters, dress))
        return self.program.returned(tree, as_arrays(walk, outs), args, kwargs)

    def on(self, platform: str) -> "Lora":
        """Return the same, to be compiled for another platform than JAX's backend: "cpu", "gpu" or "tpu".

        What products are made of differs by platform, and none of the results do.
        """
        return self.having(platform=platform)

    def having(self, **fields: Any) -> "Lora":
        """Return the same with other fields, such as `sites`; it traces and compiles for itself."""
        return restored(self._known() | fields)

    def merge(self, params: Params, adapters: Adapters, *, copy: bool = False) -> Params:
        """Return the parameters with every adapter added in: of LoRA, W + gamma A B.

        A weight that is stored in a form of its own becomes an array where it has an adapter. The sum is formed in
        float32 (or the weight's own dtype if wider) and rounded once.

        Args:
          params, adapters: as of `apply`.
          copy: copy the leaves that no adapter changes too. Without it they are those of `params`: no memory is
            spent on them, but a function that is given the result to donate (`donate_argnums`) takes them from both.

        Returns:
          A pytree of the structure, dtypes and shardings of `params`.

        Raises:
          ValueError: one use of a tied weight is adapted for itself: merged, it would be two weights.
        """
        self.check(params, adapters)
        for site in self.sites.values():
            if site.use:
                raise ValueError(
                    f"{site.path} adapts one use of a weight: merged, its look-up and its product would need a weight "
                    "each; keep the adapters apart, or give the model a head of its own"
                )

        def one(leaf: Any, site: Site) -> Array:
            whole = leaf if is_stored(leaf) else jnp.asarray(leaf)
            merged = materialise(site.view(whole, adapters[site.path]))
            if is_stored(leaf) and memory_of(leaf) != memory_of(merged):
                merged = jax.device_put(merged, memory_of(leaf))
            concrete = isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer)
            return jax.device_put(merged, leaf.sharding) if concrete else merged

        def same(leaf: Any) -> Any:
            return jax.tree.map(lambda array: array.copy(), leaf) if copy and is_array(leaf) else leaf

        merged = {
            name: one(leaf, self.sites[name]) if name in self.sites else same(leaf)
            for name, leaf in named_leaves(params).items()
        }
        return from_paths(params, merged)

    def check(self, params: Params, adapters: Adapters) -> None:
        """Raise a ValueError that names the first path at which parameters or adapters do not fit."""
        leaves, adapted = array_leaves(params), sites_by_weight(self.sites)
        shapes = {name: tuple(leaf.shape) for name, leaf in leaves.items()}
        for name, shape in self.shapes.items():
            if name not in shapes:
                raise ValueError(f"the parameters have no {name}, which was there when the function was wrapped")
            if shapes[name] != shape:
                raise ValueError(f"parameter {name} has shape {shapes[name]}, and was wrapped with shape {shape}")
            if name in adapted and not jnp.issubdtype(leaves[name].dtype, jnp.floating):
                raise ValueError(f"parameter {name} is {leaves[name].dtype}, and an adapted weight is to be floating")
        check_adapters(self.sites, adapters)

    @property
    def adapter_shapes(self) -> Any:
        """The shapes and dtypes of the adapters, a pytree of `jax.ShapeDtypeStruct`."""
        return adapter_shapes(self.sites, self.config)

    def labels(self) -> dict[str, dict[str, str]]:
        """Return what each of the adapters' arrays is, a pytree of `init`'s structure, for `optax.multi_transform`.

        "in" is the factor with the in-axes (A), "out" that with the out-axes (B), "magnitude" DoRA's, "trained" a value
        that is trained whole, or rows.

        >>> lora = wrap(lambda p, x: x @ p["w"], {"w": jnp.ones((8, 5))}, jnp.ones((1, 8)), config=LoraConfig(rank=2))
        >>> lora.labels()
        {'w': {'a': 'in', 'b': 'out'}}

        With A frozen (arXiv 2308.03303), `optax.multi_transform({"in": optax.set_to_zero(), "out": optax.adam(1e-3)},
        lora.labels())` keeps no moments of it.
        """
        named = {path: getattr(site.method, "labels", {}) for path, site in self.sites.items()}
        return {path: {n: named[path].get(n, n) for n in site.factors} for path, site in self.sites.items()}

    @property
    def num_parameters(self) -> int:
        """Number of trainable numbers in all adapters."""
        return sum(site.num_parameters for site in self.sites.values())

    def _known(self) -> dict[str, Any]:
        """Return the fields but for what has been traced, as plain values."""
        made = ("program", "walk", "compiled")
        known = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in made}
        return {k: dict(v) if isinstance(v, MappingProxyType) else v for k, v in known.items()}

    def __reduce__(self) -> tuple[Any, ...]:
        return restored, (self._known(),)

    def describe(self) -> dict[str, Any]:
        """Return what `print(lora)` shows as a dict of plain values: config, sites, left_out, unused, parameters.

        >>> lora = wrap(lambda p, x: x @ p["w"], {"w": jnp.ones((8, 5))}, jnp.ones((1, 8)), config=LoraConfig(rank=2))
        >>> lora.describe()["sites"]["w"]["rank"], lora.describe()["parameters"]["trained"]
        (2, 26)
        """
        return described(self.config, self.sites, self.left_out, self.unused, self._num_base)

    @property
    def _num_base(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes.values())

    def __str__(self) -> str:
        text = table(self.sites, self._num_base)
        return "\n".join(part for part in (text, not_adapted(self.left_out, self.unused)) if part)

    __repr__ = __str__


def wrap(fn: Callable[..., Any], params: Params, *args: Any, config: LoraConfig = _DEFAULT, **kwargs: Any) -> Lora:
    """Give a function adapters on the weights it uses; the function itself is left as it is.

    `fn(params, *args, **kwargs)` is traced once, with abstract values; every weight in `params` is found
    by how it is used: which axes are summed over, which are free, which are stacked by a scan.

    Args:
      fn: a pure JAX function, such as a Flax model's `apply`.
      params: its parameters, any pytree of arrays or of `jax.ShapeDtypeStruct`.
      *args, **kwargs: an example of its other arguments; arrays or `jax.ShapeDtypeStruct`s. What is not
        an array (`train=True`, 3, None, a string) is static: another value, or an equal one of another type, is
        another trace. A float is traced, as by `jax.jit`, unless the function needs to know it.
      config: which weights, which rank, which scale. Names of modules in it, such as "q_proj", become globs.

    Raises:
      ValueError: where the config does not fit the function; it says what would.

    >>> import jax, jax.numpy as jnp
    >>> def mlp(params, x_BxI):
    ...     return jnp.tanh(x_BxI @ params["up"]) @ params["down"]
    >>> params = {"up": jnp.ones((8, 32)), "down": jnp.ones((32, 8))}
    >>> x_BxI = jnp.ones((2, 8))
    >>> lora = wrap(mlp, params, x_BxI, config=LoraConfig(rank=3, alpha=6))
    >>> adapters = lora.init(jax.random.key(0))
    >>> adapters["up"]["a"].shape, adapters["up"]["b"].shape
    ((8, 3), (3, 32))
    >>> bool((lora.apply(params, adapters, x_BxI) == mlp(params, x_BxI)).all())
    True
    """
    program = Program(fn)
    jaxpr, _, leaves = program.trace(params, args, kwargs)
    given = array_leaves(params)
    shapes = {name: tuple(leaf.shape) for name, leaf in given.items()}
    config = with_globs(config, shapes)
    found = discover(jaxpr, list(shapes), [like_dense(leaf) for leaf in leaves])
    selection = select(config, given, found, no_parameters(params))
    sites, notes = selection.sites, selection.notes

    fallbacks = _Fallbacks(config, {name: set() for name in sites})
    walk = _walk_of(sites, fallbacks)
    adapters = adapter_shapes(sites, config)

    def rehearse(leaves: list[Array], adapters: Any) -> list[Array]:
        return as_arrays(walk, walk.run(jaxpr, views_of(leaves, list(shapes), sites, adapters)))

    jax.eval_shape(rehearse, leaves, adapters)
    fallbacks.quiet = False

    sites = {name: dataclasses.replace(s, fallbacks=tuple(sorted(fallbacks.seen[name]))) for name, s in sites.items()}
    loud = [s for s in sites.values() if s.fallbacks]
    if loud:
        notes.append(
            f"{len(loud)} of {len(sites)} adapted weights are materialised by a use that has no low-rank form, first "
            f"{loud[0].path} ({', '.join(loud[0].fallbacks)}): exact, but it costs memory; see `lora.sites`"
            + ("; there dropout drops nothing" if config.dropout else "")
        )
    if jnp.finfo(config.dtype).bits < 32:
        notes.append(
            f"adapters held in {config.dtype} lose small steps by rounding: hold them in float32 (they are cast where "
            "they are used), or train with `rslora_jax.train.float32_masters(optimizer)`"
        )
    for note in notes:
        warnings.warn(note, RsloraWarning, stacklevel=2)
    left_out = MappingProxyType(selection.left_out)
    known: dict[str, Any] = {"fn": fn, "config": config, "sites": MappingProxyType(sites), "left_out": left_out}
    known |= {
        "unused": selection.unused,
        "kinds": MappingProxyType(selection.kinds),
        "tied": selection.tied,
        "shapes": MappingProxyType(shapes),
        "platform": None,
    }
    return Lora(**known, program=program, walk=walk)


def _walk_of(sites: Mapping[str, Site], fallbacks: _Fallbacks, platform: str | None = None) -> Walk:
    """Return the walk that applies adapters."""
    return Walk(RULES, on_fallback=fallbacks, tables=tables_of(sites), platform=platform)


def tables_of(sites: Mapping[str, Site]) -> frozenset[str]:
    """Return the paths of the weights that are looked up."""
    return frozenset(path for path, site in sites.items() if site.kind == "embedding" or site.use)


def restored(known: dict[str, Any]) -> Lora:
    """Make a `Lora` again of its fields; it traces and compiles for itself."""
    seen = {name: set(site.fallbacks) for name, site in known["sites"].items()}
    walk = _walk_of(known["sites"], _Fallbacks(known["config"], seen, quiet=False), known["platform"])
    fields: dict[str, Any] = {k: MappingProxyType(v) if isinstance(v, dict) else v for k, v in known.items()}
    return Lora(**fields, program=Program(known["fn"]), walk=walk)
