"""What of a layer is kept between its forward and its backward pass, by a policy's name; the rest is made again."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from rslora_jax.transform.product import MET

# The names by which the policies below know what a layer takes in, and what a product with a weight gives, with its
# adapter's part. What data give in an adapter's first factor is `MET`.
_INPUT, _PRODUCT = "decoder_input", "decoder_product"

# "products" and "offload" are our own. Of the policies of jax.checkpoint_policies only those that take no argument: the
# others are factories, which a bare name in a configuration file cannot call.
REMAT_POLICIES = (
    "products",
    "offload",
    "everything_saveable",
    "nothing_saveable",
    "dots_saveable",
    "dots_with_no_batch_dims_saveable",
    "checkpoint_dots",
    "checkpoint_dots_with_no_batch_dims",
)

_OWN: dict[str, Callable[..., Any]] = {
    # What costs most to compute again, and is a third of all.
    "products": jax.checkpoint_policies.save_only_these_names(_PRODUCT, MET),
    # What a layer takes in is least to carry for what it saves: 2 bytes times the width for each token and layer in
    # bfloat16, whose transfer a layer's products hide. Of the products it would be ten times as much, more than
    # computing them again takes (docs/training).
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


def check_remat(name: str | None) -> None:
    """Refuse a policy's name that is unknown.

    Raises:
      ValueError: it is; says what comes close.

    >>> check_remat("ofload")
    Traceback (most recent call last):
    ValueError: remat='ofload' is unknown (did you mean 'offload'?): use None, 'full' or one of products, offload, ...
    """
    if name in (None, "none", "full", *REMAT_POLICIES):
        return
    near = difflib.get_close_matches(str(name), ["none", "full", *REMAT_POLICIES], n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise ValueError(f"remat={name!r} is unknown{hint}: use None, 'full' or one of {', '.join(REMAT_POLICIES)}")


def policy_of(name: str | None) -> Callable[..., Any] | None:
    """Return the policy of a name for `jax.checkpoint`; None for "full", which keeps what a layer takes in alone."""
    return None if name == "full" else _OWN.get(str(name)) or getattr(jax.checkpoint_policies, str(name))


def named_product(x: jax.Array) -> jax.Array:
    """Mark what a product with a weight gives, its adapter's part included."""
    return checkpoint_name(x, _PRODUCT)


def named_input(x: jax.Array) -> jax.Array:
    """Mark what a layer takes in."""
    return checkpoint_name(x, _INPUT)
