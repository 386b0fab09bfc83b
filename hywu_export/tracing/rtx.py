"""Asks TensorRT-RTX whether it takes a graph. The parser needs neither a GPU nor a driver."""

from __future__ import annotations

from pathlib import Path

from hywu_runtime.errors import DeviceError


def available() -> bool:
    """Whether ``tensorrt_rtx`` is installed."""
    from importlib.util import find_spec

    return find_spec("tensorrt_rtx") is not None


def parser_errors(model: bytes | Path) -> list[str]:
    """What TensorRT-RTX's ONNX parser has against a model; an empty list if nothing.

    ``model`` is a serialized model with all its weights, or an .onnx file whose external data lies beside it.

    Raises:
        DeviceError: ``tensorrt_rtx`` is not installed.
    """
    if not available():
        raise DeviceError(
            "TensorRT-RTX is not installed", "Its parser proves the graphs", "pip install 'hywu-export[rtx]'"
        )
    import tensorrt_rtx as trt

    logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    parsed = parser.parse(model) if isinstance(model, bytes) else parser.parse_from_file(str(model))
    errors = [
        f"{e.node_name()} ({e.node_operator()}): {e.desc()}"
        for e in map(parser.get_error, range(parser.num_errors))
    ]
    return errors if parsed or errors else ["the parser failed without saying why"]
