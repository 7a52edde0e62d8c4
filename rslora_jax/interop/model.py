"""What every loader of models returns."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from flax import linen as nn

from rslora_jax.bare import Bare
from rslora_jax.interop.family import Family
from rslora_jax.sites import named_leaves
from rslora_jax.stored import is_stored

# Where weights are to lie: a pytree of shardings like the variables, or what makes one of the variables' shapes (a
# pytree of `jax.ShapeDtypeStruct`), such as `partial(param_shardings, mesh=mesh, rules=SHARDING_RULES)`.
Shardings = Any | Callable[[Any], Any]

# progress(done, total), in bytes.
Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A model that was loaded: `model.apply(model.variables, tokens)` gives its logits.

    It unpacks: `config, variables, tokenizer = load_model()`.

    Attributes:
      config: the configuration, of the family's own class.
      variables: the weights, a pytree.
      tokenizer: the tokenizer, a `Tokenizer`; None where the model was loaded without text.
      family: what the library knows of models of this kind.
      changed: the fields of config.json that are others than in the file that it was read from.
      rows: how many tokens the file has rows for, where the variables have more (`enlarged`).
    """

    config: Any
    variables: dict[str, Any]
    tokenizer: Any
    family: Family
    changed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    rows: int | None = None

    def __iter__(self) -> Iterator[Any]:
        return iter((self.config, self.variables, self.tokenizer))

    @property
    def module(self) -> nn.Module:
        """The Flax module."""
        return self.family.build(self.config)

    @property
    def apply(self) -> Callable[..., Any]:
        """The module's `apply`, for `rslora_jax.wrap`; it takes weights that are stored in a form of their own too."""
        return apply_of(self.module, self.variables)

    def with_template_options(self, options: Mapping[str, Any]) -> Model:
        """Return it with options for its chat template; a ValueError for one that the template never looks at."""
        return dataclasses.replace(self, tokenizer=self.tokenizer.with_options(options)) if options else self


def apply_of(module: nn.Module, variables: Any) -> Callable[..., Any]:
    """Give a module's `apply`, which takes what of the variables is stored in a form of its own."""
    return Bare(module.apply) if any(map(is_stored, named_leaves(variables).values())) else module.apply


def shardings_of(shardings: Shardings, shapes: Any) -> Any:
    """Give the pytree of shardings that a loader's argument stands for: one of Nones where it is None.

    Raises:
      ValueError: a pytree is given that is not like the variables.
    """
    found = shardings(shapes) if callable(shardings) else shardings
    if found is None:
        return jax.tree.map(lambda _: None, shapes)
    structure: Any = jax.tree.structure(shapes)
    if jax.tree.structure(found) != structure:
        raise ValueError("the shardings are not a pytree like the model's variables: give a function of their shapes")
    return found
