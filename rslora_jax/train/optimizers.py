"""Optimisers by name, and the learning rate over the steps."""

from __future__ import annotations

import difflib
import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers

from rslora_jax.methods.method import RANK
from rslora_jax.sites import Site
from rslora_jax.train.update import rehearse
from rslora_jax.wrap import Lora

# The rate after warm-up as a part of its peak, by the part of the steps that is left (from 1, to just above 0).
_SHAPES: dict[str, Callable[[Any], Any]] = {
    "constant": jnp.ones_like,
    "linear": lambda left: left,
    # (1 + cos(pi (1 - left))) / 2, which in float32 is 0 at the end of a long run.
    "cosine": lambda left: jnp.sin(jnp.pi / 2 * left) ** 2,
}

# What optax's defaults are wrong in for adapters. B starts at zero, so a step must not be in proportion to the
# parameter: adafactor's would then be a thousandth of the rate. A run of adapters is short for b2 = 0.999.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "adamw": {"b2": 0.99},
    "adafactor": {"multiply_by_parameter_scale": False},
}


def make_schedule(name: str = "cosine", *, peak: float, steps: int, warmup: float = 0.1) -> optax.Schedule:
    """Make the learning rate of each step: a linear rise to the peak, then what `name` says.

    With W = round(warmup * steps), step n < W has the rate peak (n + 1) / (W + 1). From step W on, which has the
    peak, "constant" stays there, and "linear" and "cosine" (arXiv 1608.03983, eq. 5, without restarts) fall to a
    0 that the first step after the last would have. So every step learns something.

    Args:
      name: "constant", "linear" or "cosine".
      peak: the highest rate.
      steps: of the whole run, warm-up included.
      warmup: the part of the steps in which the rate rises, from 0 to below 1.

    Returns:
      A function from the number of a step, from 0, to its rate (float32).

    Raises:
      ValueError: an argument is not as said here.

    >>> schedule = make_schedule("linear", peak=1.0, steps=8, warmup=0.25)
    >>> [round(float(schedule(n)), 2) for n in range(9)]
    [0.33, 0.67, 1.0, 0.83, 0.67, 0.5, 0.33, 0.17, 0.0]
    """
    if name not in _SHAPES:
        raise ValueError(f"the schedule {name!r} is none of {', '.join(_SHAPES)}")
    if not 0 < peak < math.inf:
        raise ValueError(f"the peak learning rate {peak} is not a number above 0")
    if steps < 1:
        raise ValueError(f"a schedule of {steps} steps: it needs at least 1")
    if not 0 <= warmup < 1:
        raise ValueError(f"warmup={warmup} is not a part of the steps: give a number from 0 to below 1, such as 0.1")
    rise = min(round(warmup * steps), steps - 1)

    def schedule(step: Any) -> Any:
        left = jnp.clip((steps - jnp.asarray(step)) / (steps - rise), 0, 1).astype(jnp.float32)
        return peak * jnp.where(step < rise, (step + 1) / (rise + 1), _SHAPES[name](left))

    return schedule


def make_optimizer(
    name: str = "adamw",
    *,
    schedule: optax.ScalarOrSchedule,
    clip: float | None = 1.0,
    options: Mapping[str, Any] | None = None,
    lora: Lora | None = None,
) -> optax.GradientTransformation:
    """Make an optax optimiser by its name, with the gradient's norm clipped before it.

    Options that are not given are optax's, except where these are wrong for adapters: no weight decay, adamw's b2
    is 0.99, and adafactor's rate is not in proportion to the parameter. Adafactor keeps a full second moment for a
    factor with a side below 128 (`min_dim_size_to_factor`), which is every adapter of a rank below that.

    Args:
      name: of a function of optax or optax.contrib that takes a `learning_rate`: adamw, sgd, adafactor, muon, ...
      schedule: the learning rate, or a function from the step to it, as of `make_schedule`.
      clip: the largest norm of all gradients together; None or 0 leaves them as they are.
      options: what else to give that function, by name.
      lora: whose adapters are to be trained; muon is told their matrices, where they are stacks (`muon_axes`).

    Returns:
      The optimiser; its state is a pytree of arrays.

    Raises:
      ValueError: there is no such optimiser or option, an option's value is none that it can take, or it takes no
        schedule.

    >>> optimizer = make_optimizer("sgd", schedule=0.5, clip=None, options={"momentum": 0.9})
    >>> updates, _ = optimizer.update(jnp.ones(2), optimizer.init(jnp.zeros(2)))
    >>> updates.tolist()
    [-0.5, -0.5]
    """
    options = dict(options or {})
    if clip is not None and not clip >= 0:
        raise ValueError(f"clip={clip} is not a norm: give a number above 0, or 0 to leave the gradients as they are")
    known = optimizers()
    if name not in known:
        raise ValueError(
            f"optax has no optimiser {name!r}{_near(name, known)}: it has {', '.join(known)}; any other can be made in "
            "Python and given to `fit`"
        )
    takes = [option for option in inspect.signature(known[name]).parameters if option != "learning_rate"]
    for option in options:
        if option == "learning_rate":
            raise ValueError("learning_rate is no option of an optimiser here: the schedule gives it")
        if option not in takes:
            listed = f"it has {', '.join(takes)}" if takes else "it has none"
            raise ValueError(f"{name} has no option {option!r}{_near(option, takes)}: {listed}")
    defaults: dict[str, Any] = {"weight_decay": 0.0} if "weight_decay" in takes else {}
    if name == "muon" and lora:
        defaults["muon_weight_dimension_numbers"] = muon_axes(lora)
    try:
        optimizer = known[name](learning_rate=schedule, **{**defaults, **_DEFAULTS.get(name, {}), **options})
        some = lora.adapter_shapes if lora else {"w": {"factor": jnp.zeros((2, 3))}}
        rehearse(optimizer, some)
    except (TypeError, ValueError) as error:
        given = ", ".join(f"{k}={v}" for k, v in options.items()) or "no options"
        raise ValueError(f"{name} with {given} cannot be used with a schedule: {error}") from error
    # With an identity in the clip's place, a checkpoint fits whether there is a clip or not.
    return optax.chain(optax.clip_by_global_norm(clip) if clip else optax.identity(), optimizer)


def muon_axes(lora: Lora) -> dict[str, dict[str, MuonDimensionNumbers | None]]:
    """Say which axes of each factor are the rows and which the columns of its matrix, for `optax.contrib.muon`.

    By itself muon takes arrays of two axes, and leaves others to its Adam: all factors of a scanned model, as they
    are stacks. With these, each matrix of a stack is orthogonalised by itself:
    `muon(rate, muon_weight_dimension_numbers=muon_axes(lora))`.

    >>> import jax, rslora_jax as rslora
    >>> layers = lambda w, x: jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]
    >>> lora = rslora.wrap(layers, jnp.ones((3, 8, 8)), jnp.ones((2, 8)), config=rslora.LoraConfig(rank=2, alpha=5))
    >>> muon_axes(lora)[""]["b"]
    MuonDimensionNumbers(reduction_axis=(1,), output_axis=(2,))
    """

    def matrix(site: Site, axes: Sequence[int | str]) -> MuonDimensionNumbers | None:
        own = range(len(site.stack_axes), len(axes))
        rank = [n for n in own if axes[n] == RANK]
        if not rank or len(own) < 2 or not site.scaled:
            return None  # no matrix, or rows of one: Adam's
        others = tuple(n for n in own if n not in rank)
        return MuonDimensionNumbers(*((tuple(rank), others) if rank[0] == own[0] else (others, tuple(rank))))

    return {
        path: {name: matrix(site, axes) for name, axes in site.factors.items()} for path, site in lora.sites.items()
    }


def parse_options(texts: Sequence[str]) -> dict[str, Any]:
    """Read options as a command line gives them, `name=value`: true, false, none, a number or a word.

    Raises:
      ValueError: one is not of that form.

    >>> parse_options(["b2=0.99", "nesterov=true", "memory_size=5", "mu_dtype=bfloat16"])
    {'b2': 0.99, 'nesterov': True, 'memory_size': 5, 'mu_dtype': 'bfloat16'}
    """
    options = {}
    for text in texts:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not (name and equals and value):
            raise ValueError(f"the option {text!r} is not of the form name=value, such as b2=0.99")
        options[name] = _parse_value(value)
    return options


def _parse_value(text: str) -> Any:
    """Read true, false, none or a number; anything else is a word."""
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def optimizers() -> dict[str, Callable[..., optax.GradientTransformation]]:
    """Return optax's optimisers by name, those of `optax.contrib` too: its functions of a learning rate alone."""
    found = {}
    for module in (optax.contrib, optax):
        for name, function in inspect.getmembers(
            module, lambda f: inspect.isfunction(f) or isinstance(f, functools.partial)
        ):
            takes = inspect.signature(function).parameters
            needs = {option for option, parameter in takes.items() if parameter.default is parameter.empty}
            if "learning_rate" in takes and needs <= {"learning_rate"} and not name.startswith(("_", "scale_by_")):
                found[name] = function
    return dict(sorted(found.items()))


def _near(name: str, names: Any) -> str:
    """Say which of `names` is meant, where one comes close."""
    close = difflib.get_close_matches(name.lower(), names, n=1)
    return f" (did you mean {close[0]}?)" if close else ""
