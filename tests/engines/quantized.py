"""A hand-made bundle of one graph: an INT8 product with a delta branch in FP16, by the rules for Q/DQ."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

WIDTH, RANK = 64, 8


def model() -> onnx.ModelProto:
    """``x [batch, 16, W] → out``: Q/DQ around the product, the branch reads what comes before Q."""
    random = np.random.default_rng(0)
    weight = random.standard_normal((WIDTH, WIDTH)) / 8
    scale = np.abs(weight).max(0) / 127
    constants = {
        "w.q": np.clip(np.round(weight / scale), -128, 127).astype(np.int8),
        "w.scale": scale.astype(np.float16),
        "w.zero": np.zeros(WIDTH, np.int8),
        "x.scale": np.float16(0.03),
        "x.zero": np.int8(0),
        "tail": np.array([1, 2], np.int64),
    }
    half = TensorProto.FLOAT16
    nodes = [
        helper.make_node("Cast", ["x"], ["x16"], name="in/Cast", to=half),
        helper.make_node("Cast", ["m.lora_A"], ["a16"], name="m/Cast", to=half),
        helper.make_node("Cast", ["m.lora_B"], ["b16"], name="m/Cast_2", to=half),
        helper.make_node("Cast", ["gate"], ["g16"], name="m/Cast_3", to=half),
        helper.make_node("Unsqueeze", ["g16", "tail"], ["g"], name="m/Unsqueeze"),
        helper.make_node("QuantizeLinear", ["x16", "x.scale", "x.zero"], ["xq"], name="m/Q"),
        helper.make_node("DequantizeLinear", ["xq", "x.scale", "x.zero"], ["xd"], name="m/DQ"),
        helper.make_node("DequantizeLinear", ["w.q", "w.scale", "w.zero"], ["wd"], name="m/DQ_2", axis=1),
        helper.make_node("MatMul", ["xd", "wd"], ["y"], name="m/MatMul"),
        helper.make_node("Transpose", ["a16"], ["at"], name="m/Transpose", perm=[0, 2, 1]),
        helper.make_node("MatMul", ["x16", "at"], ["low"], name="m/MatMul_2"),
        helper.make_node("Mul", ["low", "g"], ["gated"], name="m/Mul"),
        helper.make_node("Transpose", ["b16"], ["bt"], name="m/Transpose_2", perm=[0, 2, 1]),
        helper.make_node("MatMul", ["gated", "bt"], ["high"], name="m/MatMul_3"),
        helper.make_node("Add", ["y", "high"], ["z"], name="m/Add"),
        helper.make_node("Sigmoid", ["z"], ["s"], name="act/Sigmoid"),
        helper.make_node("Mul", ["z", "s"], ["zs"], name="act/Mul"),
        helper.make_node("Cast", ["zs"], ["made.lora_A"], name="out/Cast", to=TensorProto.FLOAT),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "quantized",
        [
            value("x", TensorProto.FLOAT, ["batch", 16, WIDTH]),
            value("m.lora_A", TensorProto.FLOAT, ["delta_batch", RANK, WIDTH]),
            value("m.lora_B", TensorProto.FLOAT, ["delta_batch", WIDTH, RANK]),
            value("gate", TensorProto.FLOAT, ["batch"]),
        ],
        [value("made.lora_A", TensorProto.FLOAT, ["batch", 16, WIDTH])],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(made)
    return made


def write_model_bundle(folder: Path, made: onnx.ModelProto) -> Path:
    """A bundle whose one graph, ``step``, is ``made``; inputs that are no deltas are given by the caller."""
    folder.mkdir(parents=True)
    (folder / "step.onnx").write_bytes(made.SerializeToString())
    data = (folder / "step.onnx").read_bytes()

    def values(side: Any) -> list[dict[str, Any]]:
        return [
            {
                "name": v.name,
                "dtype": "float32",
                "shape": [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim],
            }
            for v in side
        ]

    inputs, outputs = values(made.graph.input), values(made.graph.output)
    manifest: dict[str, Any] = {
        "format": 1,
        "name": "one graph",
        "family": None,
        "producer": {"name": "tests", "version": "0"},
        "files": {"step.onnx": {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}},
        "axes": {"batch": {"min": 1, "max": 8}, "delta_batch": {"min": 1, "max": 8, "one_or": "batch"}},
        "tensors": {v["name"]: {"dtype": "float32", "shape": v["shape"], "source": "input"} for v in inputs},
        "graphs": {"step": {"file": "step.onnx", "inputs": inputs, "outputs": outputs}},
        "program": [{"graph": "step", "phase": "request"}],
        "results": {"deltas": [v["name"] for v in outputs]},
    }
    if not any("delta_batch" in v["shape"] for v in inputs):
        del manifest["axes"]["delta_batch"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder
