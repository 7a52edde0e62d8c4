"""`wrap`: make a function of (parameters, data) a function of (parameters, adapters, data)."""

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from rslora_jax.config import LoraConfig
from rslora_jax.init import init_adapters
from rslora_jax.selection import select
from rslora_jax.sites import Site, named_leaves, no_parameters
from rslora_jax.table import fold, table
from rslora_jax.transform import compat, renames
from rslora_jax.transform.discover import discover
from rslora_jax.transform.interpreter import Walk, as_arrays
from rslora_jax.transform.program import Program, is_array
from rslora_jax.transform.rules import RULES
from rslora_jax.transform.views import View, materialise

Adapters = dict[str, dict[str, Array]]
DEFAULT = LoraConfig()


class RsloraWarning(UserWarning):
    """Said once where a weight has no low-rank form or a rank is larger than it need be."""


@dataclasses.dataclass
class Fallbacks:
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
      left_out: the reason, by path, for each parameter on which the outputs depend and that is not adapted.
      unused: the paths of the parameters on which no output depends.
    """

    fn: Callable[..., Any]
    config: LoraConfig
    sites: Mapping[str, Site]
    left_out: Mapping[str, str]
    unused: tuple[str, ...]
    _program: Program
    _walk: Walk
    _shapes: Mapping[str, tuple[int, ...]]

    def init(self, key: Array) -> Adapters:
        """Return fresh adapters: A random, B zero, so that `apply` starts as `fn`.

        Args:
          key: a PRNG key.

        Returns:
          `{path: {"a": (*stack, *in, r), "b": (*stack, r, *out)}}` in the config's dtype, and nothing else.
        """
        return init_adapters(self.sites, key, self.config.init, jnp.dtype(self.config.dtype))

    def apply(self, params: Any, adapters: Adapters, *args: Any, **kwargs: Any) -> Any:
        """Evaluate the function with every adapted weight W acting as W + gamma A B.

        Gives what `fn(merge(params, adapters), *args, **kwargs)` gives, without forming that sum unless
        this is cheaper, and composes with jit, grad, vmap, scan and the rest.

        Raises:
          ValueError: where the adapters or the parameters are not of the shapes wrapped; it names the
            path and both shapes.
        """
        self.check(params, adapters)
        params, adapters = varied(params, self.sites, adapters)
        jaxpr, tree, leaves = self._program.trace(params, args, kwargs)
        values = views_of(leaves, list(array_leaves(params)), self.sites, adapters)
        outs = self._walk.run(jaxpr, values)
        return self._program.returned(tree, as_arrays(self._walk, outs), args, kwargs)

    def merge(self, params: Any, adapters: Adapters, *, copy: bool = False) -> Any:
        """Return the parameters with every adapter added in: W + gamma A B.

        The sum is formed in float32 (or the weight's own dtype if wider) and rounded once.

        Args:
          params, adapters: as of `apply`.
          copy: copy the leaves that no adapter changes too. Without it they are those of `params`: no memory is
            spent on them, but a function that is given the result to donate (`donate_argnums`) takes them from both.

        Returns:
          A pytree of the structure, dtypes and shardings of `params`.
        """
        self.check(params, adapters)
        leaves, tree = jax.tree.flatten(params)
        names = list(named_leaves(params))

        def one(leaf: Any, site: Site) -> Array:
            merged = materialise(view_of(jnp.asarray(leaf), site, adapters[site.path]))
            concrete = isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer)
            return jax.device_put(merged, leaf.sharding) if concrete else merged

        same = lambda leaf: leaf.copy() if copy and is_array(leaf) else leaf
        merged = [
            one(leaf, self.sites[name]) if name in self.sites else same(leaf)
            for name, leaf in zip(names, leaves, strict=True)
        ]
        return jax.tree.unflatten(tree, merged)

    def check(self, params: Any, adapters: Adapters) -> None:
        """Raise a ValueError that names the first path at which parameters or adapters do not fit."""
        leaves = array_leaves(params)
        shapes = {name: tuple(leaf.shape) for name, leaf in leaves.items()}
        for name, shape in self._shapes.items():
            if name not in shapes:
                raise ValueError(f"the parameters have no {name}, which was there when the function was wrapped")
            if shapes[name] != shape:
                raise ValueError(f"parameter {name} has shape {shapes[name]}, and was wrapped with shape {shape}")
            if name in self.sites and not jnp.issubdtype(leaves[name].dtype, jnp.floating):
                raise ValueError(f"parameter {name} is {leaves[name].dtype}, and an adapted weight is to be floating")
        check_adapters(self.sites, adapters)

    @property
    def num_parameters(self) -> int:
        """Number of trainable numbers in all adapters."""
        return sum(site.num_parameters for site in self.sites.values())

    def __reduce__(self) -> tuple[Any, ...]:
        known = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("_program", "_walk")}
        return restored, ({k: dict(v) if isinstance(v, MappingProxyType) else v for k, v in known.items()},)

    def __str__(self) -> str:
        text = table(self.sites, sum(math.prod(shape) for shape in self._shapes.values()))
        return "\n".join(part for part in (text, fold(self.left_out, self.unused)) if part)

    __repr__ = __str__


def wrap(fn: Callable[..., Any], params: Any, *args: Any, config: LoraConfig = DEFAULT, **kwargs: Any) -> Lora:
    """Give a function adapters on the weights it uses; the function itself is left as it is.

    `fn(params, *args, **kwargs)` is traced once, with abstract values; every weight in `params` is found
    by how it is used: which axes are summed over, which are free, which are stacked by a scan.

    Args:
      fn: a pure JAX function, such as a Flax model's `apply`.
      params: its parameters, any pytree of arrays or of `jax.ShapeDtypeStruct`.
      *args, **kwargs: an example of its other arguments; arrays or `jax.ShapeDtypeStruct`s. What is not
        an array (`train=True`, 3, None, a string) is static: another value, or an equal one of another type, is
        another trace. A float is traced, as by `jax.jit`, unless the function needs to know it.
      config: which weights, which rank, which scale.

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
    selection = select(config, given, discover(jaxpr, list(shapes), leaves), no_parameters(params))
    sites, notes = selection.sites, selection.notes

    fallbacks = Fallbacks(config, {name: set() for name in sites})
    walk = walk_of(sites, fallbacks)
    shaped = lambda *shape: jax.ShapeDtypeStruct(shape, config.dtype)
    adapters = {name: {"a": shaped(*site.a_shape), "b": shaped(*site.b_shape)} for name, site in sites.items()}

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
        )
    if jnp.finfo(config.dtype).bits < 32:
        notes.append(
            f"adapters held in {config.dtype} lose small steps by rounding: hold them in float32 (they are cast where "
            "they are used), or train with `rslora_jax.train.masters.float32_masters(optimizer)`"
        )
    for note in notes:
        warnings.warn(note, RsloraWarning, stacklevel=2)
    left_out = MappingProxyType(selection.left_out)
    return Lora(
        fn, config, MappingProxyType(sites), left_out, selection.unused, program, walk, MappingProxyType(shapes)
    )


def walk_of(sites: Mapping[str, Site], fallbacks: Fallbacks) -> Walk:
    """Return the walk that applies adapters."""
    tables = frozenset(name for name, site in sites.items() if site.kind == "embedding")
    return Walk(RULES, on_fallback=fallbacks, tables=tables)


def restored(known: dict[str, Any]) -> Lora:
    """Make a `Lora` again of its fields; it traces and compiles for itself."""
    seen = {name: set(site.fallbacks) for name, site in known["sites"].items()}
    walk = walk_of(known["sites"], Fallbacks(known["config"], seen, quiet=False))
    fields: dict[str, Any] = {k: MappingProxyType(v) if isinstance(v, dict) else v for k, v in known.items()}
    return Lora(**fields, _program=Program(known["fn"]), _walk=walk)


def check_adapters(sites: Mapping[str, Site], adapters: Any) -> None:
    """Raise a ValueError that says what about the adapters does not fit the sites."""
    made = "they were made for another config or another base"
    if not isinstance(adapters, Mapping):
        raise ValueError(f"the adapters are of type {type(adapters).__name__}: `init` gives a dict of factors by path")
    for name, site in sites.items():
        if name not in adapters:
            raise ValueError(f"the adapters have none for {name}: {made}")
        factors, shapes = adapters[name], {"a": site.a_shape, "b": site.b_shape}
        if not isinstance(factors, Mapping):
            raise ValueError(f'adapter {name} is of type {type(factors).__name__}: it is to be {{"a": ..., "b": ...}}')
        for factor, shape in shapes.items():
            if factor not in factors:
                raise ValueError(f"adapter {name} has no {factor}: it needs one of shape {shape}")
            array = factors[factor]
            if not is_array(array) or not jnp.issubdtype(array.dtype, jnp.floating):
                what = getattr(array, "dtype", type(array).__name__)
                raise ValueError(f"adapter {name}/{factor} is of type {what}: it is to be a floating array of {shape}")
            if tuple(array.shape) != shape:
                raise ValueError(
                    f"adapter {name}/{factor} has shape {tuple(array.shape)}, and this config asks for {shape} "
                    f"(rank {site.rank}): {made}"
                )
        for factor in factors:
            if factor not in shapes:
                raise ValueError(f"adapter {name} has a {factor}, which this config's method does not use: {made}")
    for name in adapters:
        if name not in sites:
            raise ValueError(f"the adapters have {name}, which this config does not adapt")


def array_leaves(params: Any) -> dict[str, Any]:
    """Return the parameters that are arrays, by path."""
    return {name: leaf for name, leaf in named_leaves(params).items() if is_array(leaf)}


def varied(params: Any, sites: Mapping[str, Site], adapters: Adapters) -> tuple[Any, Adapters]:
    """Inside a `shard_map`, let each weight and its factors vary over the same devices, as their sum would."""
    found = {
        name: compat.vary_together(leaf, adapters[name]["a"], adapters[name]["b"])
        for name, leaf in named_leaves(params).items()
        if name in sites
    }
    leaves = [found[name][0] if name in found else leaf for name, leaf in named_leaves(params).items()]
    return jax.tree.unflatten(jax.tree.structure(params), leaves), {
        name: {"a": a, "b": b} for name, (_, a, b) in found.items()
    }


def views_of(leaves: Sequence[Any], names: Sequence[str], sites: Mapping[str, Site], adapters: Adapters) -> list[Any]:
    """Return a program's inputs, those that are adapted as views; the first are the parameters of `names`."""
    views = [
        view_of(w, sites[name], adapters[name]) if name in sites else w for w, name in zip(leaves, names, strict=False)
    ]
    return [*views, *leaves[len(names) :]]


def view_of(w: Array, site: Site, factors: Mapping[str, Array]) -> View:
    """Return the view of a weight and its adapter."""
    axes = tuple(frozenset({(site.path, n)}) for n in range(len(site.shape)))
    a, b = align(site.shape, site.stack_axes, site.in_axes, site.out_axes, factors["a"], factors["b"])
    return renames.lay(View(w, a, b, axes, w.dtype, (site.path,), site.gamma), w)


@functools.partial(jax.jit, static_argnums=range(4))  # layers of one kind are traced once
def align(
    shape: tuple[int, ...],
    stack: tuple[int, ...],
    ins: tuple[int, ...],
    outs: tuple[int, ...],
    a: Array,
    b: Array,
) -> tuple[Array, Array]:
    """Return A and B aligned to their weight's axes, the rank last."""

    def to(axes: tuple[int, ...], factor: Array) -> Array:
        order = sorted(range(len(axes)), key=axes.__getitem__)
        sizes = [n if axis in axes else 1 for axis, n in enumerate(shape)]
        return jnp.reshape(jnp.transpose(factor, (*order, len(axes))), (*sizes, factor.shape[-1]))

    return to(stack + ins, a), to(stack + outs, jnp.moveaxis(b, len(stack), -1))
