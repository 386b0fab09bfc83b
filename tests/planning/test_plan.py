"""`hywu plan`: operations and bytes against counts that we did not make, and what must follow from what."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from cli_tools import copy_tree, refused, run
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from hywu_export.passes import layers
from hywu_export.planning.case import Case, Options
from hywu_export.planning.costs import (
    LEAST_DIMENSION,
    Limits,
    Node,
    as_if,
    costs,
    scores_of,
    time_of,
    working_set,
)
from hywu_export.planning.devices import devices, find_device
from hywu_export.planning.memory import stored, weights_of
from hywu_export.planning.report import plan
from hywu_export.planning.shapes import Tensor, infer
from hywu_runtime import Bundle, Manifest
from hywu_runtime.errors import InputError, UnsupportedError
from hywu_runtime.manifest import Precision

DEVICE = "orin-nano-8gb"
LIMITS = Limits({"float32": 100.0, "float16": 200.0, "int8": 400.0}, 10.0)


def graph_of(
    nodes: list[onnx.NodeProto], inputs: dict[str, tuple[Any, ...]],
    weights: dict[str, np.ndarray] | None = None, dtype: int = TensorProto.FLOAT,
) -> onnx.ModelProto:  # fmt: skip
    values = [helper.make_tensor_value_info(name, dtype, list(shape)) for name, shape in inputs.items()]
    made = helper.make_graph(
        nodes, "g", values,
        [helper.make_tensor_value_info(nodes[-1].output[0], dtype, None)],
        [onnx.numpy_helper.from_array(array, name) for name, array in (weights or {}).items()],
    )  # fmt: skip
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)])


def planned(bundle: Path, **options: Any) -> dict[str, Any]:
    extra = {key: options.pop(key) for key in ("variant", "margin", "measured") if key in options}
    return plan(Bundle.open(bundle, links=False), find_device(DEVICE), options=Options(**options), **extra)


def nodes_of(bundle: Path, graph: str, **options: Any) -> list[Node]:
    case = Case(Bundle.open(bundle, links=False), Options(**options))
    signature = case.manifest.graphs[graph]
    model = onnx.load(bundle / signature.file, load_external_data=False)
    shapes = infer(model, {v.name: case.shape(v.shape) for v in signature.inputs})
    for value in signature.outputs:  # the manifest says the same
        assert shapes.tensors[value.name] == Tensor(case.shape(value.shape), value.dtype)
    return costs(model, shapes)


# Operations and bytes of single nodes, by hand.


def test_a_convolution() -> None:
    model = graph_of(
        [helper.make_node("Conv", ["x", "w", "b"], ["y"], "c", pads=[1, 1, 1, 1], strides=[2, 2], group=2)],
        {"x": (3, 4, 10, 8)}, {"w": np.zeros((6, 2, 3, 3), np.float32), "b": np.zeros(6, np.float32)},
    )  # fmt: skip
    (node,) = costs(model, infer(model, {"x": (3, 4, 10, 8)}))
    assert node.flops == 2 * (3 * 6 * 5 * 4) * (2 * 3 * 3)
    assert node.reads == 4 * (3 * 4 * 10 * 8 + 6 * 2 * 9 + 6)
    assert node.weights == 4 * 6 * 2 * 9
    assert node.writes == 4 * 3 * 6 * 5 * 4
    assert node.alone == node.bytes
    assert node.precision == "float32"


@pytest.mark.parametrize(("a", "b"), [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_a_gemm(a: int, b: int) -> None:
    shape = (7, 5)[:: -1 if a else 1]
    weight = np.zeros((5, 3)[:: -1 if b else 1], np.float32)
    model = graph_of(
        [helper.make_node("Gemm", ["x", "w"], ["y"], transA=a, transB=b)], {"x": shape}, {"w": weight}
    )
    (node,) = costs(model, infer(model, {"x": shape}))
    assert (node.flops, node.reads, node.writes) == (2 * 7 * 5 * 3, 4 * (35 + 15), 4 * 21)


def test_products_of_other_kinds() -> None:
    x = {"x": (2, 3, 4), "z": (2, 4, 5)}
    model = graph_of([helper.make_node("Einsum", ["x", "z"], ["y"], equation="bij,bjk->bik")], x)
    assert costs(model, infer(model, x))[0].flops == 2 * 2 * 3 * 4 * 5
    weight = {"w": np.zeros((4, 3, 2, 2), np.float32)}
    model = graph_of(
        [helper.make_node("ConvTranspose", ["x", "w"], ["y"], strides=[2, 2])], {"x": (1, 4, 5, 6)}, weight
    )
    assert costs(model, infer(model, {"x": (1, 4, 5, 6)}))[0].flops == 2 * (4 * 5 * 6) * (3 * 2 * 2)


def test_an_int8_product_reads_int8_and_a_dequantized_weight_is_no_activation() -> None:
    scale = {"s": np.array(0.1, np.float32), "z": np.array(0, np.int8)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "s", "z"], ["v"]),
        helper.make_node("MatMul", ["d", "v"], ["y"], "int8"),
        helper.make_node("MatMul", ["x", "v"], ["u"], "weights"),
    ]
    model = graph_of(nodes, {"x": (8, 32)}, {**scale, "w": np.zeros((32, 16), np.int8)})
    by_name = {node.name: node for node in costs(model, infer(model, {"x": (8, 32)}))}
    both, weights = by_name["int8"], by_name["weights"]
    assert (both.precision, both.reads, both.weights) == ("int8", 8 * 32 + 32 * 16, 32 * 16)
    assert (weights.precision, weights.reads, weights.weights) == ("float32", 4 * 8 * 32 + 32 * 16, 32 * 16)
    assert both.flops == weights.flops == 2 * 8 * 32 * 16
    assert by_name["v"].alone == 0  # a compiler dequantizes weights beforehand, or not at all


def test_a_narrow_weight_stays_as_it_is_in_a_variant_to_come() -> None:
    nodes = [helper.make_node("Cast", ["w"], ["v"], to=1), helper.make_node("MatMul", ["x", "v"], ["y"], "m")]
    for dtype, size in ((np.float16, 2), (np.float32, 4)):
        model = graph_of(nodes, {"x": (8, 32)}, {"w": np.zeros((32, 16), dtype)})
        shapes = infer(model, {"x": (8, 32)})
        made = costs(model, shapes)
        assert (made[1].weights, made[1].reads) == (size * 32 * 16, 4 * 8 * 32 + size * 32 * 16)
        half, int8, weights = (as_if(made, model, shapes, p)[1] for p in ("bf16", "int8", "int8-weights"))
        assert (half.precision, half.weights, half.reads) == ("bfloat16", 2 * 512, 2 * 256 + 2 * 512)
        assert (int8.precision, int8.weights, int8.reads) == ("int8", 512, 256 + 512)
        assert (weights.precision, weights.weights, weights.reads) == ("float16", 512, 2 * 256 + 512)
        assert half.writes == int8.writes == 2 * 8 * 16
        assert weights_of(model, "g.onnx").bytes == size * 512
        assert weights_of(model, "g.onnx", "fp16").bytes == 2 * 512
        assert weights_of(model, "g.onnx", "int8").bytes == 512


def test_scores_of_an_attention_stay_inside() -> None:
    tokens, width = 64, 8
    nodes = [
        helper.make_node("MatMul", ["q", "k"], ["s"], "qk"),
        helper.make_node("Mul", ["s", "half"], ["m"]),
        helper.make_node("Softmax", ["m"], ["p"]),
        helper.make_node("MatMul", ["p", "v"], ["y"], "pv"),
    ]
    inputs = {"q": (1, tokens, width), "k": (1, width, tokens), "v": (1, tokens, width)}
    model = graph_of(nodes, inputs, {"half": np.array(0.5, np.float32)})
    shapes = infer(model, inputs)
    found = costs(model, shapes)
    assert [node.bytes for node in found if node.flops] == [4 * 2 * tokens * width, 4 * 2 * tokens * width]
    assert len({node.group for node in found if node.flops}) == 1
    scores = 4 * tokens * tokens
    assert scores_of(model, shapes) == {"s", "m", "p"}
    assert working_set(model, shapes)[0] == scores  # the rest is an input or an output; done in place
    assert working_set(model, shapes, half=True)[0] == scores // 2
    assert working_set(model, shapes, without=scores_of(model, shapes))[0] == 0
    # Scores as the second operand are no attention.
    nodes[3] = helper.make_node("MatMul", ["y0", "p"], ["y"], "pv")
    model = graph_of(nodes, {**inputs, "y0": (1, width, tokens)}, {"half": np.array(0.5, np.float32)})
    assert not scores_of(model, infer(model, {**inputs, "y0": (1, width, tokens)}))


def test_the_roofline_takes_the_longer_of_both_for_each_group() -> None:
    nodes = [
        Node("a", "MatMul", 1000, "float32", 10, 10, 40),  # 10 s, 2 s
        Node("b", "MatMul", 400, "int8", 20, 10, 30),  # 1 s, 3 s
        Node("c", "Add", 0, "float32", 0, 0, 50),  # 5 s if it is not fused
        Node("d", "MatMul", 200, "float16", 5, 0, 5, group="g"),  # 1 s, 0.5 s
        Node("e", "MatMul", 200, "float16", 25, 0, 25, group="g"),  # 1 s, 2.5 s: together 2 s, 3 s
    ]
    time = time_of(nodes, LIMITS)
    assert time.seconds == pytest.approx(10 + 3 + 3)
    assert (time.compute, time.memory) == pytest.approx((13, 8))
    assert time.compute_bound == pytest.approx(10)
    assert time.unfused == pytest.approx(10 + 3 + 5 + 1 + 2.5)
    with pytest.raises(UnsupportedError, match="bfloat16"):
        time_of([Node("a", "MatMul", 1, "bfloat16", 0, 0, 0)], LIMITS)


def test_the_working_set_of_a_chain_with_a_branch() -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["a"]),  # 400 bytes
        helper.make_node("Reshape", ["a", "shape"], ["r"]),  # a view
        helper.make_node("Transpose", ["r"], ["t"]),  # 400 more
        helper.make_node("Add", ["t", "t"], ["u"]),  # in place
        helper.make_node("Reshape", ["a", "flat"], ["f"]),
        helper.make_node("Concat", ["f", "f"], ["w"], axis=0),  # 800 more; now a and u live too
        helper.make_node("Reshape", ["u", "flat"], ["g"]),
        helper.make_node("Concat", ["w", "g"], ["y"], axis=0),
    ]
    weights = {"shape": np.array([10, 10]), "flat": np.array([-1])}
    model = graph_of(nodes, {"x": (100,)}, weights)
    assert working_set(model, infer(model, {"x": (100,)})) == (1600, "w")


# Shapes.


def test_a_shape_that_only_a_run_shows_is_refused_by_name() -> None:
    nodes = [helper.make_node("NonZero", ["x"], ["i"], "where"), helper.make_node("Cast", ["i"], ["y"], to=1)]
    model = graph_of(nodes, {"x": (4, 4)})
    with pytest.raises(UnsupportedError, match="NonZero 'where' of graph g") as caught:
        infer(model, {"x": (4, 4)}, "graph g")
    assert caught.value.expected
    assert caught.value.remedy


def test_shapes_that_do_not_fit_are_refused() -> None:
    model = graph_of(
        [helper.make_node("MatMul", ["x", "w"], ["y"], "m")],
        {"x": (2, 5)},
        {"w": np.zeros((4, 3), np.float32)},
    )
    with pytest.raises(UnsupportedError, match=r"MatMul 'm'.*\[2, 5\], \[4, 3\]"):
        infer(model, {"x": (2, 5)})
    model = graph_of([helper.make_node("Mystery", ["x"], ["y"], "m", domain="com.other")], {"x": (2,)})
    with pytest.raises(UnsupportedError, match="Mystery"):
        infer(model, {"x": (2,)})


def test_external_weights_are_never_read(bundle: Path, tmp_path: Path) -> None:
    import shutil

    from hywu_runtime.manifest import Manifest

    shutil.copytree(bundle, tmp_path / "b")
    expected = planned(bundle, size="32x32")
    for file in (tmp_path / "b" / "weights").iterdir():
        size = file.stat().st_size
        file.write_bytes(b"")
        with file.open("r+b") as stream:
            stream.truncate(size)  # zeros: no header, no weight
    assert Manifest.read(tmp_path / "b")
    assert planned(tmp_path / "b", size="32x32") == expected


def test_shapes_of_bf16_where_onnx_has_none() -> None:
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"], "c")]
    weight = helper.make_tensor("w", TensorProto.BFLOAT16, (2, 1, 1, 1), [0.0, 0.0])
    model = graph_of(nodes, {"x": (1, 1, 4, 4)}, dtype=TensorProto.BFLOAT16)
    model.graph.initializer.append(weight)
    shapes = infer(model, {"x": (1, 1, 4, 4)})
    assert shapes.tensors["y"] == Tensor((1, 2, 4, 4), "bfloat16")
    assert costs(model, shapes)[0].reads == 2 * (16 + 2)


# Operations of whole models against torch's own count.


def torch_flops(run_model: Callable[[], Any]) -> int:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run_model()
    return int(counter.get_total_flops())


@pytest.fixture(scope="module")
def pipeline(pair: Any) -> Any:
    from diffusers import StableDiffusionInstructPix2PixPipeline
    from diffusers.models.attention_processor import AttnProcessor

    pipe = StableDiffusionInstructPix2PixPipeline.from_pretrained(pair.base, safety_checker=None)
    for part in (pipe.unet, pipe.vae):
        part.set_attn_processor(AttnProcessor())  # plain products, which torch counts on a CPU too
    return pipe


@pytest.mark.parametrize(("width", "height", "batch"), [(32, 32, 1), (64, 32, 2)])
def test_operations_are_those_that_torch_counts(
    pipeline: Any, bundle: Path, width: int, height: int, batch: int
) -> None:
    import torch

    sizes: dict[str, Any] = {"size": f"{width}x{height}", "batch": batch}
    manifest = Manifest.read(bundle)
    factor = manifest.axes["latent_height"].divide or 1
    latents = (height // factor, width // factor)
    unet, vae, text = pipeline.unet, pipeline.vae, pipeline.text_encoder
    (prompt,) = [t for name, t in manifest.tensors.items() if name == "prompt.ids"]
    length = int(prompt.shape[1])
    branches = 0
    for target in manifest.deltas.targets if manifest.deltas else ():
        branches += sum(np.prod(shape) for shape in target.shapes().values())
    assert branches > 0
    for graph, rows in (("step", 3), ("step_unguided", 1)):
        states = torch.zeros(rows * batch, length, unet.config.cross_attention_dim)
        sample = torch.zeros(rows * batch, unet.config.in_channels, *latents)
        theirs = torch_flops(lambda sample=sample, states=states: unet(sample, torch.tensor(1), states))
        ours = 0
        for part in (f"prepare_{graph}", graph):  # keys and values of the text are made once per request
            nodes = nodes_of(bundle, part, **sizes)
            ours += sum(n.flops for n in nodes) - branch_flops(bundle, part, nodes)
        assert ours == theirs
    decoder = sum(n.flops for n in nodes_of(bundle, "image_decoder", **sizes))
    assert decoder == torch_flops(
        lambda: vae.decode(torch.zeros(batch, vae.config.latent_channels, *latents))
    )
    encoder = sum(n.flops for n in nodes_of(bundle, "image_encoder", **sizes))
    assert encoder == torch_flops(lambda: vae.encode(torch.zeros(batch, 3, height, width)))
    texts = sum(n.flops for n in nodes_of(bundle, "text_encoder", **sizes))
    ids = torch.zeros(batch, length, dtype=torch.int64)
    text.set_attn_implementation("eager")
    assert texts == torch_flops(lambda: text(ids))


def branch_flops(bundle: Path, graph: str, nodes: list[Node]) -> int:
    """By the names of the modules' nodes: what stands in no module of torch."""
    from hywu_export.engines.branches import find_branches

    model = onnx.load(bundle / f"{graph}.onnx", load_external_data=False)
    own = {name for branch in find_branches(model) for name in (*branch.down, *branch.up)}
    return sum(node.flops for node in nodes if node.name in own)


def test_operations_of_the_branches_are_those_of_their_formula(bundle: Path, pipeline: Any) -> None:
    """2·r·(in + out) for each row that torch's own hooks see pass a target."""
    import torch

    manifest = Manifest.read(bundle)
    assert manifest.deltas is not None
    targets = {target.module: target for target in manifest.deltas.targets}
    expected = 0

    def note(name: str) -> Callable[..., None]:
        def hook(_: Any, inputs: tuple[Any, ...], __: Any) -> None:
            nonlocal expected
            target = targets[name]
            rows = inputs[0].numel() // target.in_features
            expected += 2 * target.rank * rows * (target.in_features + target.out_features)

        return hook

    handles = [pipeline.unet.get_submodule(name).register_forward_hook(note(name)) for name in targets]
    factor = manifest.axes["latent_height"].divide or 1
    length = int(manifest.tensors["prompt.ids"].shape[1])
    with torch.no_grad():
        sample = torch.zeros(3, pipeline.unet.config.in_channels, 32 // factor, 32 // factor)
        pipeline.unet(
            sample, torch.tensor(1), torch.zeros(3, length, pipeline.unet.config.cross_attention_dim)
        )
    for handle in handles:
        handle.remove()
    parts = ("prepare_step", "step")
    made = [branch_flops(bundle, part, nodes_of(bundle, part, size="32x32")) for part in parts]
    assert sum(made) == expected
    deltas = planned(bundle, size="32x32")["deltas"]
    assert deltas["branch_flops"] == made[1]  # what every step computes
    read = {tensor.name for tensor in manifest.graphs["step"].inputs}
    in_steps = [target for target in targets.values() if f"{target.module}.lora_A" in read]
    assert 0 < len(in_steps) < len(targets)
    merge = sum(2 * t.rank * t.in_features * t.out_features for t in in_steps)
    assert deltas["merge_flops"] == merge
    assert deltas["merged_memory"] == 4 * sum(t.in_features * t.out_features for t in in_steps)
    assert deltas["share_flops"] == pytest.approx(
        deltas["branch_flops"] / planned(bundle, size="32x32")["stages"]["step"]["flops"]
    )


# What must follow from what.


@pytest.fixture(scope="module")
def at(bundle: Path) -> Callable[[int, int, int, int], dict[str, Any]]:
    known: dict[tuple[int, ...], dict[str, Any]] = {}

    def get(width: int, height: int, batch: int, rank: int) -> dict[str, Any]:
        key = (width, height, batch, rank)
        if key not in known:
            known[key] = planned(bundle, size=f"{width}x{height}", batch=batch, rank=rank)
        return known[key]

    return get


@settings(max_examples=8, deadline=None)
@given(
    width=st.sampled_from([16, 32]), height=st.sampled_from([16, 32]), batch=st.integers(1, 3),
    rank=st.integers(1, 12), more=st.sampled_from(["width", "height", "batch", "rank"]),
)  # fmt: skip
def test_more_of_anything_costs_more(
    at: Callable[..., dict[str, Any]], width: int, height: int, batch: int, rank: int, more: str
) -> None:
    sizes = {"width": width, "height": height, "batch": batch, "rank": rank}
    less = at(**sizes)
    sizes[more] += 16 if more in ("width", "height") else 1
    greater = at(**sizes)
    for key in ("seconds", "flops", "bytes", "unfused"):
        assert greater["stages"]["step"][key] > less["stages"]["step"][key]
        assert greater["edit"][key] > less["edit"][key]
    for key in ("all_at_once", "low_memory"):
        assert greater["memory"][key] > less["memory"][key]
    assert greater["memory"]["weights"] == less["memory"]["weights"]
    assert greater["deltas"]["branch_flops"] > less["deltas"]["branch_flops"]
    assert greater["deltas"]["branch_seconds"] > less["deltas"]["branch_seconds"]
    if more == "rank":
        ratio = greater["deltas"]["branch_flops"] / less["deltas"]["branch_flops"]
        assert ratio == pytest.approx((rank + 1) / rank)
    for result in (less, greater):
        edit, step = result["edit"], result["stages"]["step"]
        assert edit["seconds"] <= edit["unfused"]
        assert max(step["compute"], step["memory"]) <= step["seconds"] * (1 + 1e-9)
        assert step["seconds"] <= step["compute"] + step["memory"]


def test_an_edit_is_the_sum_of_its_stages(bundle: Path) -> None:
    few, many = planned(bundle, size="32x32", steps=2), planned(bundle, size="32x32", steps=6)
    assert (few["request"]["evaluations"], many["request"]["evaluations"]) == (2, 6)
    step = few["stages"]["step"]
    assert many["edit"]["seconds"] - few["edit"]["seconds"] == pytest.approx(4 * step["seconds"])
    assert few["edit"]["flops"] == sum(s["flops"] * s["runs"] for s in few["stages"].values())
    assert list(few["stages"]) == ["encode", "condition", "generate", "prepare", "step", "decode"]
    again = json.loads(json.dumps(few, allow_nan=False))
    assert again == few


def test_weights_are_as_large_as_their_files(bundle: Path, linked_bundle: Path) -> None:
    """The data of every safetensors file that graphs point into, by its own header."""
    weights = []
    manifest = Manifest.read(bundle)
    for graph in manifest.graphs.values():
        weights.append(weights_of(onnx.load(bundle / graph.file, load_external_data=False), graph.file))
    outside = sum(
        size for one in weights for (file, _), size in dict(one.places).items() if not file.endswith(".onnx")
    )
    places = {place: size for one in weights for place, size in one.places.items()}
    assert sum(size for (file, _), size in places.items() if not file.endswith(".onnx")) == in_files(
        bundle / "weights"
    )
    assert outside > in_files(bundle / "weights")  # the two step graphs share theirs
    assert stored(weights) == sum(places.values())
    linked = Manifest.read(linked_bundle)
    for graph in linked.graphs.values():
        found = weights_of(onnx.load(linked_bundle / graph.file, load_external_data=False), graph.file)
        for name, tensor in linked.linked.get(graph.file, {}).items():
            assert tensor.length in found.places.values(), name


def test_variants_that_are_not_made(bundle: Path) -> None:
    wide, half = planned(bundle, size="64x64"), planned(bundle, size="64x64", variant="fp16")
    int8, weights = (planned(bundle, size="64x64", variant=v) for v in ("int8", "int8-weights"))
    assert [r["as_if"] for r in (wide, half, int8, weights)] == [False, True, True, True]
    assert half["memory"]["weights"] == pytest.approx(wide["memory"]["weights"] / 2, rel=0.02)
    assert int8["memory"]["weights"] < 0.7 * half["memory"]["weights"]
    assert len({r["edit"]["flops"] for r in (wide, half, int8, weights)}) == 1
    times = [r["edit"]["seconds"] for r in (wide, half, int8)]
    assert times == sorted(times, reverse=True)
    assert int8["edit"]["seconds"] <= weights["edit"]["seconds"] <= half["edit"]["seconds"]
    assert {entry["variant"] for entry in wide["variants"]} == {None, "fp16", "int8"}
    assert wide["variants"][1]["edit"] == half["edit"]["seconds"]


@pytest.fixture(scope="module")
def with_variants(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the bundle with variants of the two graphs of a step: FP16, and INT8 in all layers."""
    from hywu_export.bundle.variants import load_graph, write_variant
    from hywu_export.passes.half import to_half
    from hywu_export.passes.quantize import Quantized, quantize
    from hywu_export.passes.weights8 import quantize_weights

    folder = copy_tree(bundle, tmp_path_factory.mktemp("variants") / "bundle", ["manifest.json"])
    graphs = ("step", "step_unguided")
    variants: tuple[Precision, ...] = ("fp16", "int8", "int8-weights")
    for variant in variants:
        models = {name: load_graph(Bundle.open(folder), name) for name in graphs}
        for graph, model in models.items():
            if variant == "fp16":
                models[graph] = to_half(model, "fp16")
            elif variant == "int8":
                names = [layer.name for layer in layers.find_layers(model) if not layer.small]
                quantize(model, dict.fromkeys(names, Quantized(0.0625)))
            else:
                quantize_weights(model)
        write_variant(folder, variant, variant, models)
    return folder


def in_files(folder: Path) -> int:
    """Bytes of the data of safetensors files, by their headers."""
    size = 0
    for file in folder.iterdir():
        data = file.read_bytes()
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        spans = [entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"]
        size += sum(end - start for start, end in spans)
    return size


def test_variants_of_the_bundle(with_variants: Path) -> None:
    made = Bundle.open(with_variants)
    for name, variant in made.manifest.variants.items():
        weights = [
            weights_of(onnx.load(made.file(file), load_external_data=False), file)
            for file in variant.graphs.values()
        ]
        places = {place: size for one in weights for place, size in one.places.items()}
        outside = sum(size for (file, _), size in places.items() if not file.endswith(".onnx"))
        assert outside == in_files(with_variants / "variants" / name / "weights")
        assert stored(weights) == sum(places.values())
        result = planned(with_variants, size="64x64", variant=name)
        assert (result["variant"], result["as_if"]) == (name, False)
    assert LEAST_DIMENSION == layers.LEAST_DIMENSION
    case = Case(made, Options(size="64x64"))

    def flops(variant: str, precision: str) -> int:
        return sum(n.flops for n in costs(*case.graph("step", variant)) if n.precision == precision)

    wide = costs(*case.graph("step", None))
    to_come = as_if(wide, *case.graph("step", None), "int8")
    all_of_it = sum(node.flops for node in wide)
    assert flops("int8", "int8") == sum(n.flops for n in to_come if n.precision == "int8") > all_of_it / 2
    assert flops("int8", "int8") + flops("int8", "float32") == all_of_it
    assert flops("int8-weights", "float32") == all_of_it
    assert flops("fp16", "float16") > 0.9 * all_of_it
    entries = {entry["variant"]: entry for entry in planned(with_variants, size="64x64")["variants"]}
    assert [e["as_if"] for e in entries.values()] == [False] * 4
    steps = {name: entry["stages"]["step"] for name, entry in entries.items()}
    assert steps["fp16"] < steps[None]
    assert steps["int8"] < steps["int8-weights"] <= steps[None]
    half = time_of(as_if(wide, *case.graph("step", None), "fp16"), find_device(DEVICE).limits).seconds
    assert steps["fp16"] == pytest.approx(half, rel=0.1)


def test_merging_needs_weights_for_every_set_of_deltas(bundle: Path) -> None:
    one = planned(bundle, size="32x32", batch=3, axes={"delta_batch": "1"})["deltas"]
    three = planned(bundle, size="32x32", batch=3)["deltas"]
    assert (one["sets"], three["sets"]) == (1, 3)
    for key in ("merge_flops", "merged_memory"):
        assert three[key] == 3 * one[key]
    assert three["branch_flops"] == one["branch_flops"]
    assert three["merged_step"] > one["merged_step"]
    assert three["crossover_token_steps"] == pytest.approx(3 * one["crossover_token_steps"], abs=3)
    if one["crossover_steps"] is not None and three["crossover_steps"] is not None:
        assert three["crossover_steps"] >= one["crossover_steps"]


def test_what_fits(bundle: Path) -> None:
    whole = planned(bundle, size="64x64", margin=0)["memory"]
    device = find_device(DEVICE).memory
    assert whole["fits"] == "at once"
    assert whole["low_memory"] < whole["all_at_once"]
    assert whole["all_at_once"] == sum(part["bytes"] for part in whole["parts"])
    between = (whole["all_at_once"] + whole["low_memory"]) / 2
    for margin, fits in ((device - between, "low_memory"), (device, "no"), (None, "at once")):
        assert planned(bundle, size="64x64", margin=margin)["memory"]["fits"] == fits


def test_stages_of_a_cut_bundle(staged_bundles: Path) -> None:
    whole, cut = (planned(staged_bundles / name, size="32x32") for name in ("1", "4"))
    assert whole["cuts"] == []
    assert len(cut["cuts"]) == 4
    assert sum(part["weights"] for part in cut["cuts"]) == cut["memory"]["weights"]
    assert cut["edit"]["flops"] >= whole["edit"]["flops"]
    assert cut["edit"]["flops"] == pytest.approx(whole["edit"]["flops"], rel=0.05)
    for key in ("targets", "branch_flops", "merge_flops", "merged_memory"):
        assert cut["deltas"][key] == whole["deltas"][key]
    assert len(cut["deltas"]["graphs"]) > len(whole["deltas"]["graphs"]) == 1
    assert max(part["weights"] for part in cut["cuts"]) < 0.6 * whole["memory"]["weights"]


def test_deltas_of_convolutions(lora_bundle: Path) -> None:
    result = planned(lora_bundle, size="32x32")
    manifest = Manifest.read(lora_bundle)
    assert manifest.deltas is not None
    kinds = {target.kind for target in manifest.deltas.targets}
    assert kinds == {"linear", "conv"}
    read = {tensor.name for tensor in manifest.graphs["step"].inputs}
    in_steps = [t for t in manifest.deltas.targets if f"{t.module}.lora_A" in read]
    merge = sum(
        2 * t.rank * t.in_features * t.out_features * int(np.prod(t.kernel or (1,))) for t in in_steps
    )
    assert result["deltas"]["targets"] == len(in_steps) > 0
    assert result["deltas"]["merge_flops"] == merge
    assert "generate" not in result["stages"]
    assert result["memory"]["tensors"]["deltas"] == 4 * sum(
        np.prod(s) for s in manifest.deltas.tensors.values()
    )


def test_a_rank_that_is_fixed_in_a_graph_is_refused(lora_bundle: Path) -> None:
    message = refused("plan", lora_bundle, "--device", DEVICE, "--size", "32x32", "--rank", 3)
    assert "Rank 3 cannot be planned" in message
    assert "own, 8" in message


def test_a_module_that_is_no_editor(tmp_path: Path) -> None:
    import torch

    import hywu_export

    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = torch.nn.Linear(6, 20), torch.nn.Linear(20, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(torch.relu(self.up(x)))

    hywu_export.trace(Twice(), (torch.ones(2, 5, 6),), ["up", "down"], max_rank=3).save(tmp_path / "bundle")
    result = planned(tmp_path / "bundle", batch=4)
    assert list(result["stages"]) == ["run"]
    assert result["request"]["size"] is None
    own, branches = 2 * 4 * 5 * (6 * 20 + 20 * 6), 2 * 3 * 4 * 5 * 2 * (6 + 20)
    assert result["stages"]["run"]["flops"] == own + branches
    assert (result["deltas"]["stage"], result["deltas"]["branch_flops"]) == ("run", branches)
    text = run("plan", tmp_path / "bundle", "--device", DEVICE).stdout
    assert "Twice" in text or "bundle" in text
    assert "\n  run " in text
    assert "\n  all " in text
    assert refused("plan", tmp_path / "bundle", "--device", DEVICE, "--size", "32x32")


# The table of devices.


def test_the_table_of_devices() -> None:
    table = devices()
    assert {"orin-nano-8gb", "orin-agx-64gb", "thor", "rtx-4090", "h200"} <= set(table)
    for device in table.values():
        assert device.source
        assert device.url.startswith("https://")
        assert set(device.unconfirmed) <= {*device.peak, "bandwidth", "memory"}
        assert device.peak["float32"] <= device.peak["float16"] < device.peak["int8"] < 3e15
        assert 1e11 < device.bandwidth < 1e13
        assert device.limits.peak["float32"] == max(device.peak["float32"], device.peak.get("tf32", 0))
    assert find_device("RTX_4090") == table["rtx-4090"]
    with pytest.raises(InputError, match="orin-nano-8gb"):
        find_device("orin-nano")


# The command.


def test_the_command(bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    text = run("plan", bundle, "--device", "thor", "--size", "32x32", "--json", out).stdout
    result = json.loads(out.read_text())
    printed = run("plan", bundle, "--device", "thor", "--size", "32x32", "--json", "-").stdout
    assert json.loads(printed) == result
    assert max(map(len, text.splitlines())) <= 100
    for word in ("Jetson T5000", "memory: all graphs fit at once", "least times", "Merging", "lower bounds"):
        assert word in text
    for stage in result["stages"]:
        assert f"\n  {stage} " in text
    listed = run("plan", "--devices").stdout
    assert all(len(line) <= 100 for line in listed.splitlines() if "https://" not in line)
    for device in devices().values():
        assert device.key in listed
        assert device.url in listed


def test_it_needs_neither_torch_nor_a_runtime_of_graphs(bundle: Path) -> None:
    program = f"""
import sys
from hywu_export.planning.devices import find_device
from hywu_export.planning.report import plan
from hywu_runtime import Bundle
plan(Bundle.open({str(bundle)!r}), find_device({DEVICE!r}))
print(*(m for m in ("torch", "diffusers", "transformers", "onnx_ir", "onnxruntime") if m in sys.modules))
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []


def test_a_measurement_beside_the_plan(bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    small = ("--size", "32x16", "--steps", 3, "--batch", 2, "--duration", 0, "--threads", 1)
    run("bench", bundle, *small, "--json", file)
    planned_to = ("--json", tmp_path / "plan.json")
    text = run("plan", bundle, "--device", DEVICE, "--measured", file, *planned_to).stdout
    result, bench = json.loads((tmp_path / "plan.json").read_text()), json.loads(file.read_text())
    assert result["request"]["size"] == [32, 16]
    assert (result["request"]["batch"], result["request"]["evaluations"]) == (2, 3)
    stages = result["measured"]["stages"]
    assert set(stages) == {"encode", "condition", "generate", "prepare", "step", "decode", "edit"}
    assert stages["step"]["measured"] == bench["stages"]["steady_step"]["p50"]
    assert stages["edit"]["planned"] == result["edit"]["seconds"]
    for pair in stages.values():
        assert pair["ratio"] == pytest.approx(pair["measured"] / pair["planned"])
        assert f"{pair['ratio']:.2f}" in text
    assert "measured / least" in text
    for option, value in (("--size", "32x32"), ("--batch", 3), ("--steps", 4), ("--variant", "fp16")):
        message = refused("plan", bundle, "--device", DEVICE, "--measured", file, option, value)
        assert f"{option.removeprefix('--')} is {value}" in message
    bench["bundle"] = "another"
    file.write_text(json.dumps(bench))
    assert "'another'" in refused("plan", bundle, "--device", DEVICE, "--measured", file)


def test_what_is_refused(bundle: Path, tmp_path: Path) -> None:
    on = ("plan", bundle, "--device", DEVICE)
    assert "rtx-4090" in refused("plan", bundle, "--device", "rtx-409")
    assert "There is no device" in refused("plan", bundle)
    assert "There is no bundle" in refused("plan", "--device", DEVICE)
    assert "9999x9999" in refused(*on, "--size", "9999x9999")
    assert "no variant" in refused(*on, "--variant", "fp4")
    assert "The batch is 0" in refused(*on, "--batch", 0)
    assert "batch" in refused(*on, "--batch", 1000)
    assert "rank 0" in refused(*on, "--rank", 0)
    assert "steps" in refused(*on, "--steps", 1000)
    assert "no such axis" in refused(*on, "--axis", "depth=3")
    assert "--axis" in refused(*on, "--axis", "depth")
    assert "margin" in refused(*on, "--margin", -1)
    assert "cannot be read as a measurement" in refused(*on, "--measured", tmp_path / "none.json")
    assert "there is no folder" in refused(*on, "--json", tmp_path / "none" / "x.json")
    assert "No bundle" in refused("plan", tmp_path, "--device", DEVICE)
    assert not list(tmp_path.iterdir())
