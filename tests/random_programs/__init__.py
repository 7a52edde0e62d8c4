"""The laws on random programs."""
