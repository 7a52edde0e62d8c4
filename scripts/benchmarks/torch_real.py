"""The real training step by PEFT on torch, over a base in bfloat16 or in bitsandbytes' NF4 or int8: random weights."""

import gc
import time
from typing import Any

import peft
import torch
import transformers


def model_of(config: Any, base: str, rank: int, remat: str, device: str) -> Any:
    """Return a model with adapters on all matrices of its layers, in float32 as PEFT has them."""
    c = config
    sizes = transformers.LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.width,
        intermediate_size=c.mlp_width,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads,
        num_key_value_heads=c.num_kv_heads,
        max_position_embeddings=c.max_len,
        rms_norm_eps=c.norm_eps,
        rope_theta=c.rope_base,
        tie_word_embeddings=c.tie_head,
        use_cache=False,
        pad_token_id=None,
        attn_implementation="sdpa",
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = transformers.LlamaForCausalLM(sizes)
    torch.set_default_dtype(torch.float32)
    if base != "bfloat16":
        pack(model.model.layers, base, device)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = peft.get_peft_model(model, peft.LoraConfig(r=rank, lora_alpha=16, use_rslora=True, target_modules=names))
    if remat != "none":
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return model.train()


def pack(layers: Any, base: str, device: str) -> None:
    """Put the matrices of the layers into bitsandbytes' forms, one after the other."""
    import bitsandbytes as bnb

    for module in list(layers.modules()):
        for name, linear in module.named_children():
            if type(linear) is not torch.nn.Linear:
                continue
            sizes = (linear.in_features, linear.out_features)
            weight = linear.weight.detach().cpu()
            if base == "nf4":
                new = bnb.nn.Linear4bit(*sizes, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
                new.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True)
            else:
                new = bnb.nn.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False)
                new.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
            setattr(module, name, new.to(device))
    gc.collect()


def measure(config: Any, batch: Any, a: Any) -> dict[str, Any]:
    """Return the figures of PEFT's step: its seconds in each repeat, and its memory."""
    is_gpu = torch.cuda.is_available()
    device = "cuda" if is_gpu else "cpu"
    model = model_of(config, a.base, a.rank, a.remat, device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    tokens = torch.tensor(batch.tokens_BxT, dtype=torch.long, device=device)

    def step() -> Any:
        with torch.autocast(device, torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def wait() -> None:
        if is_gpu:
            torch.cuda.synchronize()

    step(), wait()
    held = torch.cuda.memory_allocated() if is_gpu else sum(p.nbytes for p in model.parameters())
    if is_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(a.repeats):
        begun = time.perf_counter()
        for _ in range(a.steps):
            loss = step()
        wait()
        seconds.append((time.perf_counter() - begun) / a.steps)
    peak = torch.cuda.max_memory_allocated() if is_gpu else held
    figures = {"compile_s": "", "loss": float(loss), "version": f"torch {torch.__version__}, peft {peft.__version__}"}
    return figures | {"seconds": seconds, "held": held, "temporary": peak - held, "peak": peak}
