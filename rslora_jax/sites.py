"""Sites: the weights that get adapters, found by how the program uses them."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from flax.core.meta import AxisMetadata
from jax import Array

from rslora_jax.layers import Layer
from rslora_jax.methods.method import RANK, Method, own_arrays
from rslora_jax.pytrees import PyTree
from rslora_jax.stored.qwix import is_weight, taken
from rslora_jax.transform.views import View


@dataclasses.dataclass(frozen=True)
class Site:
    """One adapted weight.

    Attributes:
      path: its pytree path, joined with "/"; with "@lookup" or "@product" behind, where it is a tied weight of which
        this use alone is adapted.
      shape: its shape.
      in_axes, out_axes, stack_axes: its axes that are summed over (or indexed), free, and stacked.
      kind: "linear", "expert" (a stack used in one batched product), "convolution" or "embedding"; or "trained", of any
        use, where the value itself is trained (`LoraConfig.trained`), of which all axes but the stack's are out-axes.
      rank, alpha, gamma: this adapter's own; gamma is the whole factor on A B. Where layers differ, those of the layer
        with the largest rank, which is that of the arrays.
      method: what its adapter is (`methods/`).
      fallbacks: the uses that have no low-rank form, by primitive; there the weight is materialised.
      use: "lookup" or "product" where the adapter is that of one use, "" where it is that of all.
      uses: what the program does with the weight, in its order: "lookup" or "product" each time.
      groups: of a convolution, into how many its channels are parted.
      layer_axis: of the stacked axes the one of the layers, which patterns number: that which a scan takes apart.
      layers: what each layer has, where they differ.
    """

    path: str
    shape: tuple[int, ...]
    in_axes: tuple[int, ...]
    out_axes: tuple[int, ...]
    stack_axes: tuple[int, ...]
    kind: str
    rank: int
    alpha: float
    gamma: float
    method: Method
    fallbacks: tuple[str, ...] = ()
    use: str = ""
    uses: tuple[str, ...] = ()
    groups: int = 1
    layer_axis: int | None = None
    layers: tuple[Layer, ...] = ()

    @property
    def tied(self) -> bool:
        """Whether the weight is both looked up and multiplied."""
        return len(set(self.uses)) > 1

    @property
    def scaled(self) -> bool:
        """Whether it has a rank and a scale; not where its arrays are values of the weight's own."""
        return not getattr(self.method, "valued", False)

    @property
    def weight(self) -> str:
        """The path of the weight, without its use."""
        return self.path.removesuffix(f"@{self.use}")

    @property
    def factors(self) -> Mapping[str, tuple[int | str, ...]]:
        """The adapter's arrays by name: of each axis, which of the weight's it is, or "rank"."""
        return self.method.factors(self)

    @property
    def factor_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the adapter's arrays, by name."""

        def size(axis: int | str) -> int:
            return self.rank if axis == RANK else self.shape[axis]  # type: ignore[index]

        return {name: tuple(map(size, axes)) for name, axes in self.factors.items()}

    @property
    def labels(self) -> tuple[frozenset[tuple[str, int]], ...]:
        """Each axis of the weight by (path, number)."""
        return tuple(frozenset({(self.weight, n)}) for n in range(len(self.shape)))

    @property
    def in_size(self) -> int:
        """How many places the axes that are summed over have between them."""
        return math.prod(self.sizes(self.in_axes))

    @property
    def out_size(self) -> int:
        """How many places the free axes have between them."""
        return math.prod(self.sizes(self.out_axes))

    @property
    def num_parameters(self) -> int:
        """How many numbers the adapter has, without those beyond a layer's own rank, which are zero."""
        if not self.layers:
            return sum(map(math.prod, self.factor_shapes.values()))
        return sum(self.of_layer(n).num_parameters for n, layer in enumerate(self.layers) if layer.rank)

    def of_layer(self, n: int) -> "Site":
        """Return the site of one layer, with its own rank, alpha and gamma.

        Raises:
          ValueError: the weight holds no layers.
        """
        if self.layer_axis is None:
            raise ValueError(f"{self.path} holds no layers")
        one = self._without(self.layer_axis)
        return dataclasses.replace(one, **(self.layers[n]._asdict() if self.layers else {}))

    def by_layer(self, of: Callable[[Layer], float]) -> Any:
        """Return a number that rank, alpha and gamma give; where layers differ, one for each along the stack's axes.

        It is 1 for a layer without an adapter.
        """
        if not self.layers:
            return of(Layer(self.rank, self.alpha, self.gamma))
        numbers = np.asarray([of(layer) if layer.rank else 1.0 for layer in self.layers], np.float32)
        return numbers.reshape([-1 if axis == self.layer_axis else 1 for axis in self.stack_axes])

    def view(self, w: Any, factors: Mapping[str, Any]) -> View | Array:
        """Return what acts in place of the weight `w`, an array or `Stored`, with an adapter's arrays."""
        return self.method.view(self, w, own_arrays(self, factors))

    def sizes(self, axes: Sequence[int]) -> tuple[int, ...]:
        """Return the weight's sizes along some axes."""
        return tuple(self.shape[n] for n in axes)

    def element(self) -> "Site":
        """Return the site of one element of the stack's first axis, which is the weight's first.

        Raises:
          ValueError: the first axis is none of the stack.
        """
        if self.stack_axes[:1] != (0,) and self.kind != "trained":
            raise ValueError(f"{self.path} holds layers on its first axis, but its adapter is one for all of them")
        return self._without(0)

    def _without(self, axis: int) -> "Site":
        """Return the site of one element along a stacked axis."""

        def renumbered(axes: Sequence[int]) -> tuple[int, ...]:
            return tuple(n - (n > axis) for n in axes if n != axis)

        changed: dict[str, Any] = {
            name: renumbered(getattr(self, name)) for name in ("in_axes", "out_axes", "stack_axes")
        }
        if self.layer_axis in (None, axis):
            changed |= {"layer_axis": None, "layers": ()}
        else:
            changed |= {"layer_axis": self.layer_axis - (self.layer_axis > axis)}
        return dataclasses.replace(self, shape=self.shape[:axis] + self.shape[axis + 1 :], **changed)


def path_name(path: Sequence[Any]) -> str:
    """Join a pytree path with "/".

    >>> [path_name(p) for p, _ in jax.tree_util.tree_leaves_with_path({"layers": [{"kernel": 0}]})]
    ['layers/0/kernel']
    """
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


_BOXES = (AxisMetadata, nnx.Variable)  # nodes that say something of an array, such as `nn.Partitioned`


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """Return the leaves of a pytree by path, in its order.

    What is in a box of Flax (`nn.Partitioned`, `nnx.Param`) has the path that it would have without one.

    >>> import flax.linen as nn
    >>> list(named_leaves({"dense": {"kernel": nn.Partitioned(0, names=("rows", None)), "bias": 0}}))
    ['dense/bias', 'dense/kernel']

    Raises:
      ValueError: two leaves have one path, as in `{"a/b": ..., "a": {"b": ...}}`.
    """
    leaves = list(_unboxed(tree))
    named = {path_name(path): leaf for path, leaf in leaves}
    if len(named) < len(leaves):
        raise ValueError(_shared_path([path for path, _ in leaves]))
    return named


def _shared_path(paths: Sequence[Any]) -> str:
    """Say which two of some pytree paths have one name."""
    first: dict[str, Any] = {}
    for path in paths:
        name = path_name(path)
        if name in first:
            one, other = (jax.tree_util.keystr(p) for p in (first[name], path))
            return f"two leaves have the path {name}: {one} and {other}; a leaf is known by its path, so rename one"
        first[name] = path
    return "every leaf has a path of its own"


def no_parameters(tree: PyTree) -> dict[str, str]:
    """Return the kind, by path, of the NNX variables in a pytree that are no parameters and so never get adapters.

    >>> no_parameters({"kernel": nnx.Param(0), "seen": nnx.Cache(0)})
    {'seen': 'Cache'}
    """
    nodes = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, nnx.Variable) or is_weight(node))
    others = [isinstance(n, nnx.Variable) and not isinstance(n, nnx.Param) for n in nodes]
    kinds = [type(n).__name__ if other else "" for n, other in zip(nodes, others, strict=True)]
    each = [kind for n, kind in zip(nodes, kinds, strict=True) for _ in _leaves_of(n)]
    return {path_name(path): kind for (path, _), kind in zip(_unboxed(tree), each, strict=True) if kind}


def from_paths(like: PyTree, leaves: Mapping[str, Any]) -> PyTree:
    """Return a pytree of the structure of `like` with leaves by path.

    >>> from_paths([0, {"a": 0}], {"1/a": 2, "0": 1})
    [1, {'a': 2}]
    """
    return jax.tree.unflatten(_structure_of(like), [leaves[name] for name in named_leaves(like)])


def _leaves_of(tree: PyTree) -> list[Any]:
    """Return the leaves of a pytree, of which a stored weight is one."""
    return jax.tree.leaves(tree, is_leaf=is_weight)


def _structure_of(tree: PyTree) -> Any:
    """Return the structure of a pytree in which a stored weight is one leaf."""
    return jax.tree.structure(tree, is_leaf=is_weight)


def _unboxed(tree: PyTree) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yield the leaves of a pytree with their key paths, in which boxes are no step."""
    for path, node in jax.tree_util.tree_leaves_with_path(
        tree, is_leaf=lambda node: isinstance(node, _BOXES) or is_weight(node)
    ):
        if not isinstance(node, _BOXES):
            yield path, taken(node)
            continue
        parts = jax.tree_util.tree_leaves_with_path(node, is_leaf=lambda part, box=node: part is not box)
        for step, part in parts:
            for rest, leaf in _unboxed(part):
                yield (*path, *(step if len(parts) > 1 else ()), *rest), leaf
