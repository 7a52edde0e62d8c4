"""Many devices and many processes: how weights, adapters and batches lie on a mesh."""
