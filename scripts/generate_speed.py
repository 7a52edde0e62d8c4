"""Measure generation beside transformers on torch: SmolLM2-135M, float32, the same file, prompts and greedy tokens.

    python scripts/generate_speed.py [--batches 1,8] [--prompt 128] [--new 64] [--repeats 5] \
        [--no-torch] [--scanned] [--packed]

Each way to generate takes its turn in every repeat, so that a slow minute meets all alike; medians with the least and
the most. "Read" is the time to the first new token: the prompt, and one step. "Write" is the time for the others. torch
has as many threads as there are cores; both are compiled or warm. That all give the same tokens is checked, for the
adapted model that merged and unmerged do. Bytes a token are the weights', which each step must read: beside the time,
they say how near a step is to the memory's speed. Needs the extra `reference` for torch's part.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import rslora_jax as rslora
from rslora_jax.commands.runs import LoadedRuns, Run, program, unrolled
from rslora_jax.interop.gguf import find_smollm2
from rslora_jax.interop.load import load_model
from rslora_jax.models import generation
from rslora_jax.models.decoder import Decoder
from rslora_jax.train import docstring_pairs

Way = Callable[[], tuple[float, float, list[list[int]]]]


def ours(apply: Any, variables: Any, prompts: list[list[int]], config: Any, new: int) -> Way:
    """Give a function that generates and returns (seconds to the first token, seconds after, tokens)."""
    going = generation.start(apply, variables, prompts, config, max_new=new)

    def run() -> tuple[float, float, list[list[int]]]:
        begun = time.perf_counter()
        state = jax.block_until_ready(going.advance(going.read(), 1))
        first = time.perf_counter()
        tokens = generation.tokens_of(going.advance(state, new))
        return first - begun, time.perf_counter() - first, tokens

    begun = time.perf_counter()
    going.compile()
    run.compiled = time.perf_counter() - begun  # type: ignore[attr-defined]
    return run


def theirs(prompts: list[list[int]], new: int) -> Way:
    """The same by transformers; the first token's time is that of generating one."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    import transformers
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    path = find_smollm2()
    config = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    model = transformers.LlamaForCausalLM(config)
    tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    model.load_state_dict(tensors, strict=False)
    model.tie_weights()
    model.eval()
    assert model.dtype == torch.float32
    ids = torch.tensor(prompts)

    def generated(count: int) -> tuple[float, Any]:
        begun = time.perf_counter()
        with torch.no_grad():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=count,
                min_new_tokens=count,
                pad_token_id=0,
            )
        return time.perf_counter() - begun, out

    def run() -> tuple[float, float, list[list[int]]]:
        first, _ = generated(1)
        whole, out = generated(new)
        return first, whole - first, out[:, ids.shape[1] :].tolist()

    return run


def looped_run(model: Any, rank: int) -> LoadedRuns:
    """Give a run of a model with adapters of which none is zero, its layers one by one, as `rslora generate` has it."""
    shape = jax.ShapeDtypeStruct((1, 8), "int32")
    lora = rslora.wrap(model.apply, model.variables, shape, config=rslora.LoraConfig(rank=rank, alpha=16))
    adapters = lora.init(jax.random.key(0))
    # B is zero at first, and adapters that do nothing would hide a mistake.
    keys = dict(zip(adapters, jax.random.split(jax.random.key(1), len(adapters)), strict=True))
    adapters = {
        path: {"a": of["a"], "b": 1e-3 * jax.random.normal(keys[path], of["b"].shape)} for path, of in adapters.items()
    }
    run = Run("run", 0, lora.config, lora, model.variables, adapters)
    return unrolled(LoadedRuns(model.family, model.config, model.variables, model.tokenizer, (run,), {}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", default="1,8")
    for name, default in (("prompt", 128), ("new", 64), ("repeats", 5), ("rank", 32)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"({default})")
    parser.add_argument("--no-torch", action="store_true")
    copies = "the base with scanned layers too: a scan copies each layer's weights at each step"
    parser.add_argument("--scanned", action="store_true", help=copies)
    packed = "the base in the file's own blocks too, with adapters beside it: what a step reads is a fifth"
    parser.add_argument("--packed", action="store_true", help=packed)
    a = parser.parse_args()

    model = load_model(dequantize=True)
    config, variables, tokenizer = model
    looped = looped_run(model, a.rank)
    packed = looped_run(load_model(), a.rank) if a.packed else None
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(variables))
    print(f"{size / 1e6:.0f} MB of weights, {a.prompt} tokens of prompt, {a.new} new, load {os.getloadavg()[0]:.2f}")

    text = tokenizer.encode("\n\n".join(str(pair.prompt) for pair in docstring_pairs("heldout")[:200]))
    for batch in map(int, a.batches.split(",")):
        prompts = [text[n * a.prompt : (n + 1) * a.prompt] for n in range(batch)]
        ways: dict[str, Way] = {}
        if not a.no_torch:
            ways["transformers"] = theirs(prompts, a.new)
        (run,) = looped.runs
        for name, its, merged in (("base", None, False), ("adapters", run, False), ("merged", run, True)):
            apply, held = (
                program(looped, its, merged=merged) if its else (Decoder(looped.config).apply, looped.variables)
            )
            ways[name] = ours(apply, held, prompts, looped.config, a.new)
        if packed:
            ways["adapters, packed"] = ours(
                *program(packed, packed.runs[0], merged=False), prompts, packed.config, a.new
            )
        if a.scanned:
            ways["base, scanned"] = ours(Decoder(config).apply, variables, prompts, config, a.new)
        tokens = {name: way()[2] for name, way in ways.items()}
        for one, other in (
            ("transformers", "base"),
            ("adapters", "merged"),
            ("adapters, packed", "adapters"),
            ("base, scanned", "base"),
        ):
            if one in tokens and tokens[one] != tokens[other]:
                pairs = zip(tokens[one], tokens[other], strict=True)
                parted = [int(np.argmin(np.equal(x, y))) for x, y in pairs if x != y]
                print(f"{one} and {other} part in {len(parted)} of {batch} rows, first at token {min(parted)}")
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for _ in range(a.repeats):
            for name, way in ways.items():
                times[name].append(way()[:2])
        print(f"\nbatch {batch:<14}{'read: s (least, most)':>27}{'write: ms a step':>27}{'tokens/s':>10}{'compile':>9}")
        for name, found in times.items():
            read, write = ([pair[n] for pair in found] for n in (0, 1))
            steps = [1e3 * seconds / (a.new - 1) for seconds in write]

            def shown(values):
                return f"{statistics.median(values):.3g} ({min(values):.3g}, {max(values):.3g})"

            rate = batch * (a.new - 1) / statistics.median(write)
            compiled = getattr(ways[name], "compiled", None)
            note = "" if compiled is None else f"{compiled:.1f} s"
            print(f"{name:<20}{shown(read):>27}{shown(steps):>27}{rate:>10.1f}{note:>9}")
    print(f"\nload at the end {os.getloadavg()[0]:.2f}; jax {jax.__version__}, {jnp.zeros(1).devices()}")


if __name__ == "__main__":
    main()
