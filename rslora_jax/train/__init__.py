"""Training: one compiled step for any loss, data, and the loop around it.

What needs the extra `train` (batches, the progress bar, the picture of the loss) says so when it is used.
"""

from rslora_jax.train.batch_stream import Feed
from rslora_jax.train.batches import Batch, Rows, heldout_batches, prepare, train_batches
from rslora_jax.train.carry import with_state
from rslora_jax.train.docstrings import docstring_pairs
from rslora_jax.train.examples import Example, Message
from rslora_jax.train.flops import peak_flops, step_flops
from rslora_jax.train.glance import glance
from rslora_jax.train.loop import NonFiniteLoss, Result, fit
from rslora_jax.train.loss import Loss, cross_entropy, logits_loss, token_loss
from rslora_jax.train.masters import float32_masters
from rslora_jax.train.moments import low_moments
from rslora_jax.train.optimizers import make_optimizer, make_schedule, muon_axes
from rslora_jax.train.planning import Plan, parts_that_fit, plan
from rslora_jax.train.rates import frozen, lora_plus, scale_by_rank
from rslora_jax.train.reading import read_examples
from rslora_jax.train.records import read_jsonl
from rslora_jax.train.state import TrainState, make_evaluate, make_pmap_step, make_step, replicate
from rslora_jax.train.sweep import Outcome, Trial, sweep
from rslora_jax.train.writers import Record, RunInfo, Writer

__all__ = [
    "Batch",
    "Example",
    "Feed",
    "Loss",
    "Message",
    "NonFiniteLoss",
    "Outcome",
    "Plan",
    "Record",
    "Result",
    "Rows",
    "RunInfo",
    "TrainState",
    "Trial",
    "Writer",
    "cross_entropy",
    "docstring_pairs",
    "fit",
    "float32_masters",
    "frozen",
    "glance",
    "heldout_batches",
    "logits_loss",
    "lora_plus",
    "low_moments",
    "make_evaluate",
    "make_optimizer",
    "make_pmap_step",
    "make_schedule",
    "make_step",
    "muon_axes",
    "parts_that_fit",
    "peak_flops",
    "plan",
    "prepare",
    "read_examples",
    "read_jsonl",
    "replicate",
    "scale_by_rank",
    "step_flops",
    "sweep",
    "token_loss",
    "train_batches",
    "with_state",
]
