"""The same step by Hugging Face PEFT on torch, and by its base alone: the same weights, adapters and inputs."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import peft
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from benchmarks.measure import Ready
from benchmarks.problem import Data, Problem


def to_torch(array: jax.Array, dtype: torch.dtype, device: str) -> torch.Tensor:
    # Through float32, because numpy's bfloat16 is none that torch takes.
    return torch.tensor(np.asarray(array, np.float32), dtype=dtype, device=device)


def make_model(problem: Problem, data: Data, dtype: torch.dtype, device: str, use_dora: bool = False) -> Any:
    c = problem.config
    config = transformers.LlamaConfig(
        vocab_size=8,
        hidden_size=c.width,
        intermediate_size=c.mlp_width,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads,
        num_key_value_heads=c.num_kv_heads,
        head_dim=c.head_dim,
        rms_norm_eps=c.norm_eps,
        rope_theta=c.rope_base,
        pad_token_id=None,
    )
    lora = peft.LoraConfig(
        r=problem.rank,
        lora_alpha=problem.alpha,
        use_rslora=True,
        use_dora=use_dora,
        lora_dropout=0.0,
        target_modules=sorted({path.split("/")[-2] for path in problem.kernels}),
    )
    # PEFT would hold the adapters in float32 and multiply in float32 too, which the others do not.
    model = peft.get_peft_model(transformers.LlamaModel(config).to(device, dtype), lora, autocast_adapter_dtype=False)
    modules = dict(model.base_model.model.named_modules())
    with torch.no_grad():
        for path in problem.kernels:
            name, kernel = module_of(path), data.variables["params"]
            for key in path.split("/")[1:]:
                kernel = kernel[key]
            pairs = [(modules[name].base_layer, kernel)]
            pairs.append((modules[name].lora_A["default"], data.adapters[path]["a"]))
            pairs.append((modules[name].lora_B["default"], data.adapters[path]["b"]))
            for layer, value in pairs:
                layer.weight.copy_(to_torch(value, dtype, device).T)
            if use_dora:
                magnitude = modules[name].lora_magnitude_vector["default"].weight
                magnitude.fill_(1).requires_grad_(False)
    return model


def module_of(path: str) -> str:
    """Return the module that holds a kernel of the Flax model.

    >>> module_of("params/layers_3/attn/q_proj/kernel")
    'layers.3.self_attn.q_proj'
    """
    _, layer, part, name, _ = path.split("/")
    return f"{layer.replace('_', '.')}.{'self_attn' if part == 'attn' else part}.{name}"


def count_flops(step: Callable[[], Any]) -> int | None:
    """Count a step's FLOPs of products without attention's; None where torch's counter does not know the program."""
    # Torch counts attention by its kernel: some kernels it does not know, some with grouped heads it refuses.
    attention = {op: lambda *_, **__: 0 for op in flop_registry if "attention" in str(op)}
    try:
        with FlopCounterMode(display=False, custom_mapping=attention) as counter:
            step()
    except Exception:  # whatever it may raise: the count is not what is measured
        return None
    return counter.get_total_flops()


def prepare(method: str, problem: Problem, data: Data) -> Ready:
    """Make the step: the loss, the gradients of the adapters (but method "torch") and that of the input."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, str(problem.config.dtype))
    model = make_model(problem, data, dtype, device, use_dora=method == "peft-dora")
    modules = dict(model.base_model.model.named_modules())
    if method == "torch":  # PEFT has switched off the gradients of the base
        model = model.unload()
    run = torch.compile(model) if method == "peft-compiled" else model
    x = to_torch(data.x, dtype, device).requires_grad_()
    target = to_torch(data.target, torch.float32, device)

    def step() -> Any:
        model.zero_grad(set_to_none=True)
        x.grad = None
        out = run(inputs_embeds=x, use_cache=False).last_hidden_state
        value = 0.5 * (out.float() - target).square().sum(-1).mean()
        value.backward()
        return value.detach()

    def wait(_: Any) -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def gradients() -> dict[str, dict[str, np.ndarray]] | None:
        if method == "torch":
            return None

        def grad(layer):
            return layer.weight.grad.T.float().cpu().numpy()

        adapted = {path: modules[module_of(path)] for path in problem.kernels}
        return {p: {"a": grad(m.lora_A["default"]), "b": grad(m.lora_B["default"])} for p, m in adapted.items()}

    flops, temp = None if run is not model else count_flops(step), None
    if device == "cuda":
        model.zero_grad(set_to_none=True)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        temp = torch.cuda.max_memory_allocated() - before
    return Ready(step, wait, lambda value: (value, gradients()), flops=flops, temp_bytes=temp)
