"""What the library knows of a family of models, in one record: its files, its weights' names, its module."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from flax import linen as nn

from rslora_jax.interop.names import Names


class Untied(NamedTuple):
    """A model that was given a head of its own.

    Attributes:
      config, variables: its own.
      table, head: the paths of the two weights.
      changed: the fields of config.json that say so.
    """

    config: Any
    variables: Any
    table: str
    head: str
    changed: dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Family:
    """A family of models: a module, and how it comes from files and goes into them.

    Everything that loads, wraps, merges, exports and imports goes over this record, so that a further family is one
    file that makes one, and its entry in `families.FAMILIES` (or the argument `family` of the loaders).

    Attributes:
      model_types: the `model_type`s of Hugging Face's config.json that are of this family.
      read_config: gives a model's configuration from (the path of its config.json, for errors; its content; and, by
        keyword, scan_layers, remat, param_dtype, dtype). A frozen dataclass with `vocab_size` and `max_len`, and
        `scan_layers` where the module can stack its layers.
      write_config: gives the content of a config.json from (a configuration, a dtype's name), without special tokens.
      build: gives the Flax module of a configuration. `init(key, tokens_BxT)` and `apply(variables, tokens_BxT)`.
      names: the Hugging Face name of every weight, and whether it is stored transposed.
      ignored: says whether a folder may hold a tensor without a place here, from (the configuration, its name);
        None where it may not.
      untie: gives, from (a configuration, its variables) of a model whose token table is its head too, the same with a
        head of its own; None where no model of the family is tied.
      vocabulary: gives the paths of the weights that have a row for each token, and along which axis, from a
        configuration: the token table, and the head where it is another weight; None where no tokens can be added.
      suited: gives, from (the configuration of config.json; the tensors of its folder by name, as
        `weights.load_weights` takes them), (the configuration that these are of, the fields of config.json that say
        so), or a ValueError; None where config.json says it all.
      sharding_rules: where weights lie on a mesh, for `parallel.sharding.param_shardings`.
      blocks: the classes of modules between which rows stay on their devices, for `parallel.sharding.pin_rows`.
      gguf: how GGUF files hold the family; None where they are not read.
      outline: gives the shapes of a few weights that tell all sizes of a configuration, by path. They are compared with
        the files before a model of these sizes is built, which may say that they are a million times the true ones.
    """

    model_types: Sequence[str]
    read_config: Callable[..., Any]
    write_config: Callable[[Any, str], dict[str, Any]]
    build: Callable[[Any], nn.Module]
    names: Names
    ignored: Callable[[Any, str], bool] | None = None
    untie: Callable[[Any, Any], Untied] | None = None
    vocabulary: Callable[[Any], Mapping[str, int]] | None = None
    suited: Callable[[Any, Mapping[str, Any]], tuple[Any, dict[str, Any]]] | None = None
    sharding_rules: Sequence[Any] = ()
    blocks: tuple[type, ...] = ()
    gguf: GgufForm | None = None
    outline: Callable[[Any], Mapping[str, tuple[int, ...]]] = lambda config: {}

    def shapes(self, config: Any) -> dict[str, Any]:
        """Give the shapes and dtypes of a model's variables, a pytree of `jax.ShapeDtypeStruct`."""
        return jax.eval_shape(self.build(config).init, jax.random.key(0), jax.ShapeDtypeStruct((1, 1), "int32"))


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class GgufForm:
    """How GGUF files hold a family.

    Attributes:
      architectures: what the files call the family.
      read_config: gives a configuration from (the file's path; its metadata; its tensors by name; and, by keyword, as
        `Family.read_config`).
      names: the file's name of every weight, and whether it is stored transposed.
      weights: gives, from (the configuration, the metadata, the tensors), the tensors of weights, with rows and numbers
        as Hugging Face has them.
    """

    architectures: Sequence[str]
    read_config: Callable[..., Any]
    names: Names
    weights: Callable[[Any, Mapping[str, Any], Mapping[str, Any]], Mapping[str, Any]]
