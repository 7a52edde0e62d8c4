"""What every method defines, and how a config names one."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from rslora_jax.stored.form import Stored
from rslora_jax.transform.views import LETTERS, View
from rslora_jax.transform.views import RANK as LETTER

if TYPE_CHECKING:
    from rslora_jax.config import LoraConfig
    from rslora_jax.sites import Site

RANK = "rank"
Axis = int | str  # an axis of the weight, by its number, or RANK


class Method(Protocol):
    """An adapter's form: which arrays it is made of, how they start, and what they make of their weight.

    A method is a frozen dataclass, compared by value, in a file of its own that names it `METHOD`. All else goes over
    these: checks, the table, sharding, checksums, checkpoints, merging.

    Attributes:
      needs_base: whether `init` needs the weight's values.

    One whose arrays are values of the weight itself (`trained`) says so by `valued = True`: neither rank nor
    scale is theirs.
    """

    needs_base: bool

    def factors(self, site: Site) -> Mapping[str, tuple[Axis, ...]]:
        """Return the name of each array, and of each of its axes, which of the weight's it is, or `RANK`.

        The stack's axes come first, in all arrays.
        """

    def init(self, site: Site, key: Array, w: Array | Stored | None, config: LoraConfig) -> dict[str, Array]:
        """Return the arrays as training starts with them, in the config's dtype.

        With them nothing is changed yet. The key is the site's own; `w`, the base weight, an array or `Stored`, is
        None unless `needs_base`.
        """

    def view(self, site: Site, w: Array | Stored, factors: Mapping[str, Array]) -> View | Array:
        """Return what acts in place of the weight `w`, an array or `Stored` (`stored.dense` makes either an array).

        An array of the weight's shape and dtype takes its place in the program.
        """


class LowRank(Method, Protocol):
    """What a method may have beside, as LoRA has; of one that lacks a function, what needs it says so (`asked`).

    Attributes:
      labels: what each array is, for optimisers that treat them apart: "in" of the factor with the in-axes, "out" of
        that with the out-axes. An array without a label has its name.
      peft_head: where a table is the head too, what PEFT calls the head's tensors, and those of the table's that they
        are, turned.
    """

    labels: Mapping[str, str]
    peft_head: Mapping[str, str]

    def peft_names(self, site: Site) -> dict[str, str]:
        """Return what PEFT calls each array, behind the module's name."""

    def scaled(self, factors: Mapping[str, Array], by: Any) -> dict[str, Array]:
        """Return the adapter whose update is `by` times as large, as another scale would make it.

        `by` is a number, or an array of the stack's axes.
        """

    def low_rank(self, site: Site, factors: Mapping[str, Any]) -> tuple[Any, Any]:
        """Return the update but for gamma as two factors, (*stack, in, r) and (*stack, r, out)."""

    def of_low_rank(self, site: Site, first: Any, second: Any) -> dict[str, Any]:
        """Return the adapter of two factors as `low_rank` gives them, of the site's rank."""

    def less(self, site: Site, w: Array, factors: Mapping[str, Array]) -> Array:
        """Return the weight of which a starting adapter with these factors makes `w`; for `starts`."""

    def site_of(
        self, path: str, factors: Mapping[str, Any], shape: Sequence[int] | None, *, alpha: float, scaling: Any
    ) -> Site:
        """Return the site that an adapter fits, by its arrays, and the weight's shape where it is known."""


def method_of(method: str | Method) -> Method:
    """Return a method by the name of its file in this room, or the one that is given.

    Raises:
      ValueError: there is none of this name; it says which there are.

    >>> method_of("lora").needs_base
    False
    """
    if not isinstance(method, str):
        return method
    import rslora_jax.methods as room

    known = sorted(m.name for m in pkgutil.iter_modules(room.__path__))
    module = importlib.import_module(f"rslora_jax.methods.{method}") if method in known else None
    if not hasattr(module, "METHOD"):
        names = [name for name in known if hasattr(importlib.import_module(f"rslora_jax.methods.{name}"), "METHOD")]
        raise ValueError(f"method={method!r} is not known: use {', '.join(map(repr, names))}, or a Method")
    return module.METHOD  # type: ignore[union-attr]


def asked(method: Method, name: str, what: str) -> Any:
    """Return a function that a method may lack.

    Raises:
      ValueError: it does; `what` says what cannot be done.
    """
    found = getattr(method, name, None)
    if found is None:
        raise ValueError(f"the method {type(method).__name__} cannot {what}: it has no function {name}")
    return found


def rescaled(site: Site, factors: Mapping[str, Any], by: Any) -> dict[str, Any]:
    """Return the adapter of a site whose update is `by` times as large, as another gamma would make it."""
    return asked(site.method, "scaled", "have its scale changed")(factors, by)


def masked(site: Site, factors: Mapping[str, Array]) -> Mapping[str, Array]:
    """Return an adapter's arrays with zeros beyond each layer's own rank, where layers differ.

    An array without the rank is as it is; of a layer without an adapter it gets no gradient.
    """
    if not site.layers:
        return factors
    ranks = np.asarray([layer.rank for layer in site.layers])

    def one(name: str, axes: Sequence[Axis]) -> Array:
        array, own = jnp.asarray(factors[name]), _along(ranks, site.layer_axis, axes)
        if RANK not in axes:
            return jnp.where(own > 0, array, lax.stop_gradient(array))
        return jnp.where(_along(np.arange(site.rank), RANK, axes) < own, array, 0)

    return {name: one(name, axes) for name, axes in site.factors.items() if name in factors}


def own_arrays(site: Site, factors: Mapping[str, Array]) -> Mapping[str, Array]:
    """Return an adapter's arrays as they count at the site's gamma: masked, and with each layer's own gamma."""
    ratios = np.asarray([layer.gamma / site.gamma if layer.rank else 1.0 for layer in site.layers])
    if (ratios == 1).all():
        return masked(site, factors)
    return rescaled(site, masked(site, factors), _along(ratios, site.layer_axis, site.stack_axes))


def of_layer(site: Site, factors: Mapping[str, Any], n: int) -> dict[str, Any]:
    """Return the arrays of one layer's adapter, of its own rank: those of the site `site.of_layer(n)`."""
    rank = site.layers[n].rank if site.layers else site.rank

    def one(name: str, axes: Sequence[Axis]) -> Any:
        places = {site.layer_axis: n, RANK: slice(rank)}
        return factors[name][tuple(places.get(axis, slice(None)) for axis in axes)]

    return {name: one(name, axes) for name, axes in site.factors.items() if name in factors}


def _along(values: np.ndarray, axis: Axis | None, axes: Sequence[Axis]) -> np.ndarray:
    """Return numbers along one of some axes, of size 1 on the others."""
    return values.reshape([-1 if one == axis else 1 for one in axes])


def terms(site: Site) -> dict[str, str]:
    """Return the einsum terms of the weight, "w", and of each of its adapter's arrays; the rank's letter is Z.

    >>> import jax.numpy as jnp, rslora_jax as rslora
    >>> lora = rslora.wrap(lambda p, x: jnp.einsum("ti,sio->tso", x, p["w"]), {"w": jnp.ones((3, 8, 5))},
    ...                    jnp.ones((2, 8)), config=rslora.LoraConfig(rank=2, alpha=3))
    >>> terms(lora.sites["w"])
    {'w': 'abc', 'a': 'bZ', 'b': 'Zac'}
    """
    axes: dict[str, Sequence[Axis]] = {"w": range(len(site.shape)), **site.factors}
    return {name: "".join(LETTER if axis == RANK else LETTERS[axis] for axis in of) for name, of in axes.items()}  # type: ignore[index]


def aligned(site: Site, factors: Mapping[str, Array]) -> dict[str, Array]:
    """Return an adapter's arrays with all axes of their weight, of size 1 where they lack one, and the rank last."""
    axes = {name: own for name, own in site.factors.items() if name in factors}
    arrays = _align(site.shape, tuple(axes.values()), [factors[name] for name in axes])
    return dict(zip(axes, arrays, strict=True))


@functools.partial(jax.jit, static_argnums=(0, 1))  # layers of one kind are traced once
def _align(shape: tuple[int, ...], axes: Sequence[Sequence[Axis]], factors: Sequence[Array]) -> list[Array]:
    return [_with_all_axes(shape, own, factor) for own, factor in zip(axes, factors, strict=True)]


def _with_all_axes(shape: tuple[int, ...], axes: Sequence[Axis], factor: Array) -> Array:
    rank = [n for n, axis in enumerate(axes) if axis == RANK]
    own = sorted((n for n in range(len(axes)) if n not in rank), key=lambda n: axes[n])
    sizes = [n if axis in axes else 1 for axis, n in enumerate(shape)]
    return jnp.reshape(jnp.transpose(factor, (*own, *rank)), (*sizes, *(factor.shape[n] for n in rank)))
