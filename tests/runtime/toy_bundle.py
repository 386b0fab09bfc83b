# ruff: noqa: E501
"""A bundle of a made-up family, in ONNX text and in NumPy.

Two text encoders (one with an attention mask), a generator of one linear delta, an input mask, a carried
cache besides the latents, a load-phase call, guided and unguided steps. The runtime has never heard of it.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from hywu_runtime.manifest import Manifest

RANK, WIDTH = 3, 4
DELTAS = ("mix.lora_A", "mix.lora_B")

GRAPHS = {
    "words": """words (int64[batch, 8] ids) => (float[batch, 4] hidden)
        <float[300, 4] table> { e = Gather(table, ids) hidden = ReduceMean<keepdims=0>(e, axis) }""",
    "marks": """marks (int64[batch, 6] ids, int64[batch, 6] mask) => (float[batch, 4] hidden)
        <float[300, 4] table> {
            e = Gather(table, ids) m = Cast<to=1>(mask) u = Unsqueeze(m, last) w = Mul(e, u)
            hidden = ReduceSum<keepdims=0>(w, axis) }""",
    "encode": """encode (uint8[batch, height, width, 3] image) => (float[batch, 4, h, w] latents)
        <float[3, 4] project> {
            f = Cast<to=1>(image) n = Div(f, level) p = MatMul(n, project) t = Transpose<perm=[0, 3, 1, 2]>(p)
            latents = AveragePool<kernel_shape=[4, 4], strides=[4, 4]>(t) }""",
    "generate": """generate (float[batch, 4] words, float[batch, 4] marks) => (float[batch, 3, 4] a, float[batch, 4, 3] b)
        <float[4, 12] to_a, float[4, 12] to_b> {
            ya = MatMul(words, to_a) a = Reshape(ya, shape_a) yb = MatMul(marks, to_b) b = Reshape(yb, shape_b) }""",
    "prepare": """prepare (float[batch, 4, h, w] noise, float scale, float[batch, 4] words) => (
            float[batch, 4, h, w] latents, float[batch, 4] cache) {
            latents = Mul(noise, scale) cache = Neg(words) }""",
    "final": """final (float[batch, 4, h, w] latents, float[batch, 4] cache) => (uint8[batch, height, width, 3] image)
        <float[4, 3] back> {
            c = Unsqueeze(cache, spatial) x = Add(latents, c) s = Sigmoid(x)
            u = Resize<mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor">(s, , scales)
            t = Transpose<perm=[0, 2, 3, 1]>(u) p = MatMul(t, back) q = Clip(p, zero, one) v = Mul(q, level) r = Round(v)
            image = Cast<to=2>(r) }""",
}
# In place of `prepare` in the bundle whose edits start midway.
MIDWAY = """depart (float[batch, 4, h, w] noise, float[batch, 4, h, w] source, float[2] start, float[batch, 4] words) => (
        float[batch, 4, h, w] latents, float[batch, 4] cache) {
        s0 = Gather(start, i0) s1 = Gather(start, i1) clean = Mul(source, s0) noisy = Mul(noise, s1)
        latents = Add(clean, noisy) cache = Neg(words) }"""
_STEP = """%s (float[batch, 4, h, w] latents, float[batch, 4, h, w] source, float[batch, 1, h, w] region, float[batch, 4] words,
        float[batch, 4] cache, float t, float[4] c, float[batch, 4, h, w] noise,
        float[d, 3, 4] a, float[d, 4, 3] b, float[batch] gate%s) => (float[batch, 4, h, w] next, float[batch,
        4] next_cache)
    <float[4, 4] mix> {
        x = Transpose<perm=[0, 2, 3, 1]>(latents) bs = Shape(x) flat = Reshape(x, rows)
        y0 = MatMul(flat, mix) at = Transpose<perm=[0, 2, 1]>(a) low = MatMul(flat, at) g = Unsqueeze(gate, rest) gated = Mul(low, g)
        bt = Transpose<perm=[0, 2, 1]>(b) high = MatMul(gated, bt) y1 = Add(y0, high) y2 = Reshape(y1, bs)
        y3 = Transpose<perm=[0, 3, 1, 2]>(y2) inside = Mul(y3, region) tt = Mul(inside, t) s1 = Add(tt, source)
        %s
        wide = Unsqueeze(cond, spatial) m0 = Add(s1, wide) m = Tanh(m0)
        c1 = Gather(c, i1) c2 = Gather(c, i2) c3 = Gather(c, i3)
        p1 = Mul(latents, c1) p2 = Mul(m, c2) p3 = Mul(noise, c3) p12 = Add(p1, p2) next = Add(p12, p3)
        mean = ReduceMean<keepdims=0>(m, hw) half = Mul(cache, point5) next_cache = Add(half, mean) }"""
_GUIDED = "dw = Sub(words, base) gs = Unsqueeze(guidance, one_i) dg = Mul(dw, gs) cg = Add(base, dg) cond = Add(cg, cache)"
GRAPHS["step"] = _STEP % ("step", ", float[batch, 4] base, float[batch] guidance", _GUIDED)
GRAPHS["step_plain"] = _STEP % ("step_plain", "", "cond = Add(words, cache)")

CONSTANTS: dict[str, Any] = {
    "axis": np.array([1], np.int64), "last": np.array([-1], np.int64), "spatial": np.array([2, 3], np.int64),
    "hw": np.array([2, 3], np.int64), "rest": np.array([1, 2], np.int64), "one_i": np.array([1], np.int64),
    "level": np.float32(255), "point5": np.float32(0.5), "zero": np.float32(0), "one": np.float32(1),
    "i0": np.int64(0), "i1": np.int64(1), "i2": np.int64(2), "i3": np.int64(3), "rows": np.array([0, -1, 4], np.int64),
    "shape_a": np.array([-1, 3, 4], np.int64), "shape_b": np.array([-1, 4, 3], np.int64),
    "scales": np.array([1, 1, 4, 4], np.float32),
}  # fmt: skip


def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)

    def draw(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) * 0.5).astype(np.float32)

    return {
        "words.table": draw(300, 4), "marks.table": draw(300, 4), "encode.project": draw(3, 4), "generate.to_a": draw(4, 12),
        "generate.to_b": draw(4, 12), "final.back": np.abs(draw(4, 3)), "mix": draw(4, 4),
    }  # fmt: skip


def model(name: str) -> onnx.ModelProto:
    """One graph of the family."""
    graph = onnx.parser.parse_graph(GRAPHS.get(name, MIDWAY))
    values = weights()
    used = {i for node in graph.node for i in node.input}
    declared = [v.name for v in graph.value_info]
    del graph.value_info[:]
    for weight in declared or []:
        used.add(weight)
    made = {o for node in graph.node for o in node.output} | {i.name for i in graph.input}
    del graph.initializer[:]
    for key in sorted(used - made - {""}):
        array = CONSTANTS.get(key)
        if array is None:
            array = values.get(f"{name}.{key}", values.get(key))
        graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array), key))
    result = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(result)
    return result


def tokenizer() -> Tokenizer:
    """Bytes as tokens, no merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    result = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    result.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    result.decoder = decoders.ByteLevel()
    return result


def schedule(sampler_rows: int = 1) -> dict[str, np.ndarray]:
    """Sampler ``even`` takes 1 to 5 steps, ``wild`` 2 to 4 and makes 2N-1 rows with noise."""
    tables: dict[str, np.ndarray] = {}
    for name, counts, rows_of in (
        ("even", range(1, 6), lambda n: n),
        ("wild", range(2, 5), lambda n: 2 * n - 1),
    ):
        rng = np.random.default_rng(len(name))
        offsets, total = [0], 0
        for n in range(6):
            total += rows_of(n) if n in counts else 0
            offsets.append(total)
        tables[f"{name}.offsets"] = np.array(offsets, np.int64)
        tables[f"{name}.timesteps"] = rng.uniform(0.1, 1, total).astype(np.float32)
        coefficients = rng.uniform(0.3, 0.7, (total, 4)).astype(np.float32)
        if name == "even":
            coefficients[:, 3] = 0
        tables[f"{name}.coefficients"] = coefficients
        tables[f"{name}.initial_scale"] = np.linspace(1, 2, 6).astype(np.float32)
        tables[f"{name}.start"] = rng.uniform(0.2, 0.9, (total, 2)).astype(np.float32)
    return tables


def manifest_dict(files: dict[str, Any]) -> dict[str, Any]:
    """The manifest of the family as plain JSON values."""

    def graph(name: str) -> dict[str, Any]:
        dtypes = {1: "float32", 2: "uint8", 7: "int64"}
        axes = {"h": "latent_height", "w": "latent_width", "d": "delta_batch"}

        def values(side: Any) -> list[dict[str, Any]]:
            return [
                {
                    "name": v.name,
                    "dtype": dtypes[v.type.tensor_type.elem_type],
                    "shape": [
                        axes.get(d.dim_param, d.dim_param) or d.dim_value
                        for d in v.type.tensor_type.shape.dim
                    ],
                }
                for v in side
            ]

        parsed = onnx.parser.parse_graph(GRAPHS[name])
        return {"file": f"{name}.onnx", "inputs": values(parsed.input), "outputs": values(parsed.output)}

    latents = ["batch", 4, "latent_height", "latent_width"]
    step = {
        "latents": "latents", "source": "source", "region": "region", "words": "prompt.words", "cache": "cache",
        "t": "timestep", "c": "coefficients", "noise": "noise.step", "a": DELTAS[0], "b": DELTAS[1], "gate": "gate",
    }  # fmt: skip
    made = {"next": "latents.next", "next_cache": "cache.next"}
    return {
        "format": 1,
        "name": "made up",
        "family": None,
        "producer": {"name": "test", "version": "0"},
        "files": files,
        "axes": {
            "batch": {"min": 1, "max": 4},
            "delta_batch": {"min": 1, "max": 4, "one_or": "batch"},
            "height": {"min": 8, "max": 64, "multiple": 8},
            "width": {"min": 8, "max": 64, "multiple": 8},
            "latent_height": {"of": "height", "divide": 4},
            "latent_width": {"of": "width", "divide": 4},
        },
        "tensors": {
            "image": {"dtype": "uint8", "shape": ["batch", "height", "width", 3], "source": "image"},
            "ids.words": {"dtype": "int64", "shape": ["batch", 8], "source": "text", "text": "prompt", "tokenizer": "long"},
            "ids.base": {"dtype": "int64", "shape": ["batch", 8], "source": "text", "constant": "base", "tokenizer": "long"},
            "ids.marks": {"dtype": "int64", "shape": ["batch", 6], "source": "text", "text": "prompt", "tokenizer": "short"},
            "ids.marks.mask": {"dtype": "int64", "shape": ["batch", 6], "source": "mask", "of": "ids.marks"},
            "noise.initial": {"dtype": "float32", "shape": latents, "source": "noise", "draw": "initial"},
            "noise.step": {"dtype": "float32", "shape": latents, "source": "noise", "draw": "step"},
            "initial_scale": {"dtype": "float32", "shape": [], "source": "schedule", "column": "initial_scale"},
            "timestep": {"dtype": "float32", "shape": [], "source": "schedule", "column": "timesteps"},
            "coefficients": {"dtype": "float32", "shape": [4], "source": "schedule", "column": "coefficients"},
            "guidance.text": {"dtype": "float32", "shape": ["batch"], "source": "guidance", "guidance": "text"},
            "gate": {"dtype": "float32", "shape": ["batch"], "source": "gate"},
            "region": {"dtype": "float32", "shape": ["batch", 1, *latents[2:]], "source": "input"},
        },
        "graphs": {name: graph(name) for name in GRAPHS},
        "program": [
            {"graph": "words", "phase": "load", "inputs": {"ids": "ids.base"}, "outputs": {"hidden": "base.words"}},
            {"graph": "words", "phase": "request", "inputs": {"ids": "ids.words"}, "outputs": {"hidden": "prompt.words"}},
            {"graph": "marks", "phase": "request", "inputs": {"ids": "ids.marks", "mask": "ids.marks.mask"},
             "outputs": {"hidden": "prompt.marks"}},
            {"graph": "encode", "phase": "request", "outputs": {"latents": "source"}},
            {"graph": "generate", "phase": "request", "inputs": {"words": "prompt.words", "marks": "prompt.marks"},
             "outputs": {"a": DELTAS[0], "b": DELTAS[1]}, "implementation": {"file": "generator.py", "class": "Generator"}},
            {"graph": "prepare", "phase": "request",
             "inputs": {"noise": "noise.initial", "scale": "initial_scale", "words": "prompt.words"},
             "outputs": {"latents": "latents.initial", "cache": "cache.initial"}},
            {"graph": "step", "phase": "step", "guided": True, "inputs": {**step, "base": "base.words", "guidance": "guidance.text"}, "outputs": made},
            {"graph": "step_plain", "phase": "step", "guided": False, "inputs": step, "outputs": made},
            {"graph": "final", "phase": "final", "outputs": {"image": "edited"}},
        ],
        "results": {"image": "edited", "deltas": list(DELTAS)},
        "state": [
            {"tensor": "latents", "next": "latents.next", "initial": "latents.initial"},
            {"tensor": "cache", "next": "cache.next", "initial": "cache.initial"},
        ],
        "schedules": {
            "file": "schedule.safetensors", "default": "even", "default_steps": 3,
            "samplers": {"even": {"class": "Even", "steps": [1, 5]}, "wild": {"class": "Wild", "steps": [2, 4], "stochastic": True}},
        },
        "guidance": [{"name": "text", "default": 2.0, "above": 1.0}],
        "image": {"tensor": "image", "multiple": 8, "min": 8, "max": 64, "default_area": 1024},
        "deltas": {
            "rank": RANK, "gate": "gate", "axis": "delta_batch",
            "targets": [{"module": "mix", "kind": "linear", "in": 4, "out": 4, "rank": RANK}],
        },
        "tokenizers": {
            "long": {"file": "tokenizer/tokenizer.json", "max_length": 8, "pad_id": 256},
            "short": {"file": "tokenizer/tokenizer.json", "max_length": 6, "pad_id": 257, "pad_side": "left"},
        },
        "sources": {"toy": {"name": "toy", "licence": "Apache-2.0"}},
        "licences": [{"of": "toy", "licence": "Apache-2.0"}],
    }  # fmt: skip


def write_bundle(path: Path) -> Manifest:
    """Writes the bundle and gives its manifest."""
    (path / "tokenizer").mkdir(parents=True)
    tokenizer().save(str(path / "tokenizer/tokenizer.json"))
    save_file(schedule(), path / "schedule.safetensors")
    for name in GRAPHS:
        onnx.save(model(name), path / f"{name}.onnx")
    manifest = Manifest.from_dict(manifest_dict(list_files(path)))
    (path / "manifest.json").write_text(manifest.dumps())
    return manifest


def write_midway(path: Path, default: float = 0.6) -> None:
    """The same, but edits start from the photo's latents; Wild makes two rows of a step."""
    write_bundle(path)
    onnx.save(model("depart"), path / "depart.onnx")

    def change(m: dict[str, Any]) -> None:
        latents = m["tensors"]["noise.initial"]["shape"]
        words = {"name": "words", "dtype": "float32", "shape": ["batch", 4]}
        inputs = [
            {"name": "noise", "dtype": "float32", "shape": latents}, {"name": "source", "dtype": "float32", "shape": latents},
            {"name": "start", "dtype": "float32", "shape": [2]}, words,
        ]  # fmt: skip
        outputs = [{"name": "latents", "dtype": "float32", "shape": latents}, {**words, "name": "cache"}]
        del m["graphs"]["prepare"], m["tensors"]["initial_scale"], m["files"]["prepare.onnx"]
        m["graphs"]["depart"] = {"file": "depart.onnx", "inputs": inputs, "outputs": outputs}
        m["tensors"]["start"] = {"dtype": "float32", "shape": [2], "source": "schedule", "column": "start"}
        (call,) = (call for call in m["program"] if call["graph"] == "prepare")
        call["graph"], call["inputs"] = "depart", {"noise": "noise.initial", "words": "prompt.words"}
        m["schedules"]["strength"] = {"default": default}
        for name, order in (("even", 1), ("wild", 2)):
            m["schedules"]["samplers"][name]["order"] = order

    rewrite(path, change)


def list_files(path: Path) -> dict[str, Any]:
    return {
        file.relative_to(path).as_posix(): {
            "size": file.stat().st_size,
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        }
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.name != "manifest.json"
    }


def distil(manifest: Any) -> None:
    """What the guided step reads is a scale of its own, without a condition."""
    manifest["guidance"].append({"name": "distilled", "default": 3.0})
    manifest["tensors"]["guidance.text"]["guidance"] = "distilled"


def rewrite(path: Path, change: Any) -> None:
    """Applies ``change`` to the manifest of a bundle, and brings sizes and hashes up to date."""
    value = json.loads((path / "manifest.json").read_text())
    value["files"] = list_files(path)
    change(value)
    (path / "manifest.json").write_text(json.dumps(value))


def token_ids(text: str, length: int, pad: int, left: bool = False) -> tuple[np.ndarray, np.ndarray]:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    to_unicode = _bytes_to_unicode()
    ids = [alphabet.index(to_unicode[b]) for b in text.encode()][:length]
    fill, one = [pad] * (length - len(ids)), [1] * len(ids)
    zero = [0] * len(fill)
    return np.array(fill + ids if left else ids + fill), np.array(zero + one if left else one + zero)


def _bytes_to_unicode() -> dict[int, str]:
    """The byte alphabet of GPT-2."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(rest)}


def reference(
    image: np.ndarray,
    prompt: str,
    region: np.ndarray,
    noise: np.ndarray,
    *,
    sampler: str = "even",
    steps: int = 3,
    guidance: float = 2.0,
    gate: float = 1.0,
    step_noise: np.ndarray | None = None,
    deltas: Any = None,
    start: int | None = None,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """One sample of the program in NumPy: the picture and the deltas. ``noise`` is the unit initial noise [4, h, w].

    ``start`` is the first row, counted from the step count's, of a bundle that starts midway.
    """
    w, table = weights(), schedule()
    words = w["words.table"][token_ids(prompt, 8, 256)[0]].mean(0)
    base = w["words.table"][token_ids("base", 8, 256)[0]].mean(0)
    ids, mask = token_ids(prompt, 6, 257, left=True)
    marks = (w["marks.table"][ids] * mask[:, None]).sum(0)
    height, width = image.shape[:2]
    projected = (image.astype(np.float32) / 255) @ w["encode.project"]
    source = projected.reshape(height // 4, 4, width // 4, 4, 4).mean((1, 3)).transpose(2, 0, 1)
    a = (words @ w["generate.to_a"]).reshape(3, 4)
    b = (marks @ w["generate.to_b"]).reshape(4, 3)
    made = {DELTAS[0]: a[None], DELTAS[1]: b[None]}
    if deltas is not None:
        a, b = deltas[DELTAS[0]][0], deltas[DELTAS[1]][0]
    x, cache = noise * table[f"{sampler}.initial_scale"][steps], -words
    first, last = table[f"{sampler}.offsets"][steps : steps + 2]
    if start is not None:
        first += start
        clean, noisy = table[f"{sampler}.start"][first]
        x = clean * source + noisy * noise
    for k, row in enumerate(range(first, last)):
        flat = x.transpose(1, 2, 0)
        y = flat @ w["mix"] + gate * (flat @ a.T) @ b.T
        condition = (base + guidance * (words - base) if guidance > 1 else words) + cache
        m = np.tanh(
            y.transpose(2, 0, 1) * region * table[f"{sampler}.timesteps"][row]
            + source
            + condition[:, None, None]
        )
        c = table[f"{sampler}.coefficients"][row]
        x = c[1] * x + c[2] * m + (c[3] * step_noise[k] if step_noise is not None else 0)
        cache = 0.5 * cache + m.mean((1, 2))
    s = 1 / (1 + np.exp(-(x + cache[:, None, None])))
    up = s.repeat(4, 1).repeat(4, 2).transpose(1, 2, 0)
    return np.round(np.clip(up @ w["final.back"], 0, 1) * 255).astype(np.uint8), made
