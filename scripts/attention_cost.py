"""Measure attention with its gradients: memory and time of each form by length, beside torch's fused one.

    python scripts/attention_cost.py                               # SmolLM2's heads, 128 to 4,096 tokens: two minutes
    python scripts/attention_cost.py --heads 32 --kv-heads 8 --width 128 --dtype bfloat16 --lengths 2048,8192
    python scripts/attention_cost.py --forms chunked,torch --lengths 8192,16384 --repeats 1    # where "xla" has no room

Causal attention of one row, value and gradients of queries, keys and values. "xla" holds the scores of all queries and
keys, "chunked" of some at a time, "cudnn" and "pallas" are kernels, on the devices that run them, as
`DecoderConfig(attention=...)` has them; "tokamax" is that library's `xla_chunked` and "torch"
`scaled_dot_product_attention` on CPUs, where they are installed. Each takes its turn in every repeat; medians. Memory
is the compiled program's temporaries; torch does not say. That all give the first form's gradients is shown.
"""

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rslora_jax.models.attention import attend
from rslora_jax.models.kernels import KERNELS, not_here
from rslora_jax.models.places import Places

Run = Callable[[], Any]


def ours(how: str, q: Any, k: Any, v: Any) -> Callable[..., Any]:
    """Give attention of one form, of arrays (1, T, heads, width)."""
    at = Places(jnp.arange(q.shape[1])[None], is_plain=True)
    return lambda q, k, v: attend(q, at, [(k, v, at)], how=how)


def of_tokamax(q: Any, k: Any, v: Any) -> Any:
    import tokamax

    return tokamax.dot_product_attention(q, k, v, is_causal=True, implementation="xla_chunked")


def compiled(attention: Callable[..., Any], arrays: list[Any], seed: Any) -> tuple[Run, int]:
    """Return (a function that gives the gradients, the bytes of the program's temporaries)."""

    def gradients(q: Any, k: Any, v: Any) -> Any:
        return jax.grad(lambda *of: jnp.vdot(attention(*of).astype(jnp.float32), seed), (0, 1, 2))(q, k, v)

    program = jax.jit(gradients).lower(*arrays).compile()
    return lambda: jax.block_until_ready(program(*arrays)), program.memory_analysis().temp_size_in_bytes


def of_torch(arrays: list[Any], seed: Any) -> Run:
    """Return a function that gives torch's gradients, in the layout of ours."""
    import torch

    def turned(x: Any) -> Any:
        return torch.tensor(np.asarray(x, np.float32)).to(getattr(torch, str(arrays[0].dtype))).transpose(1, 2)

    inputs, ahead = [turned(x).requires_grad_() for x in arrays], turned(seed)

    def run() -> Any:
        out = torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)
        return [x.transpose(1, 2).float().numpy() for x in torch.autograd.grad(out, inputs, ahead)]

    return run


def here() -> list[str]:
    """Return the names of the forms that the device has."""
    kernels = [how for how in KERNELS if not not_here(how)]
    return ["xla", "chunked", *kernels, *(name for name in ("tokamax", "torch") if importlib.util.find_spec(name))]


def forms(names: list[str], arrays: list[Any], seed: Any) -> dict[str, tuple[Run, int | None]]:
    """Return by name what is measured and the bytes of its temporaries."""
    found: dict[str, tuple[Run, int | None]] = {}
    for name in names:
        if name == "torch":
            found[name] = of_torch(arrays, seed), None
        else:
            found[name] = compiled(of_tokamax if name == "tokamax" else ours(name, *arrays), arrays, seed)
    return found


def differences(found: dict[str, Any]) -> str:
    """Say how far the gradients of the others are from those of the first, relative to their largest number."""
    first = next(iter(found))
    exact = [np.asarray(x, np.float32) for x in found[first]]

    def far(gradients: Any) -> float:
        pairs = zip(gradients, exact, strict=True)
        return max(float(np.abs(np.asarray(x, np.float32) - y).max() / np.abs(y).max()) for x, y in pairs)

    return ", ".join(f"{name} {far(gradients):.1e}" for name, gradients in found.items() if name != first)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="128,256,512,1024,2048,4096", help="tokens (%(default)s)")
    parser.add_argument("--forms", default=",".join(here()), help="which (%(default)s)")
    for name, default in (("heads", 9), ("kv-heads", 3), ("width", 64), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=default, help="(%(default)s)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    a = parser.parse_args()
    print(f"{a.heads} heads of {a.width}, {a.kv_heads} of keys, {a.dtype}, {jax.devices()[0].device_kind}")
    print(f"{'tokens':>6}  {'form':<8}{'temporaries':>13}{'ms (least, most)':>28}")
    for length in map(int, a.lengths.split(",")):
        keys = jax.random.split(jax.random.key(length), 4)
        sizes = (a.heads, a.kv_heads, a.kv_heads, a.heads)
        *arrays, seed = (
            jax.random.normal(key, (1, length, n, a.width), a.dtype) for key, n in zip(keys, sizes, strict=True)
        )
        found = forms(a.forms.split(","), arrays, seed)
        gradients = {name: run() for name, (run, _) in found.items()}
        times: dict[str, list[float]] = {name: [] for name in found}
        for _ in range(a.repeats):
            for name, (run, _) in found.items():
                begun = time.perf_counter()
                run()
                times[name].append(1e3 * (time.perf_counter() - begun))
        for name, (_, size) in found.items():
            memory = "" if size is None else f"{size / 1e6:.1f} MB"
            took = times[name]
            shown = f"{statistics.median(took):.1f} ({min(took):.1f}, {max(took):.1f})"
            print(f"{length:>6}  {name:<8}{memory:>13}{shown:>28}")
        print(f"        gradients from {next(iter(found))}'s: {differences(gradients)}", flush=True)


if __name__ == "__main__":
    main()
