"""The parts of `scripts/benchmark.py` and `scripts/tpu_aot.py`."""
