"""Rank-stabilised LoRA for JAX."""
