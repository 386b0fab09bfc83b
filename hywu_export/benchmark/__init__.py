"""How long each stage of an edit takes, and what changing the deltas costs. Needs the runtime alone.

Only the comparison with graphs without deltas (`plain`) needs the package onnx.
"""
