"""What a bundle needs of a device, from its graphs alone: memory, and the least time that each stage takes.

Needs the package onnx, and neither weights nor a GPU nor torch.
"""
