"""What trains needs the core's packages and no others; what needs more says which extra has it."""

import subprocess
import sys
import textwrap

import pytest

pytestmark = pytest.mark.by_day_on("oldest")

ALONE = """
    import builtins, sys

    EXTRAS = {"grain", "rich", "tokenizers", "matplotlib", "gguf", "jinja2", "safetensors", "huggingface_hub",
              "tensorboardX", "pyarrow", "torch", "transformers", "peft", "tqdm", "chex", "qwix"}
    real = builtins.__import__

    def guarded(name, globals=None, locals=None, fromlist=(), level=0):
        # Flax and orbax may have some of these of their own.
        if (globals or {}).get("__name__", "").startswith(("rslora_jax", "__main__")):
            if level == 0 and name.split(".")[0] in EXTRAS:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, globals, locals, fromlist, level)

    builtins.__import__ = guarded
    import jax, jax.numpy as jnp, numpy as np, optax, tempfile
    import rslora_jax as rslora
    from rslora_jax import train
    from rslora_jax.train import TrainState, cross_entropy, logits_loss, make_step, token_loss

    assert "grain" not in sys.modules and "matplotlib" not in sys.modules and "tokenizers" not in sys.modules
    lora = rslora.wrap(lambda p, x: x @ p["w"], {"w": jnp.ones((4, 4))}, jnp.ones((2, 4)),
                       config=rslora.LoraConfig(rank=2, alpha=3))
    params, batch = {"w": jnp.ones((4, 4))}, np.ones((2, 4), np.float32)
    loss = lambda run, batch: (jnp.sum((run(batch) - 1) ** 2), jnp.float32(batch.size))
    step = make_step(lora, loss, optax.adam(1e-2))
    state, metrics = step(TrainState.create(lora.init(jax.random.key(0)), optax.adam(1e-2)), params, batch)
    assert float(metrics["loss"]) == 9

    class Batches:
        def __getitem__(self, n):
            return batch

    def fit(**options):
        with tempfile.TemporaryDirectory() as folder:
            return train.fit(lora, params, lora.init(jax.random.key(0)), batches=Batches(), loss=loss,
                             optimizer=optax.adam(1e-2), steps=2, folder=folder, **options)

    assert fit(show=False).step == 2

    def refused(call, text):
        try:
            call()
        except ImportError as error:
            assert text in str(error) and "pip install 'rslora_jax[" in str(error), error
        else:
            raise AssertionError(text)

    refused(fit, "progress needs rich")
    refused(lambda: fit(show=False, tensorboard=True), "tensorboardX")
    from rslora_jax.train.bytelevel import ByteTokenizer
    rows = train.prepare(ByteTokenizer(), [train.Example("1+1=", "2")], max_len=8)
    refused(lambda: train.train_batches(rows, batch_size=1), "batches need grain")
    refused(lambda: train.heldout_batches(rows, batch_size=1), "batches need grain")
    for name in train.__all__:
        getattr(train, name)
    print("alone")
"""


def test_the_core_trains_alone():
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(ALONE)], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("alone\n"), done.stderr[-3000:]
