"""What an adapter is: `Method`, and one file for each, by whose name `LoraConfig(method=...)` knows it."""

from rslora_jax.methods.method import RANK, LowRank, Method, aligned, method_of, terms

__all__ = ["RANK", "LowRank", "Method", "aligned", "method_of", "terms"]
