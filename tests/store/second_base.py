"""Do what a run does over a base, twice to warm up and once for the count; print the most that each took.

python -m tests.store.second_base FOLDER      `FOLDER/small` and `FOLDER/large` are models of Hugging Face's kind

Prints by task how many bytes of the process were new at its peak, and what the base holds. At first libraries start and
programs are compiled, the second time that of a resumed step; the third time, all that is new is arrays.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np
import optax

import rslora_jax as rslora
from rslora_jax import train
from rslora_jax.interop import load_model
from rslora_jax.models import generate
from rslora_jax.store import checkpoint
from rslora_jax.train.batches import Batch

LENGTH = 8
LOSS = train.token_loss(LENGTH)


def memory(field):
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[field].split()[0]) * 1024


def peak_of(task):
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
    task()
    return memory("VmHWM") - before


def batch(seed):
    tokens = np.random.default_rng(seed).integers(0, 9, (1, LENGTH + 1)).astype("int32")
    here = np.broadcast_to(np.arange(LENGTH, dtype="int32"), (1, LENGTH))
    return Batch(tokens[:, :-1], tokens[:, 1:], np.ones((1, LENGTH), "float32"), here, np.ones_like(here))


class Tasks:
    """What is done with a model, by name."""

    def __init__(self, model, folder):
        self.model, self.folder, self.times = model, folder, 0
        tokens = jax.ShapeDtypeStruct((1, LENGTH), "int32")
        self.lora = rslora.wrap(model.apply, model.variables, tokens, config=rslora.LoraConfig(rank=2, alpha=3))
        self.adapters = self.lora.init(jax.random.key(0))
        self.optimizer, self.step = optax.adam(1e-3), 0

    def fit(self, **how):
        self.step += 2
        given = dict(batches=[batch(n) for n in range(12)], heldout=[batch(99)], loss=LOSS, optimizer=self.optimizer)
        place = Path(self.folder) / "run"
        train.fit(
            *(self.lora, self.model.variables, self.adapters),
            **given | how,
            **dict(
                steps=self.step, folder=place, show=False, save_every=1, resume=self.step > 2, override=("optimizer",)
            ),
        )

    def train_save_and_resume(self):
        self.fit()

    def read(self):
        checkpoint.load_adapters(Path(self.folder) / "run", params=self.model.variables)

    def evaluate(self):
        score = train.make_evaluate(self.lora, LOSS)
        jax.block_until_ready(score(self.model.variables, self.adapters, batch(0)))

    def generate(self):
        generate(self.run, (self.model.variables, self.adapters), [[1, 2, 3]], self.model.config, max_new=4)

    def run(self, both, *args, **kwargs):
        return self.lora.apply(*both, *args, **kwargs)


def main(folder):
    load_model(folder + "/small")
    found = {}

    def load():
        found["model"] = load_model(folder + "/large")

    took = {"load": peak_of(load)}
    model = found["model"]
    tasks = Tasks(model, folder)
    for name in ("train_save_and_resume", "read", "evaluate", "generate"):
        for _ in range(3):
            took[name] = peak_of(getattr(tasks, name))
    print(json.dumps({"held": sum(leaf.nbytes for leaf in jax.tree.leaves(model.variables)), "took": took}))


if __name__ == "__main__":
    main(sys.argv[1])
