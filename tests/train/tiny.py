"""A tiny model and all that `fit` takes, for the tests and for the processes they start."""

import jax
import jax.numpy as jnp
import optax

import rslora_jax as rslora
from rslora_jax import train
from rslora_jax.models.decoder import Decoder, DecoderConfig
from rslora_jax.train.bytelevel import ByteTokenizer

CONFIG = DecoderConfig(
    vocab_size=258, width=32, mlp_width=48, num_layers=2, num_heads=4, num_kv_heads=2, scan_layers=True
)
SUMS = [train.Example(f"{a}+{b}=", f"{a + b}") for a in range(12) for b in range(12)]


class Run:
    """What a run is made of; `fit` trains it in a folder."""

    def __init__(self, rank=3, seed=0, learning_rate=1e-2, **config):
        model = Decoder(CONFIG)
        self.params = model.init(jax.random.key(seed), jnp.zeros((1, 1), jnp.int32))
        config = rslora.LoraConfig(rank=rank, alpha=7, **config)
        self.lora = rslora.wrap(model.apply, self.params, jnp.zeros((1, 4), jnp.int32), config=config)
        self.adapters = self.lora.init(jax.random.key(1))
        self.rows = train.prepare(ByteTokenizer(), SUMS[::2], max_len=24)
        self.held = train.prepare(ByteTokenizer(), SUMS[1::16], max_len=24)
        self.batches = train.train_batches(self.rows, batch_size=4)
        self.loss = train.token_loss(max(self.rows.places, self.held.places))
        self.optimizer = optax.adam(learning_rate)

    def fit(self, folder, steps, **options):
        options = {"batches": self.batches, "loss": self.loss, "optimizer": self.optimizer, "show": False} | options
        options.setdefault("heldout", train.heldout_batches(self.held, batch_size=4))
        return train.fit(self.lora, self.params, self.adapters, steps=steps, folder=folder, **options)
