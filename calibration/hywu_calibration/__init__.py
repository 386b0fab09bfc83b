"""Precision variants of a bundle: what its values are during real edits, and which precision each layer takes."""
