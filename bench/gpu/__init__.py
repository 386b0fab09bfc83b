"""What one GPU says: deltas in transformers of DiT sizes, and the generator: ``python -m bench.gpu``."""
