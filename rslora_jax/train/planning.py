"""What a run would be, before it is one: its memory, its FLOPs and its time, by the step that it would run."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import optax

from rslora_jax.pytrees import Params, PyTree
from rslora_jax.sites import Site
from rslora_jax.table import shared_name
from rslora_jax.train.batch_stream import Batches, Feed
from rslora_jax.train.footprint import Memory, fits, room
from rslora_jax.train.glance import Data
from rslora_jax.train.loss import Loss
from rslora_jax.train.pace import Pace
from rslora_jax.train.rehearsal import Rehearsal, Scored, Took, rows_each, rows_of
from rslora_jax.train.room import Largest, divisors, fewest_parts, largest_batch
from rslora_jax.train.speed import count_flops
from rslora_jax.train.state import first_state, make_evaluate
from rslora_jax.wrap import Adapters, Lora

_BATCHES = 1000  # to count the tokens of; of a longer run they are told from these
_CHOICES = 4  # numbers of parts to compile


class Tokens(NamedTuple):
    """Count the tokens of a run's steps: those read, those with loss, and whether all steps were counted."""

    read: int
    learnt: int
    counted: bool


class Taken(NamedTuple):
    """Say what a step takes of each device with its batch in so many parts, of so many rows each.

    `memory` is None where the compiler says that no device has as much.
    """

    parts: int
    rows: int
    memory: Memory | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Hold what a run would be; printed, it fits a terminal.

    Attributes:
      steps: how many steps there are to be at the end.
      done: how many of them are done before, of a run that is resumed.
      rows: the rows of a batch.
      parts: in how many parts a step takes its batch.
      epochs: how often the steps from `done` on take each row, where that is known.
      tokens: of these steps, where the batches tell.
      base: how many numbers the base has.
      trained: how many are trained of each kind of weight, by path; layers share a line.
      memory: what the step takes of each device; None where the compiler says that none has as much.
      limit: the bytes of each device, where it tells.
      taken: what the step takes with its batch in other numbers of parts.
      largest: the largest batch that fits taken whole.
      flops: of the model in a step; 0 where they cannot be counted.
      step: the seconds of a step; None where it does not fit, and so was not run.
      scored: what scoring the held-out data takes; None where there are none.
      evaluations: how often they are scored.
      devices: how many devices there are.
      device: of which kind.
      data: what the data look like, where that was given.
    """

    steps: int
    done: int
    rows: int
    parts: int
    epochs: float | None
    tokens: Tokens | None
    base: int
    trained: Mapping[str, int]
    memory: Memory | None
    limit: int | None
    taken: tuple[Taken, ...]
    largest: Largest | None
    flops: int
    step: Took | None
    scored: Scored | None
    evaluations: int
    devices: int
    device: str
    data: Data | None = None

    @property
    def fits(self) -> bool | None:
        """Whether the step fits a device; None where that does not tell its memory."""
        return False if self.memory is None else fits(self.memory.total, self.limit)

    @property
    def seconds(self) -> float | None:
        """The seconds of the run's steps and evaluations, compiling among them; None where no step was timed."""
        if self.step is None:
            return None
        taken = self.step.compiling + self.step.seconds * (self.steps - self.done)
        if self.scored:
            each = self.scored.took.seconds * self.scored.batches
            taken += self.scored.took.compiling + each * self.evaluations
        return taken

    def __str__(self) -> str:
        from rslora_jax.train.plan_text import plan_text

        return plan_text(self)


def plan(
    lora: Lora,
    params: Params,
    adapters: Adapters,
    *,
    batches: Batches,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    steps: int,
    heldout: Iterable[PyTree] | None = None,
    heldout_loss: Loss | None = None,
    model_state: PyTree = None,
    batch_sharding: jax.sharding.Sharding | None = None,
    accumulate: int | Literal["auto"] = 1,
    key: jax.Array | None = None,
    dropout_key: jax.Array | None = None,
    on_nonfinite: Literal["stop", "skip"] = "stop",
    eval_every: int | None = None,
    steps_an_epoch: float | None = None,
    done: int = 0,
    data: Data | None = None,
    seconds: float = 60.0,
    say: Callable[[str], None] = lambda text: None,
) -> Plan:
    """Say what `fit` would do with the same arguments; nothing is written, and adapters and base stay as they are.

    The step is the one that `fit` runs: it is compiled, and run a few times on the first batch.

    Args:
      lora, params, adapters, batches, loss, optimizer, steps, heldout, heldout_loss, model_state, batch_sharding, key,
        dropout_key, on_nonfinite, eval_every, steps_an_epoch: as of `fit`.
      accumulate: in how many parts to take each batch; "auto" for the fewest with which the step fits (`fewest_parts`).
      done: how many steps a run that is to be resumed has done.
      data: what the data look like, of `glance`.
      seconds: after how long to compile no more steps than the run's own, of which the others show what smaller parts
        and larger batches would take.
      say: told what is under way.

    Raises:
      ValueError: the optimiser cannot train adapters, or no step is left to do; or with "auto", no number of parts
        fits, or the device does not tell its memory.

    >>> import jax.numpy as jnp, numpy as np, rslora_jax as rslora
    >>> params, batches = {"w": jnp.ones((8, 16))}, [np.ones((4, 8), np.float32)] * 3
    >>> lora = rslora.wrap(lambda p, x: x @ p["w"], params, batches[0], config=rslora.LoraConfig(rank=2, alpha=3))
    >>> squares = lambda run, x: (jnp.sum(run(x) ** 2), jnp.float32(4))
    >>> found = plan(lora, params, lora.init(jax.random.key(0)), batches=batches, loss=squares,
    ...              optimizer=optax.sgd(1e-3), steps=3)
    >>> found.base, dict(found.trained), found.memory.base, found.flops > 0
    (128, {'w': 48}, 512, True)
    """
    if done >= steps:
        raise ValueError(f"{done} steps are done: ask for more than that to go on")
    deadline, limit = time.monotonic() + seconds, room()
    batch, skip = next(Feed(batches, batch_sharding)), on_nonfinite == "skip"
    state = first_state(lora, adapters, optimizer, key=key, model_state=model_state, dropout_key=dropout_key)
    rehearsal = Rehearsal(lora, loss, optimizer, state, params, batch, skip, say)
    choices = divisors(rows_each(batch))
    parts = fewest_parts(rehearsal.memory, choices, limit) if accumulate == "auto" else int(accumulate)
    memory = rehearsal.memory(parts)
    scored: Scored | None = None
    flops = count_flops(lora, loss, params, state, batch, parts)
    does = memory is not None and fits(memory.total, limit) is not False
    if memory is not None and does and heldout is not None:
        evaluate = make_evaluate(lora, heldout_loss or loss, keyed=key is not None)
        scored = rehearsal.scored(evaluate, heldout, batch_sharding)
        memory = dataclasses.replace(memory, evaluation=scored.memory)
    taken = _taken(rehearsal, parts, choices, deadline)
    largest = _largest(rehearsal, taken, limit, deadline) if limit else None
    looks = sum(map(Pace(steps, eval_every or None).looks, range(done, steps + 1)))
    return Plan(
        steps=steps,
        done=done,
        rows=rows_of(batch),
        parts=parts,
        epochs=(steps - done) / steps_an_epoch if steps_an_epoch else None,
        tokens=_tokens(batches, done, steps),
        base=sum(math.prod(shape) for shape in lora.shapes.values()),
        trained=_trained(lora),
        memory=memory,
        limit=limit,
        taken=taken,
        largest=largest,
        flops=flops,
        step=rehearsal.timed(parts) if does else None,  # at last, as it takes the state's memory
        scored=scored,
        evaluations=looks if scored else 0,
        devices=jax.device_count(),
        device=jax.devices()[0].device_kind,
        data=data,
    )


def parts_that_fit(
    lora: Lora,
    params: Params,
    adapters: Adapters,
    *,
    batches: Batches,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    model_state: PyTree = None,
    batch_sharding: jax.sharding.Sharding | None = None,
    key: jax.Array | None = None,
    dropout_key: jax.Array | None = None,
    on_nonfinite: Literal["stop", "skip"] = "stop",
    say: Callable[[str], None] = lambda text: None,
) -> int:
    """Return the fewest parts in which `fit`, with the same arguments, can take a batch so that a step fits the device.

    Steps are compiled, and none is run. Of the numbers that divide the rows each device has, as many are tried as there
    are doublings among them.

    Raises:
      ValueError: none of them fits, or the device does not tell its memory.
    """
    batch, skip = next(Feed(batches, batch_sharding)), on_nonfinite == "skip"
    state = first_state(lora, adapters, optimizer, key=key, model_state=model_state, dropout_key=dropout_key)
    rehearsal = Rehearsal(lora, loss, optimizer, state, params, batch, skip, say)
    return fewest_parts(rehearsal.memory, divisors(rows_each(batch)), room())


def _taken(rehearsal: Rehearsal, parts: int, choices: Sequence[int], deadline: float) -> tuple[Taken, ...]:
    """Compile the step with its batch in other numbers of parts too, few of them, while there is time."""
    few = choices if len(choices) <= _CHOICES else [*choices[: _CHOICES - 1], choices[-1]]
    rows, found = rows_of(rehearsal.batch), {}
    for n in sorted({*few, parts}, key=lambda n: n != parts):
        if n == parts or time.monotonic() < deadline:
            found[n] = Taken(n, rows // n, rehearsal.memory(n))
    return tuple(found[n] for n in sorted(found))


def _largest(rehearsal: Rehearsal, taken: Sequence[Taken], limit: int, deadline: float) -> Largest | None:
    """Find the largest batch that fits a device taken whole."""
    known = {one.rows: one.memory.total for one in taken if one.memory}
    unit = rows_of(rehearsal.batch) // rows_each(rehearsal.batch)

    def total(rows: int) -> int | None:
        memory = rehearsal.memory(1, rows)
        return None if memory is None else memory.total

    return largest_batch(total, known, unit, limit, deadline) if known else None


def _tokens(batches: Batches, done: int, steps: int) -> Tokens | None:
    """Count the tokens of a run's steps, of a long one from its first; None where the batches do not tell."""
    numbered: Any = batches
    if not hasattr(batches, "__getitem__") or not hasattr(numbered[done], "segment_ids_BxT"):
        return None
    some = min(steps, done + _BATCHES)
    each = (numbered[n] for n in range(done, some))
    counts = [((batch.segment_ids_BxT > 0).sum(), batch.loss_mask_BxT.sum()) for batch in each]
    share = (steps - done) / (some - done) * jax.process_count()  # each has its own rows
    read, learnt = (round(share * float(sum(of))) for of in zip(*counts, strict=True))
    return Tokens(read, learnt, some == steps and jax.process_count() == 1)


def _trained(lora: Lora) -> dict[str, int]:
    """Return how many numbers are trained of each kind of weight, the most first."""
    kinds: dict[str, list[Site]] = {}
    for path, site in lora.sites.items():
        kinds.setdefault(re.sub(r"\d+", "*", path), []).append(site)
    counts = {shared_name([s.path for s in of]): sum(s.num_parameters for s in of) for of in kinds.values()}
    return dict(sorted(counts.items(), key=lambda item: -item[1]))
