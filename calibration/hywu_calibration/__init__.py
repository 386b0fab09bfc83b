"""Precision variants of a bundle: what its values are in real edits, which precision each layer takes."""
