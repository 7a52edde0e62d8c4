"""What adapters do to the weights: their spectra, heat maps of them, and the paper's quantities by rank."""

from rslora_jax.analysis import heatmap, spectrum, stability
from rslora_jax.analysis.spectrum import Matrix
from rslora_jax.analysis.stability import Stability

__all__ = ["Matrix", "Stability", "heatmap", "spectrum", "stability"]
