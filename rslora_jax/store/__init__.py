"""Adapters on disk: checkpoints with orbax, and checksums that tell bases apart."""
