"""Reading, refusing and writing manifests."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import os
import re
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import toy_bundle
from hypothesis import given, settings
from hypothesis import strategies as st

import hywu_runtime
from hywu_runtime import Manifest, codec
from hywu_runtime import manifest as manifest_module
from hywu_runtime.errors import BundleError, HywuError
from hywu_runtime.manifest import Guidance, ProvidedTensor, is_guided, is_safe_path

FILES = {
    name: {"size": 10, "sha256": "0" * 64}
    for name in [
        *(f"{graph}.onnx" for graph in toy_bundle.GRAPHS),
        "schedule.safetensors",
        "tokenizer/tokenizer.json",
    ]
}
SCHEMA = json.loads((Path(hywu_runtime.__file__).parent / "manifest.schema.json").read_text())
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


def valid() -> dict[str, Any]:
    value = toy_bundle.manifest_dict(copy.deepcopy(FILES))
    value["sources"]["toy"]["files"] = {"unet/model.safetensors": {"size": 1000, "header_sha256": "1" * 64}}
    value["linked"] = {
        "step.onnx": {
            "mix": {
                "source": "toy",
                "file": "unet/model.safetensors",
                "offset": 200,
                "length": 32,
                "dtype": "bfloat16",
                "shape": [4, 4],
            }
        }
    }
    value["variants"] = {"fp16": {"precision": "fp16", "graphs": {"step": "step_plain.onnx"}}}
    value["engines"] = {
        "one": {
            "backend": "tensorrt-rtx",
            "version": "1.7.1.116",
            "compute_capabilities": ["8.6", "12.0"],
            "shapes": {"batch": [1, 1, 4]},
            "graphs": {"step": "step.onnx"},
            "sources": {"step.onnx": "0" * 64},
            "variant": "fp16",
        }
    }
    value["x-note"] = {"anything": [1, None]}
    return value


def test_round_trip_is_deterministic(tmp_path: Path) -> None:
    manifest = Manifest.from_dict(valid())
    text = manifest.dumps()
    (tmp_path / "manifest.json").write_text(text)
    again = Manifest.read(tmp_path)
    assert again == manifest
    assert again == Manifest.read(tmp_path / "manifest.json")
    assert again.dumps() == text
    VALIDATOR.validate(json.loads(text))


def test_schema_is_a_schema_and_takes_the_example() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    VALIDATOR.validate(valid())


# Each change, and a word of the message. `schema` says whether a JSON schema can see it too.
BAD: list[tuple[str, Any, str, bool]] = [
    ("format 2", lambda m: m.update(format=2), "format 1", True),
    ("format true", lambda m: m.update(format=True), "format", True),
    ("no format", lambda m: m.pop("format"), "format", True),
    ("no axes", lambda m: m.pop("axes"), "`axes` is missing", True),
    ("unknown key", lambda m: m.update(colour=1), "colour", True),
    ("unknown key inside", lambda m: m["graphs"]["step"].update(colour=1), "colour", True),
    ("null", lambda m: m.update(program=None), "program", True),
    ("string for array", lambda m: m.update(program="x"), "program", True),
    ("float size", lambda m: m["files"]["step.onnx"].update(size=1.5), "size", True),
    ("bool size", lambda m: m["files"]["step.onnx"].update(size=True), "size", True),
    ("negative size", lambda m: m["files"]["step.onnx"].update(size=-1), "size", True),
    ("huge integer", lambda m: m["files"]["step.onnx"].update(size=10**40), "size", True),
    ("short hash", lambda m: m["files"]["step.onnx"].update(sha256="ab"), "sha256", True),
    ("unknown dtype", lambda m: m["tensors"]["gate"].update(dtype="float8"), "dtype", True),
    ("unknown source", lambda m: m["tensors"]["gate"].update(source="magic"), "source", True),
    ("unknown phase", lambda m: m["program"][0].update(phase="later"), "phase", True),
    ("unknown draw", lambda m: m["tensors"]["noise.step"].update(draw="never"), "draw", True),
    ("unknown kind", lambda m: m["deltas"]["targets"][0].update(kind="lokr"), "kind", True),
    ("zero dimension", lambda m: m["tensors"]["gate"].update(shape=["batch", 0]), "shape", True),
    ("nine dimensions", lambda m: m["graphs"]["step"]["inputs"][0].update(shape=[1] * 9), "shape", True),
    ("axis of both forms", lambda m: m["axes"]["height"].update(of="width", divide=2), "axes", True),
    ("guidance with two conditions", lambda m: m["guidance"][0].update(at_least=1), "guidance[0]", True),
    ("escape", lambda m: m["graphs"]["step"].update(file="../step.onnx"), "file", True),
    ("absolute", lambda m: m["graphs"]["step"].update(file="/etc/passwd"), "file", True),
    ("hidden escape", lambda m: m["files"].update({"a/../../b": FILES["step.onnx"]}), "files", True),
    ("not listed", lambda m: m["files"].pop("step.onnx"), "step.onnx", False),
    (
        "lists itself",
        lambda m: m["files"].update({"manifest.json": FILES["step.onnx"]}),
        "manifest.json",
        False,
    ),
    ("undefined graph", lambda m: m["program"][0].update(graph="ghost"), "ghost", False),
    ("undefined axis", lambda m: m["tensors"]["gate"].update(shape=["batches"]), "batches", False),
    ("undefined port", lambda m: m["program"][0]["inputs"].update(ghost="gate"), "ghost", False),
    ("read before made", lambda m: m["program"].insert(0, m["program"].pop(5)), "nothing makes", False),
    ("never made", lambda m: m["program"][2]["inputs"].update(mask="ghost"), "ghost", False),
    ("two producers", lambda m: m["program"].append(dict(m["program"][4])), "one producer", False),
    ("both guided", lambda m: m["program"][7].pop("guided"), "one producer", False),
    ("overwrites provided", lambda m: m["program"][3]["outputs"].update(latents="gate"), "gate", False),
    (
        "dtype differs",
        lambda m: m["graphs"]["marks"]["inputs"][0].update(dtype="int32"),
        "equal dtypes",
        False,
    ),
    (
        "shape differs",
        lambda m: m["graphs"]["prepare"]["inputs"][2].update(shape=["batch", 5]),
        "equal shapes",
        False,
    ),
    (
        "rank differs",
        lambda m: m["graphs"]["prepare"]["inputs"][2].update(shape=["batch"]),
        "equal shapes",
        False,
    ),
    ("load reads prompt", lambda m: m["program"][0]["inputs"].update(ids="ids.words"), "load phase", False),
    (
        "request reads step",
        lambda m: m["program"][5]["inputs"].update(noise="noise.step"),
        "step phase",
        False,
    ),
    (
        "request reads state",
        lambda m: m["program"][5]["inputs"].update(words="cache"),
        "before the steps",
        False,
    ),
    ("state from nowhere", lambda m: m["state"][0].update(next="source"), "state[0].next", False),
    ("state of nothing", lambda m: m["state"][0].update(next="ghost"), "ghost", False),
    ("state is a delta", lambda m: m["state"][0].update(tensor="mix.lora_A"), "state[0].tensor", False),
    ("derived batch", lambda m: m["axes"].update(batch={"of": "height", "divide": 8}), "axes", False),
    ("state initial", lambda m: m["state"][0].update(initial="latents.next"), "initial", False),
    (
        "state initial shape",
        lambda m: m["state"][1].update(initial={"zeros": ["batch", 3]}),
        "equal shapes",
        False,
    ),
    ("state twice", lambda m: m["state"].append(m["state"][0]), "state", False),
    ("no results", lambda m: m.update(results={}), "results", False),
    ("result not made", lambda m: m["results"].update(image="image"), "results.image", False),
    ("result of wrong type", lambda m: m["results"].update(image="source"), "uint8", False),
    ("output not made", lambda m: m["results"].update(outputs=["image"]), "results.outputs[0]", False),
    ("output twice", lambda m: m["results"].update(outputs=["source"] * 2), "results.outputs[1]", False),
    ("result no delta", lambda m: m["results"].update(deltas=["source"]), "deltas", False),
    (
        "result of guided requests alone",
        lambda m: m["program"][8].update(guided=True),
        "results.image",
        False,
    ),
    ("no such sampler", lambda m: m["schedules"].update(default="ghost"), "ghost", False),
    ("default steps", lambda m: m["schedules"].update(default_steps=99), "default_steps", False),
    ("no schedules", lambda m: m.pop("schedules"), "schedules", False),
    ("no strength", lambda m: m["schedules"].update(strength={"default": 0}), "at most 1", True),
    ("strength above 1", lambda m: m["schedules"].update(strength={"default": 1.1}), "at most 1", True),
    ("strength of no step", lambda m: m["schedules"].update(strength={"default": 0.5}), "order", False),
    ("start of no row", lambda m: m["tensors"]["initial_scale"].update(column="start"), "strength", False),
    (
        "start of a number",
        lambda m: (
            m["schedules"].update(strength={"default": 1}),
            m["tensors"]["initial_scale"].update(column="start"),
        ),
        "shape",
        False,
    ),
    ("no such tokenizer", lambda m: m["tensors"]["ids.base"].update(tokenizer="ghost"), "ghost", False),
    ("no place for the text", lambda m: m["tokenizers"]["long"].update(template="none"), "template", True),
    ("two places", lambda m: m["tokenizers"]["long"].update(template="{} or {}"), "template", False),
    ("wrong text length", lambda m: m["tensors"]["ids.base"].update(shape=["batch", 9]), "shape", False),
    ("text and constant", lambda m: m["tensors"]["ids.base"].update(text="prompt"), "exactly one", False),
    ("stray key", lambda m: m["tensors"]["gate"].update(draw="step"), "draw", False),
    ("mask of no text", lambda m: m["tensors"]["ids.marks.mask"].update(of="gate"), "text", False),
    ("no such guidance", lambda m: m["tensors"]["guidance.text"].update(guidance="ghost"), "ghost", False),
    ("guidance twice", lambda m: m["guidance"].append(m["guidance"][0]), "guidance[1]", False),
    ("gate is none", lambda m: m["deltas"].update(gate="image"), "gate", False),
    ("target twice", lambda m: m["deltas"]["targets"].append(m["deltas"]["targets"][0]), "repeats", False),
    ("target rank", lambda m: m["deltas"]["targets"][0].update(rank=4), "rank", False),
    ("experts without number", lambda m: m["deltas"]["targets"][0].update(kind="experts"), "experts", False),
    ("experts of a linear layer", lambda m: m["deltas"]["targets"][0].update(experts=4), "experts", False),
    ("conv without kernel", lambda m: m["deltas"]["targets"][0].update(kind="conv"), "kernel", False),
    ("axis circle", lambda m: m["axes"].update(height={"of": "latent_height", "divide": 1}), "axes", False),
    ("indivisible", lambda m: m["axes"]["latent_height"].update(divide=3), "divide", False),
    ("sum and limits", lambda m: m["axes"]["height"].update(sum=[{"times": 2}]), "mixes", True),
    ("sum of nothing", lambda m: m["axes"].update(n={"sum": [{"of": ["ghost"]}]}), "ghost", False),
    ("sum of derived", lambda m: m["axes"].update(n={"sum": [{"of": ["latent_height"]}]}), "derived", False),
    ("sum that rounds", lambda m: m["axes"].update(n={"sum": [{"times": 3, "divide": 2}]}), "divide", False),
    (
        "sum too large",
        lambda m: m["axes"].update(n={"sum": [{"of": ["batch"], "times": 2**31 - 1}] * 17}),
        "sum",
        True,
    ),
    ("term of five", lambda m: m["axes"].update(n={"sum": [{"of": ["batch"] * 5}]}), "4 names", True),
    ("stage", lambda m: m["graphs"]["step"].update(stage=256), "stage", True),
    ("min above max", lambda m: m["axes"]["batch"].update(min=9), "min", False),
    ("image is none", lambda m: m["image"].update(tensor="gate"), "image", False),
    ("image without sizes", lambda m: m["image"].update(min=9, max=15), "multiple", False),
    ("sizes off the limits", lambda m: m["image"].update(sizes=[[8, 8], [8, 72]]), "image.sizes[1]", False),
    ("sizes off the multiple", lambda m: m["image"].update(sizes=[[12, 8]]), "multiples of 8", False),
    ("size of three", lambda m: m["image"].update(sizes=[[8, 8, 8]]), "a width and a height", True),
    ("sizes of no pair", lambda m: m["image"].update(sizes=[8]), "image.sizes[0]", True),
    ("link to nowhere", lambda m: m["linked"]["step.onnx"]["mix"].update(source="ghost"), "ghost", False),
    ("link past the end", lambda m: m["linked"]["step.onnx"]["mix"].update(offset=990), "offset", False),
    ("link length", lambda m: m["linked"]["step.onnx"]["mix"].update(length=33), "length", False),
    ("link of no graph", lambda m: m["linked"].update({"tokenizer/tokenizer.json": {}}), "linked", False),
    ("variant graph", lambda m: m["variants"]["fp16"]["graphs"].update(ghost="step.onnx"), "ghost", False),
    ("precision", lambda m: m["variants"]["fp16"].update(precision="fp8"), "precision", True),
    ("report of nothing", lambda m: m["variants"]["fp16"].update(report="r.json"), "r.json", False),
    ("engine graph", lambda m: m["engines"]["one"]["graphs"].update(ghost="step.onnx"), "ghost", False),
    ("engine file", lambda m: m["engines"]["one"]["graphs"].update(step="s.plan"), "s.plan", False),
    ("engine backend", lambda m: m["engines"]["one"].update(backend="ort-cpu"), "backend", True),
    ("no capability", lambda m: m["engines"]["one"].update(compute_capabilities=[]), "capabilit", True),
    ("capability", lambda m: m["engines"]["one"].update(compute_capabilities=["sm86"]), "capabilit", True),
    ("engine axis", lambda m: m["engines"]["one"]["shapes"].update(ghost=[1, 1, 1]), "ghost", False),
    ("derived axis", lambda m: m["engines"]["one"]["shapes"].update(latent_height=[1, 1, 1]), "der", False),
    ("engine sizes", lambda m: m["engines"]["one"]["shapes"].update(batch=[1, 1, 99]), "batch", False),
    ("engine range", lambda m: m["engines"]["one"]["shapes"].update(batch=[2, 1, 4]), "batch", False),
    ("engine digest", lambda m: m["engines"]["one"]["sources"].update({"a": "b"}), "sources", True),
    ("licence of nothing", lambda m: m["licences"][0].update(of="ghost"), "ghost", False),
    ("too large", lambda m: m["graphs"]["step"]["inputs"][0].update(shape=[2**31 - 1] * 8), "shape", False),
]


@pytest.mark.parametrize(
    ("change", "word", "schema"), [case[1:] for case in BAD], ids=[case[0] for case in BAD]
)
def test_refused(change: Any, word: str, schema: bool) -> None:
    value = valid()
    change(value)
    with pytest.raises(BundleError) as caught:
        Manifest.from_dict(json.loads(json.dumps(value)))
    assert word in str(caught.value)
    assert caught.value.expected
    assert caught.value.remedy
    assert VALIDATOR.is_valid(value) is not schema


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"\xff\xfe",
        b'{"format": NaN}',
        b'{"format": 1, "format": 1}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"format": ' + b"1" * 10_000 + b"}",
        b'{"format": 1e999}',
        b'"\\ud800"',
        b'{"format": 1}',
    ],
)
def test_text_that_is_no_manifest(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(text)
    with pytest.raises(BundleError):
        Manifest.read(tmp_path)


@pytest.mark.parametrize(
    ("note", "fine"),
    [
        (b"[1e300, -0.0]", True),
        (rb'"\ud83d\ude00"', True),
        (b"1e999", False),
        (b"9" * 400, False),
        (b"NaN", False),
        (rb'"\ud800"', False),
        (rb'{"\udc00": 1}', False),
        (rb'"\ude00\ud83d"', False),
    ],
)
def test_what_other_json_readers_refuse_is_refused_where_it_is_ignored_too(
    tmp_path: Path, note: bytes, fine: bool
) -> None:
    text = json.dumps(valid() | {"x-note": "?"}).encode()
    (tmp_path / "manifest.json").write_bytes(text.replace(b'"?"', note))
    with contextlib.nullcontext() if fine else pytest.raises(BundleError, match="not valid JSON"):
        Manifest.read(tmp_path)


def test_nothing_there(tmp_path: Path) -> None:
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe/manifest.json")
    for path in (tmp_path, tmp_path / "ghost", "a\0b", tmp_path / "pipe"):
        with pytest.raises(BundleError):
            Manifest.read(path)


def test_a_large_program_is_read_in_linear_time() -> None:
    value = valid()
    for i in range(20_000):
        value["program"].insert(
            4, {"graph": "encode", "phase": "request", "inputs": {}, "outputs": {"latents": f"copy{i}"}}
        )
    start = time.perf_counter()
    Manifest.from_dict(value)
    assert time.perf_counter() - start < 5


def test_a_short_manifest_cannot_make_a_long_program() -> None:
    value = valid()
    value["program"] += [{"graph": "step", "phase": "step", "guided": True}] * 100_000
    with pytest.raises(BundleError, match="2\\^20"):
        Manifest.from_dict(value)


@pytest.mark.parametrize(
    ("path", "safe"),
    [
        ("a.onnx", True),
        ("weights/a-b_c.1.safetensors", True),
        ("..a/b..c", True),
        ("", False),
        ("/a", False),
        ("a/", False),
        ("a//b", False),
        ("./a", False),
        ("a/./b", False),
        ("..", False),
        ("a/..", False),
        ("a\\b", False),
        ("C:/a", False),
        ("c:a", False),
        ("a\0b", False),
        ("a\nb", False),
        ("a ", False),
        ("x" * 2000, False),
        ("\ud800", False),
    ],
)
def test_safe_paths(path: str, safe: bool) -> None:
    assert is_safe_path(path) is safe


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    children = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    return [path, *(place for key, child in children for place in _places(child, (*path, key)))]


PLACES = _places(valid())[1:]
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
    | st.sampled_from(
        ["batch", "height", "latents", "step", "words", "image", "gate", "..", "load", "final", "float32"]
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=400, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(PLACES), st.sampled_from(["set", "drop", "copy"]), JSON),
        min_size=1,
        max_size=3,
    ),
    st.data(),
)
def test_mutations_give_a_manifest_or_our_error(
    changes: list[tuple[Any, str, Any]], data: st.DataObject
) -> None:
    value = valid()
    for place, action, new in changes:
        holder: Any = value
        try:
            for key in place[:-1]:
                holder = holder[key]
            if action == "drop":
                del holder[place[-1]]
            elif action == "set":
                holder[place[-1]] = new
            else:
                other: Any = value
                for key in data.draw(st.sampled_from(PLACES)):
                    other = other[key]
                holder[place[-1]] = copy.deepcopy(other)
        except (KeyError, IndexError, TypeError):
            pass  # an earlier change took the place away
    try:
        manifest = Manifest.from_dict(value)
    except HywuError:
        return
    assert Manifest.from_dict(manifest.to_dict()) == manifest
    VALIDATOR.validate(value)  # the schema is no stricter than the reader


def test_examples_of_the_documentation_are_of_the_format() -> None:
    text = (Path(__file__).parents[2] / "docs/bundle.md").read_text(encoding="utf-8")
    fields = codec._fields(Manifest)
    hints = {key: hint for key, hint, _ in fields.values()}
    seen = set()
    for block in re.findall(r"```json\n(.*?)```", text, re.DOTALL):
        for key, value in json.loads("{" + block + "}").items():
            codec.decode(ProvidedTensor if "source" in value else hints[key], value, key)
            seen.add(key)
    assert {
        "axes",
        "graphs",
        "program",
        "state",
        "guidance",
        "schedules",
        "image",
        "deltas",
        "tokenizers",
        "linked",
    } <= seen
    table = set(re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| (?:int|str|object|array)", text, re.MULTILINE))
    documented = {name for row in table for name in re.findall(r"`(\w+)`", row)}
    assert documented == set(hints)


def test_schema_has_the_keys_of_the_dataclasses() -> None:
    kinds = {"manifest": Manifest} | {
        kind.__name__[0].lower() + kind.__name__[1:]: kind
        for kind in vars(manifest_module).values()
        if dataclasses.is_dataclass(kind) and isinstance(kind, type) and kind is not Manifest
    }
    kinds.pop("rule")
    for name, kind in kinds.items():
        part = SCHEMA if name == "manifest" else SCHEMA["$defs"][name]
        fields = codec._fields(kind)
        assert set(part["properties"]) == {key for key, _, _ in fields.values()}, name
        required = {key for key, _, default in fields.values() if default is dataclasses.MISSING}
        assert set(part.get("required", [])) == required, name


def test_sizes_are_written_and_read() -> None:
    value = valid()
    value["image"]["sizes"] = [[8, 64], [64, 8]]
    VALIDATOR.validate(value)
    manifest = Manifest.from_dict(value)
    assert manifest.image is not None
    assert manifest.image.sizes == ((8, 64), (64, 8))
    assert manifest.to_dict()["image"] == value["image"]


def test_scales_without_a_condition_decide_nothing() -> None:
    text, image = Guidance("text", 7.5, above=1.0), Guidance("image", 1.5, at_least=1.0)
    distilled = Guidance("distilled", 2.5)
    assert is_guided([text, image, distilled])
    assert not is_guided([distilled])
    assert not is_guided([])
    scales = {"text": [0.5, 1.5], "image": [1.0, 0.5], "distilled": [0.0, 0.0]}
    assert is_guided([text, image, distilled], scales)  # each by another sample
    assert not is_guided([text, image, distilled], scales | {"image": [0.5, 0.5]})
    assert not is_guided([text, distilled], {"text": [1.0], "distilled": [9.0]})


def test_with_no_condition_there_is_one_form() -> None:
    value = valid()
    value["guidance"][0] = {"name": "text", "default": 3.5}
    VALIDATOR.validate(value)
    unguided = [call for call in value["program"] if not call.get("guided")]
    manifest = Manifest.from_dict({**value, "program": unguided})
    assert manifest.guidance == (Guidance("text", 3.5),)
    for call in unguided:  # in either form's calls alone, nothing makes the carried tensors
        call.pop("guided", None)
    assert Manifest.from_dict({**value, "program": unguided}).program[-2].guided is None


def test_without_guidance_there_is_one_form() -> None:
    value = valid()
    value["guidance"] = []
    value["program"] = [call for call in value["program"] if not call.get("guided")]
    del value["tensors"]["guidance.text"]
    assert Manifest.from_dict(value).program[-2].guided is False


def generator_alone(output: dict[str, Any]) -> dict[str, Any]:
    """A manifest that only generates, with one output and without a `deltas` section."""
    condition = {"name": "condition", "dtype": "float32", "shape": ["batch", 4, 6]}
    return {
        "format": 1,
        "name": "generator",
        "family": None,
        "producer": {"name": "test", "version": "0"},
        "files": {"generator.onnx": {"size": 1, "sha256": "0" * 64}},
        "axes": {"batch": {"min": 1, "max": 4}},
        "tensors": {"condition": {"dtype": "float32", "shape": condition["shape"], "source": "input"}},
        "graphs": {"generator": {"file": "generator.onnx", "inputs": [condition], "outputs": [output]}},
        "program": [{"graph": "generator", "phase": "request"}],
        "results": {"deltas": [output["name"]]},
    }


def test_a_generator_alone_needs_no_delta_section() -> None:
    experts = {"name": "mlp.experts.w1.lora_A", "dtype": "float32", "shape": ["batch", 3, 2, 6]}
    assert Manifest.from_dict(generator_alone(experts)).results.deltas == ("mlp.experts.w1.lora_A",)
    for change, message in (
        ({"name": "mlp.weights"}, r"\.lora_A"),
        ({"dtype": "float16"}, "float32"),
        ({"shape": ["batch", 6]}, "3 axes"),
    ):
        with pytest.raises(BundleError, match=message):
            Manifest.from_dict(generator_alone(experts | change))
