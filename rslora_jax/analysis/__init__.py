"""What adapters do to the weights: their spectra, heat maps of them, and the paper's quantities by rank."""
