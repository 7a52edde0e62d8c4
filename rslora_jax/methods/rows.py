"""Trained rows of a table, such as those of new tokens: the rows' values, in place of the table's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import jax.numpy as jnp
from jax import Array, lax

from rslora_jax.methods.method import RANK, Axis
from rslora_jax.stored.form import dense, is_stored, on_device
from rslora_jax.transform.renames import lay
from rslora_jax.transform.views import View

if TYPE_CHECKING:
    from rslora_jax.config import LoraConfig
    from rslora_jax.sites import Site


@dataclasses.dataclass(frozen=True)
class Rows:
    """`W + S (rows - W[ids])`, where the matrix S of zeros and ones puts each row in its place.

    So it is a low-rank form as LoRA's is, with as many ranks as rows: a look-up, a product with the table turned, and
    all that a program does to it between go by the same rules; the table is not differentiated, nor copied, but where
    so much data meets it that their sum is less than what a product more would give (`transform/cost.py`). Of
    a table that is looked up, the rows are along the axis that is indexed; of a matrix that is only multiplied, such as
    a head of its own, along its out-axis, a row for each logit. PEFT has it as `trainable_token_indices`.

    It is named by `LoraConfig(trained_rows=...)` beside the config's own method, hence it has no `METHOD`.

    Attributes:
      ids: the numbers of the rows.
    """

    ids: tuple[int, ...]

    needs_base = True
    valued = True
    labels: ClassVar[Mapping[str, str]] = {"rows": "trained"}

    def factors(self, site: Site) -> Mapping[str, tuple[Axis, ...]]:
        """Name the rows, which have an axis for their number, and the weight's others."""
        row = row_axis(site)
        return {"rows": (RANK, *(n for n in range(len(site.shape)) if n != row))}

    def init(self, site: Site, key: Array, w: Any, config: LoraConfig) -> dict[str, Array]:
        """Start at the base's rows."""
        return {"rows": self._own(site, w).astype(config.dtype)}

    def view(self, site: Site, w: Any, factors: Mapping[str, Array]) -> View:
        """Return the weight with S and what the rows differ by."""
        row, rows = row_axis(site), factors["rows"]
        change = rows - self._own(site, w).astype(rows.dtype)
        change = jnp.expand_dims(jnp.moveaxis(change, 0, -1), row)
        places = lax.broadcasted_iota(jnp.int32, (site.shape[row], len(self.ids)), 0)
        chosen = (places == jnp.asarray(self.ids, jnp.int32)).astype(rows.dtype)
        chosen = jnp.expand_dims(chosen, [n for n in range(len(site.shape)) if n != row])
        pair = (chosen, change) if row in site.in_axes else (change, chosen)
        return lay(View(w, site.labels, w.dtype, (site.path,), pair), w)

    def _own(self, site: Site, w: Any) -> Array:
        """Return the base's rows, with their number in front; of a stored table no others become dense."""
        row, at = row_axis(site), jnp.asarray(self.ids, jnp.int32)
        if is_stored(w) and row == 0 and not w.stack and (found := on_device(w).rows(at)) is not None:
            return found
        return jnp.moveaxis(jnp.take(dense(w), at, row), row, 0)


def row_axis(site: Site) -> int:
    """Return the axis of a site's weight along which its rows lie."""
    (axis,) = site.in_axes if site.kind == "embedding" else site.out_axes
    return axis
