"""The C++ core against the Python runtime: the same files in, the same values or the same messages out."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import hashlib
import itertools
import json
import os
import random
import shutil
import struct
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from core_probe import Probe
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save, save_file

sys.path.insert(0, str(Path(__file__).parents[1] / "runtime"))
import test_runtime_bundle
import test_runtime_manifest
import toy_bundle

from hywu_runtime import Bundle, Deltas, Manifest, codec, engines, noise
from hywu_runtime.engines import Target
from hywu_runtime.errors import HywuError
from hywu_runtime.manifest import DeltaSpec, DeltaTarget, Sampler, Schedules, Strength, is_safe_path
from hywu_runtime.schedule import Schedule

NOBODY = 65534  # the user without rights
SLOW_IS_FINE = settings(deadline=None, suppress_health_check=list(HealthCheck))


def python(ask: Callable[[], Any]) -> dict[str, Any]:
    """What the Python runtime answers, in the form of the probe's answers."""
    try:
        return {"ok": ask()}
    except HywuError as error:
        return {
            "error": type(error).__name__,
            "wrong": error.wrong,
            "expected": error.expected,
            "remedy": error.remedy,
            "text": str(error),
        }


def cut(answer: dict[str, Any]) -> dict[str, Any]:
    """Without the reason that a JSON parser, the safetensors library or the system gives in its own words."""
    for word in ("cannot be read as deltas", "cannot be read:", "cannot be mapped:", "is not valid JSON"):
        if "error" in answer and word in answer["wrong"]:
            wrong = answer["wrong"].split(word)[0] + word
            return {key: wrong if key == "wrong" else answer[key] for key in ("error", "wrong", "remedy")}
    return answer


def same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert cut(found) == cut(expected)


# Manifests


def described(manifest: Manifest) -> dict[str, Any]:
    """Everything that a manifest says, and what follows from it."""
    value = dataclasses.asdict(manifest)
    value["signatures"] = {name: dataclasses.asdict(v) for name, v in manifest.signatures.items()}
    value["stale"] = {name: manifest.stale(name) for name in manifest.engines}
    value["calls"] = [
        [list(side.items()) for side in (manifest.reads(call), manifest.writes(call))]
        for call in manifest.program
    ]
    plain: dict[str, Any] = json.loads(json.dumps(value))  # tuples become lists
    return plain


@pytest.fixture(scope="module")
def compare(probe: Probe, tmp_path_factory: pytest.TempPathFactory) -> Callable[[bytes], dict[str, Any]]:
    """Reads a manifest's text with both, and gives Python's answer."""
    path = tmp_path_factory.mktemp("manifest") / "manifest.json"

    def compare(text: bytes) -> dict[str, Any]:
        path.write_bytes(text)
        expected = python(lambda: described(Manifest.read(path)))
        same(probe("manifest", path=str(path)), expected)
        return expected

    return compare


Compare = Callable[[bytes], dict[str, Any]]


def test_a_manifest_is_read_alike(compare: Compare) -> None:
    value = test_runtime_manifest.valid()
    value["name"] = "ünïcode \N{GRINNING FACE} \x7f"
    value["axes"]["ширина"] = {"min": 1, "max": 2}
    assert "ok" in compare(json.dumps(value).encode())
    assert "ok" in compare(json.dumps(value, ensure_ascii=False, indent=3).encode())


@pytest.mark.parametrize("change", [case[1] for case in test_runtime_manifest.BAD])
def test_manifests_are_refused_alike(compare: Compare, change: Any) -> None:
    value = test_runtime_manifest.valid()
    change(value)
    assert "error" in compare(json.dumps(value).encode())


# Texts that are no manifests, and numbers and strings at their limits.
@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"\xff\xfe",
        b"\xef\xbb\xbf{}",
        b"{}\0",
        b'{"format": NaN}',
        b'{"format": -Infinity}',
        b'{"format": 1, "format": 1}',
        b'{"format": 1, "\\u0066ormat": 1}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"format": ' + b"1" * 10_000 + b"}",
        b'{"format": ' + b"1" * 305 + b"}",
        b'{"format": 1e999}',
        b'{"format": 1.0}',
        b'{"format": 18446744073709551616}',
        b'{"format": -9223372036854775809}',
        b'{"format": true}',
        b'{"format": [1]}',
        b'{"format": "1"}',
        b'{"format": {}}',
        b'{"format": 1} x',
        b'{"format": 1,}',
        b"{'format': 1}",
        b'{"format": 01}',
        b'{"format": 1} // comment',
        b'"\\ud800"',
        b'{"x-": "\\ud83d\\ude00", "format": 2}',
        b'{"x-": "\\ude00\\ud83d", "format": 2}',
        b'{"x-a": 1e999, "format": 2}',
        b'{"\xc3\x28": 1}',
        b'{"a\nb": 1}',
        b'{"format": 1}',
    ],
)
def test_texts_are_refused_alike(compare: Compare, text: bytes) -> None:
    assert "error" in compare(text)


def mutations() -> Any:
    """A valid manifest after a few changes anywhere."""
    special = [
        2**31,
        2**53,
        2**53 + 1,
        2**63,
        2**64,
        -1,
        0,
        1e16,
        1e22,
        1.5e300,
        1e301,
        -0.0,
        1e-5,
        0.1,
        "a'b",
    ]
    special += [
        'a"b',
        "a'\"b",
        "\\",
        "\n",
        "\u2028",
        "\u00ad",
        "\U000e0001",
        "é",
        "x" * 600,
        "..",
        "a/b",
        "x-",
        "",
    ]
    new = test_runtime_manifest.JSON | st.sampled_from(special)
    change = st.tuples(
        st.sampled_from(test_runtime_manifest.PLACES), st.sampled_from(["set", "drop", "copy", "rename"]), new
    )
    return st.tuples(
        st.lists(change, min_size=1, max_size=3), st.lists(st.sampled_from(test_runtime_manifest.PLACES))
    )


def mutate(changes: list[tuple[Any, str, Any]], places: list[Any]) -> dict[str, Any]:
    value = test_runtime_manifest.valid()
    others = itertools.cycle(places or [()])
    for place, action, new in changes:
        holder: Any = value
        other: Any = value
        try:
            for key in place[:-1]:
                holder = holder[key]
            for key in next(others):
                other = other[key]
            if action == "drop":
                del holder[place[-1]]
            elif action == "rename":
                holder[str(new)] = holder.pop(place[-1])
            else:
                holder[place[-1]] = copy.deepcopy(other) if action == "copy" else new
        except (KeyError, IndexError, TypeError, AttributeError):
            pass  # an earlier change took the place away
    return value


def encodable(value: Any) -> bool:
    """Whether there are no lone surrogates, which are refused before anything else is looked at."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


@settings(SLOW_IS_FINE, max_examples=250)
@given(mutations())
def test_mutated_manifests_are_read_alike(compare: Compare, mutation: Any) -> None:
    value = mutate(*mutation)
    compare(json.dumps(value, ensure_ascii=not encodable(value)).encode())


def test_damaged_texts_are_read_alike(compare: Compare) -> None:
    """Bytes flipped, cut and doubled anywhere."""
    rng = random.Random(0)
    text = json.dumps(test_runtime_manifest.valid()).encode()
    for _ in range(400):
        damaged = bytearray(text)
        at = rng.randrange(len(text))
        action = rng.randrange(3)
        if action == 0:
            damaged[at] ^= 1 << rng.randrange(8)
        elif action == 1:
            del damaged[at : at + rng.randrange(1, 40)]
        else:
            damaged[at:at] = damaged[rng.randrange(len(text)) :][: rng.randrange(1, 40)]
        compare(bytes(damaged))


def test_the_corpus_is_of_this_format() -> None:
    """The manifest that the C++ tests and the fuzzer begin with is the one of the Python tests."""
    path = Path(__file__).parents[2] / "runtime/fuzz/corpus/manifest/valid.json"
    assert json.loads(path.read_bytes()) == test_runtime_manifest.valid()


def test_a_large_program_takes_no_longer_than_its_size(probe: Probe, tmp_path: Path) -> None:
    value = test_runtime_manifest.valid()
    call = {"graph": "encode", "phase": "request", "inputs": {}}
    value["program"][4:4] = [{**call, "outputs": {"latents": f"copy{i}"}} for i in range(20_000)]
    value["program"] += [{"graph": "step", "phase": "step", "guided": True}] * 100_000
    (tmp_path / "manifest.json").write_text(json.dumps(value))
    assert "2^20" in probe("manifest", path=str(tmp_path))["wrong"]


def test_nothing_there(probe: Probe, tmp_path: Path) -> None:
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe/manifest.json")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "ghost", "a\0b", tmp_path / "pipe", tmp_path / "loop", "x" * 5000, "é"):
        same(probe("manifest", path=str(path)), python(lambda path=path: Manifest.read(path)))  # type: ignore[misc]
    same(probe("manifest", path=f"{tmp_path}/file/a"), python(lambda: Manifest.read(tmp_path / "file/a")))


# Strings, as messages show them


@settings(SLOW_IS_FINE, max_examples=300)
@given(st.text(max_size=100), st.integers(5, 70))
def test_strings_are_shown_alike(probe: Probe, text: str, limit: int) -> None:
    if not encodable(text):
        return
    found = probe("text", text=text, limit=limit)["ok"]
    assert found["show"] == codec.show(text, limit)
    assert found["length"] == len(text)
    assert found["safe_path"] == is_safe_path(text)
    # Unicode's version differs from Python to Python; letters assigned since are the exception.
    if all(ord(c) < 0x500 for c in text):
        assert found["repr"] == repr(text)
        assert found["printable"] == text.isprintable()


def test_letters_are_printable_alike(probe: Probe) -> None:
    differ = sum(
        probe("text", text=chr(c) * 2)["ok"]["printable"] != chr(c).isprintable()
        for c in range(0, 0x30000, 37)
        if not 0xD800 <= c < 0xE000
    )
    assert differ <= 50  # of 5,300: other versions of Unicode


@settings(SLOW_IS_FINE, max_examples=300)
@given(st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(10**20), 10**20).map(float))
def test_numbers_are_shown_alike(probe: Probe, number: float) -> None:
    assert probe("number", number=number)["ok"] == repr(number)


@pytest.mark.parametrize(("path", "safe"), [*test_runtime_manifest.test_safe_paths.pytestmark[0].args[1]])
def test_safe_paths(probe: Probe, path: str, safe: bool) -> None:
    if encodable(path):
        assert probe("text", text=path)["ok"]["safe_path"] is safe


@settings(SLOW_IS_FINE, max_examples=200)
@given(
    st.text("abc._", max_size=12) | st.text("ab", min_size=190, max_size=230),
    st.lists(st.text("abc._", max_size=12) | st.text("ab", min_size=190, max_size=230), max_size=5),
)
def test_the_nearest_name_is_the_same(probe: Probe, word: str, candidates: list[str]) -> None:
    expected = difflib.get_close_matches(word, candidates, 1, 0.5)
    found = probe("text", text=word, candidates=candidates)["ok"]["nearest"]
    assert found == (expected[0] if expected else None)


# Files


def test_sha256(probe: Probe, tmp_path: Path) -> None:
    data = random.Random(1).randbytes(1000)
    for size in [*range(200), 1000]:
        (tmp_path / "file").write_bytes(data[:size])
        for piece in (1, 7, 64, 1000):
            expected = hashlib.sha256(data[:size]).hexdigest()
            assert probe("sha256", path=str(tmp_path / "file"), piece=piece)["ok"] == expected


def opened(path: Path, **options: Any) -> dict[str, Any]:
    """What Python finds in a bundle."""
    variant = options.pop("variant", None)
    bundle = Bundle.open(path, **options)
    weights = {}
    for graph in bundle.manifest.graphs:
        file = bundle.graph_file(graph, variant)
        weights[file] = {
            name: [weight.dtype, list(weight.shape), hashlib.sha256(weight.data.tobytes()).hexdigest()]
            for name, weight in bundle.initializers(file).items()
        }
    files = {name: str(bundle.file(name)) for name in bundle.manifest.files}
    return {"root": str(bundle.root), "files": files, "weights": weights}


def same_bundle(probe: Probe, path: Path, **options: Any) -> dict[str, Any]:
    plain = {
        key: {k: str(v) for k, v in value.items()} if key == "sources" else value
        for key, value in options.items()
    }
    expected = python(lambda: opened(path, **options))
    same(probe("bundle", path=str(path), **plain), expected)
    return expected


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    toy_bundle.write_bundle(tmp_path / "bundle")
    return tmp_path / "bundle"


def test_bundles_are_opened_alike(probe: Probe, toy: Path, tmp_path: Path) -> None:
    for path in (toy, toy / "manifest.json"):
        assert "ok" in same_bundle(probe, path, verify=True)
    assert "variant" in same_bundle(probe, toy, variant="ghost")["wrong"]
    assert "source" in same_bundle(probe, toy, sources={"ghost": tmp_path})["wrong"]
    os.symlink(toy, tmp_path / "link")
    assert "ok" in same_bundle(probe, tmp_path / "link", verify=True)


def test_every_missing_or_damaged_file_is_named_alike(probe: Probe, toy: Path) -> None:
    for file in sorted(path for path in toy.rglob("*") if path.is_file()):
        whole = file.read_bytes()
        file.unlink()
        assert "error" in same_bundle(probe, toy)
        file.mkdir()
        assert "error" in same_bundle(probe, toy)
        file.rmdir()
        for size in {0, 1, 8, len(whole) // 2, len(whole) - 2}:
            file.write_bytes(whole[:size])
            assert "error" in same_bundle(probe, toy)
        file.write_bytes(whole + b"\0")
        if file.name != "manifest.json":
            assert "error" in same_bundle(probe, toy)
            file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
            assert "ok" in same_bundle(probe, toy)
            assert "SHA-256" in same_bundle(probe, toy, verify=True)["wrong"]
        file.write_bytes(whole)
    assert "ok" in same_bundle(probe, toy, verify=True)


def test_links_out_of_the_bundle(probe: Probe, toy: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.onnx"
    (toy / "step.onnx").rename(outside)
    (toy / "step.onnx").symlink_to(outside)
    assert "leads out" in same_bundle(probe, toy)["wrong"]
    (toy / "step.onnx").unlink()
    (toy / "step.onnx").symlink_to("step.onnx")
    assert "missing" in same_bundle(probe, toy)["wrong"]
    (toy / "step.onnx").unlink()
    outside.rename(toy / "real.onnx")
    (toy / "step.onnx").symlink_to("real.onnx")
    assert "ok" in same_bundle(probe, toy)


def test_files_that_cannot_be_read(executable: Callable[[str], Path], toy: Path) -> None:
    program = executable("hywu_core_probe")
    if os.geteuid() != 0:
        (toy / "step.onnx").chmod(0)
        found, expected = unreadable(program, toy)
    else:  # who reads everything: nobody is asked, with a bundle and a probe of its own
        with tempfile.TemporaryDirectory() as folder:
            bundle = shutil.copytree(toy, Path(folder) / "bundle")
            program = Path(shutil.copy2(program, folder))
            for path in (Path(folder), *Path(folder).rglob("*")):
                os.chown(path, NOBODY, NOBODY)
            (bundle / "step.onnx").chmod(0)
            found, expected = as_nobody(lambda: unreadable(program, bundle))
    same(found, expected)
    assert expected["wrong"].startswith("step.onnx cannot be read")


def unreadable(program: Path, bundle: Path) -> list[dict[str, Any]]:
    """What both say of a bundle."""
    probe = Probe(program)
    found = probe("bundle", path=str(bundle))
    probe.close()
    return [found, python(lambda: opened(bundle))]


def as_nobody(ask: Callable[[], Any]) -> Any:
    """What a child without rights finds out, as JSON."""
    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(receiver)
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            with os.fdopen(sender, "w") as stream:
                json.dump(ask(), stream)
        finally:
            os._exit(0)
    os.close(sender)
    with os.fdopen(receiver) as stream:
        text = stream.read()
    os.waitpid(child, 0)
    return json.loads(text)


def with_engines(bundle: Path, engines: dict[str, Any], **files: bytes) -> None:
    """Writes engines into a manifest, and plan files `engines/NAME.plan`."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    (bundle / "engines").mkdir(exist_ok=True)
    for name, content in files.items():
        (bundle / f"engines/{name}.plan").write_bytes(content)
        entry = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        manifest["files"][f"engines/{name}.plan"] = entry
    manifest["engines"] = engines
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def engine(bundle: Path, **changes: Any) -> dict[str, Any]:
    """An engine of all graphs, whose plans are `engines/one.plan`."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    files = {name: graph["file"] for name, graph in manifest["graphs"].items()}
    value = {
        "backend": "tensorrt",
        "version": "10.3.0",
        "compute_capabilities": ["8.9"],
        "shapes": {"batch": [1, 1, 2], "height": [8, 8, 16], "width": [8, 8, 24]},
        "graphs": dict.fromkeys(files, "engines/one.plan"),
        "sources": {file: manifest["files"][file]["sha256"] for file in files.values()},
    }
    return {key: v for key, v in {**value, **changes}.items() if v is not None}


def test_files_of_engines_are_checked_when_they_are_used(probe: Probe, toy: Path) -> None:
    with_engines(toy, {"key": engine(toy)}, one=b"a plan")
    plan = toy / "engines/one.plan"
    assert "ok" in same_bundle(probe, toy, verify=True)
    for content in (b"a plan.", b"", b"a plam"):
        plan.write_bytes(content)
        # What `opened` asks for afterwards is where the file is, not what is in it.
        assert "ok" in same_bundle(probe, toy)
        assert "engines/one.plan has" in same_bundle(probe, toy, verify=True)["wrong"]
    plan.unlink()
    for verify in (False, True):
        assert "engines/one.plan is missing" in same_bundle(probe, toy, verify=verify)["wrong"]
    assert python(lambda: Bundle.open(toy).root)["ok"] == toy
    plan.symlink_to("/etc/hostname")
    assert "leads out" in same_bundle(probe, toy, verify=True)["wrong"]
    # A folder of such a name alone is no exception.
    (toy / "step.onnx").write_bytes(b"")
    assert "step.onnx" in same_bundle(probe, toy)["wrong"]


# Engines


TARGET = Target("tensorrt", "10.3.0", "8.9", "Made-up GPU")


def same_choice(probe: Probe, path: Path, target: Target = TARGET, **question: Any) -> dict[str, Any]:
    root, manifest = Path(question.pop("root", path)), Manifest.read(path)

    def ask() -> Any:
        if "shapes" in question:
            shapes = {axis: tuple(sizes) for axis, sizes in question["shapes"].items()}
            return engines.build_command(root, manifest, target, question.get("variant"), shapes)
        keys = engines.usable(root, manifest, target, question.get("variant"), question.get("key"))
        if "graphs" in question:
            return engines.covering(root, manifest, keys, question["axes"], question["graphs"], target)
        policies = [engines.narrowed(manifest, manifest.engines[key]) for key in keys]
        sizes = [dataclasses.asdict(policy) if policy is not None else None for policy in policies]
        return {"keys": list(keys), "sizes": json.loads(json.dumps(sizes))}  # tuples become lists

    expected = python(ask)
    asked = {"path": str(path), "root": str(root), "target": dataclasses.asdict(target), **question}
    same(probe("engines", **asked), expected)
    return expected


VERSIONS = ["10.3.0", "10.2.9", "10.3.0.30", "10.3", "10.04.0", "10", "11.0", "9.9", "10.x", "1" * 30, ""]


def test_engines_are_chosen_alike(probe: Probe, toy: Path) -> None:
    rng = random.Random(0)
    value = json.loads((toy / "manifest.json").read_text())
    value["variants"] = {
        "half": {"precision": "fp16", "graphs": {}},
        "it's": {"precision": "int8", "graphs": {}},
    }
    (toy / "manifest.json").write_text(json.dumps(value))
    variants = [None, None, None, *value["variants"]]
    seen: dict[str, int] = {}
    for _ in range(250):
        made = {}
        for key in rng.sample(["a", "b", "c", "d e"], rng.randrange(5)):
            low = [rng.choice([8, 16, 32]) for _ in range(2)]
            shapes = {
                "batch": sorted(rng.choices(range(1, 5), k=3)),
                "height": [low[0], low[0], rng.choice([32, 64])],
                "width": [low[1], 32, 64],
                "delta_batch": sorted(rng.choices(range(1, 5), k=3)),
            }
            kept = engine(
                toy,
                backend=rng.choice(["tensorrt", "tensorrt", "tensorrt", "tensorrt-rtx"]),
                version=rng.choice(["10.3.0"] * 12 + VERSIONS[:-1]),
                version_compatible=rng.random() < 0.5,
                compute_capabilities=rng.choice(
                    [["8.9"], ["8.9"], ["7.5", "8.9"], ["8.0"], ["12.0", "10.0"]]
                ),
                hardware_compatible=rng.random() < 0.5,
                variant=rng.choice(variants),
                shapes={axis: shapes[axis] for axis in rng.sample(list(shapes), rng.randrange(5))},
            )
            for graph in rng.sample(list(kept["graphs"]), rng.choice([0, 0, 0, 1, 2])):
                del kept["graphs"][graph]
            if rng.random() < 0.1:
                kept["sources"]["step.onnx"] = "0" * 64
            made[key] = kept
        with_engines(toy, made, one=b"a plan")
        target = Target(
            rng.choice(["tensorrt", "tensorrt", "tensorrt-rtx"]),
            "10.3.0",
            rng.choice(["8.9", "8.9", "12.0"]),
            "GPU",
        )
        options: dict[str, Any] = {"variant": rng.choice(variants)}
        if rng.random() < 0.3:
            options = {"key": rng.choice(["a", "b", "d e", "nobody"])}
        if rng.random() < 0.6:
            axes = {
                "batch": rng.randrange(1, 6),
                "height": rng.choice([8, 16, 64]),
                "width": 32,
                "delta_batch": 1,
            }
            options["axes"] = {axis: axes[axis] for axis in rng.sample(list(axes), rng.randrange(5))}
            options["graphs"] = rng.sample(list(value["graphs"]), rng.randrange(1, 4))
        answer = same_choice(probe, toy, target, root="a 'bundle'" if rng.random() < 0.3 else toy, **options)
        kind = answer.get("error", "ok")
        seen[kind] = seen.get(kind, 0) + 1
    assert min(seen.get(kind, 0) for kind in ("ok", "EngineError", "InputError")) >= 15, seen


def test_versions_are_compared_alike(probe: Probe, toy: Path) -> None:
    for built in VERSIONS[:-1]:
        with_engines(toy, {"key": engine(toy, version=built, version_compatible=True)}, one=b"a plan")
        for here in VERSIONS:
            same_choice(probe, toy, dataclasses.replace(TARGET, version=here))


def test_build_commands_are_the_same(probe: Probe, toy: Path) -> None:
    every = {
        "batch": [1, 2, 4],
        "delta_batch": [1, 1, 1],
        "height": [8, 8, 16],
        "width": [8, 16, 24],
        "x": [1, 2, 3],
    }
    for backend, variant in (("tensorrt", None), ("tensorrt-rtx", "it's"), ("tensorrt", "größer")):
        target = dataclasses.replace(TARGET, backend=backend)
        for shapes in (every, {**every, "delta_batch": every["batch"]}, {"height": [8, 8, 8]}, {}):
            options = {"variant": variant} if variant is not None else {}
            same_choice(probe, toy, target, root="/a b/$c", shapes=shapes, **options)


def test_linked_weights(probe: Probe, toy: Path, tmp_path: Path) -> None:
    import torch

    checkpoint = tmp_path / "checkpoint"
    test_runtime_bundle.link(toy, checkpoint, torch.bfloat16)
    weights = same_bundle(probe, toy, sources={"base": checkpoint})["ok"]["weights"]
    assert weights["step.onnx"]["mix.stored"][0] == "bfloat16"
    assert "linked" in same_bundle(probe, toy)["wrong"]
    assert "linked" in same_bundle(probe, toy, links=False)["wrong"]
    assert "ok" in same_bundle(probe, toy, sources={"base": checkpoint}, links=False)
    assert "is not a file" in same_bundle(probe, toy, sources={"base": tmp_path})["wrong"]
    file = checkpoint / "unet.safetensors"
    whole = file.read_bytes()
    for damaged in (whole[:-1], whole[:5], b"", whole.replace(b"mix", b"mox")):
        file.write_bytes(damaged)
        assert "error" in same_bundle(probe, toy, sources={"base": checkpoint})
        same_bundle(probe, toy, sources={"base": checkpoint}, links=False)


# Schedules


def same_schedule(probe: Probe, path: Path, **question: Any) -> dict[str, Any]:
    def rows() -> dict[str, Any]:
        orders, default = question.get("orders", {}), question.get("default_strength")
        samplers = {
            "even": Sampler("Even", (1, 5), order=orders.get("even")),
            "wild": Sampler("Wild", (2, 4), True, orders.get("wild")),
        }
        strength = None if default is None else Strength(default)
        schedule = Schedule(path, Schedules("s.safetensors", "even", 3, samplers, strength))
        found = schedule.rows(question.get("sampler"), question.get("steps"), question.get("strength"))
        return {
            "sampler": found.sampler,
            "steps": found.steps,
            "width": schedule.width,
            "initial_scale": hexadecimal(found.initial_scale),
            "timesteps": hexadecimal(found.timesteps),
            "coefficients": hexadecimal(found.coefficients),
            "start": "" if found.start is None else hexadecimal(found.start),
            "accepted": schedule.accepted(found.sampler),
        }

    expected = python(rows)
    section = {"default": "even", "default_steps": 3, "samplers": ["even", "wild"]}
    same(probe("schedule", path=str(path), **section, **question), expected)
    return expected


def hexadecimal(numbers: Any) -> str:
    return "".join(
        f"{word:08x}" for word in np.asarray(numbers, np.float32).reshape(-1).view(np.uint32).tolist()
    )


def test_rows_are_the_same(probe: Probe, tmp_path: Path) -> None:
    save_file(toy_bundle.schedule(), tmp_path / "s.safetensors")
    for sampler in (None, "even", "wild"):
        for steps in (None, 1, 2, 3, 4, 5):
            same_schedule(probe, tmp_path / "s.safetensors", sampler=sampler, steps=steps)
    assert "ok" in same_schedule(probe, tmp_path / "s.safetensors")
    for question in ({"steps": 0}, {"steps": -1}, {"sampler": "wild", "steps": 2**40}, {"sampler": "ghost"}):
        assert same_schedule(probe, tmp_path / "s.safetensors", **question)["error"] == "InputError"


def test_rows_from_midway_are_the_same(probe: Probe, tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    save_file(toy_bundle.schedule(), path)
    able: dict[str, Any] = {"default_strength": 0.6, "orders": {"even": 1, "wild": 2}}
    for sampler, counts in (("even", range(1, 6)), ("wild", range(2, 5))):
        for steps in counts:
            for strength in (None, 1.0, 0.9, 2 / 3, 0.5, 0.2, 0.1, 1e-9):
                question = {"sampler": sampler, "steps": steps, "strength": strength}
                assert "ok" in same_schedule(probe, path, **able, **question)
    for refused in (0.0, -0.5, 1.5, 1e-17):
        assert same_schedule(probe, path, **able, strength=refused)["error"] == "InputError"
    once = {"default_strength": 1.0, "orders": {"wild": 2}}
    assert "ok" in same_schedule(probe, path, **once)
    assert same_schedule(probe, path, **once, strength=0.5)["error"] == "InputError"
    assert same_schedule(probe, path, strength=0.5)["error"] == "InputError"
    tables = toy_bundle.schedule()
    save_file({**tables, "even.start": tables["even.start"][1:].copy()}, path)
    assert same_schedule(probe, path, **able)["error"] == "BundleError"


SCHEDULE_CHANGES: list[Callable[[dict[str, Any]], Any]] = [
    lambda t: t.pop("even.offsets"),
    lambda t: t.pop("wild.timesteps"),
    lambda t: t.update({"even.offsets": t["even.offsets"][:-1]}),
    lambda t: t.update({"even.offsets": t["even.offsets"][::-1].copy()}),
    lambda t: t.update({"even.offsets": t["even.offsets"].astype(np.float32)}),
    lambda t: t.update({"even.offsets": t["even.offsets"].astype(np.uint64)}),
    lambda t: t.update({"even.offsets": t["even.offsets"] + 10**9}),
    lambda t: t.update({"even.offsets": np.array([0, 2**63 - 1, -(2**63), -1, 1, 15, 15])}),
    lambda t: t.update({"even.offsets": np.zeros(0, int), "even.initial_scale": np.zeros(0, np.float32)}),
    lambda t: t.update({"even.coefficients": t["even.coefficients"][:, 0].copy()}),
    lambda t: t.update({"even.coefficients": t["even.coefficients"][:, :3].copy()}),
    lambda t: t.update({"even.coefficients": t["even.coefficients"] * np.nan}),
    lambda t: t.update({"even.initial_scale": t["even.initial_scale"] / np.float32(0)}),
    lambda t: t.update({"even.timesteps": t["even.timesteps"].astype(np.float64)}),
    lambda t: t.update({"even.timesteps": t["even.timesteps"][1:]}),
    lambda t: t.update({"even.offsets": np.zeros(7, np.int64), "even.timesteps": np.zeros(0, np.float32),
                        "even.coefficients": np.zeros((0, 4), np.float32)}),
    lambda t: t.update({"other": np.zeros(3, np.int16)}),
]  # fmt: skip


@pytest.mark.parametrize("change", SCHEDULE_CHANGES)
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_damaged_schedules(probe: Probe, tmp_path: Path, change: Any) -> None:
    tables = toy_bundle.schedule()
    change(tables)
    save_file(tables, tmp_path / "s.safetensors")
    same_schedule(probe, tmp_path / "s.safetensors")


def test_files_that_are_no_schedules(probe: Probe, tmp_path: Path) -> None:
    (tmp_path / "s.safetensors").write_bytes(b"\0" * 40)
    for name in ("s.safetensors", "ghost.safetensors"):
        assert "cannot be read" in same_schedule(probe, tmp_path / name)["wrong"]


# Noise


@settings(SLOW_IS_FINE, max_examples=100)
@given(st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.integers(1, 3000))
def test_noise_is_the_same(probe: Probe, seed: int, sample: int, draw: int, length: int) -> None:
    found = probe("noise", seed=str(seed), sample=sample, draw=draw, length=length)["ok"]
    words = np.array([int(found[i : i + 8], 16) for i in range(0, len(found), 8)], np.uint32)
    expected = noise.normal((length,), seed, sample, draw)
    # Two libraries' logarithms may differ in float64's last bit, which rounding nearly always hides.
    difference = np.abs(words.view(np.int32).astype(np.int64) - expected.view(np.int32))
    assert difference.max() <= 1
    assert np.count_nonzero(difference) <= 1


# Deltas


TARGETS = (
    DeltaTarget("block.to_q", "linear", 6, 5, 4),
    DeltaTarget("block.conv", "conv", 3, 2, 2, (3, 1)),
    DeltaTarget("block.experts.w1", "experts", 4, 3, 2, experts=5),
    DeltaTarget('ü."\\\x7f', "linear", 2, 2, 3),
)
SPEC = DeltaSpec(4, "gate", "delta_batch", TARGETS)
PLAIN_TARGETS = [
    {"module": t.module, "in": t.in_features, "out": t.out_features, "rank": t.rank}
    | ({"kernel": list(t.kernel)} if t.kernel else {})
    | ({"experts": t.experts} if t.experts else {})
    for t in TARGETS
]


def make(seed: int = 0, rank: int = 4, batch: int = 1) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        name: rng.standard_normal((batch, *shape)).astype(np.float32)
        for target in TARGETS
        for name, shape in target.shapes(min(rank, target.rank)).items()
    }


def listed(deltas: Deltas) -> dict[str, Any]:
    tensors = {n: [list(t.shape), hashlib.sha256(t.tobytes()).hexdigest()] for n, t in sorted(deltas.items())}
    return {"rank": deltas.rank, "batch": deltas.batch, "tensors": tensors}


def same_deltas(
    probe: Probe, paths: list[Path], ask: Callable[[list[Deltas]], Any], **question: Any
) -> dict[str, Any]:
    """Loads, does something with the sets, and saves: with both, and gives Python's answer."""
    out = paths[0].parent / "out.safetensors"

    def run() -> dict[str, Any]:
        result = ask([Deltas.load(path) for path in paths])
        result.save(out)
        return listed(result)

    expected = python(run)
    saved = out.read_bytes() if "ok" in expected else None
    out.unlink(missing_ok=True)
    same(probe("deltas", paths=[str(path) for path in paths], out=str(out), **question), expected)
    assert (out.read_bytes() if out.exists() else None) == saved
    out.unlink(missing_ok=True)
    return expected


def load(probe: Probe, path: Path) -> dict[str, Any]:
    return same_deltas(probe, [path], lambda sets: sets[0])


@pytest.mark.parametrize("batch", [1, 3])
def test_delta_files_are_the_same_bytes(probe: Probe, tmp_path: Path, batch: int) -> None:
    path = tmp_path / "d.safetensors"
    Deltas(make(batch=batch)).save(path)
    assert "ok" in load(probe, path)
    probe("deltas", paths=[str(path)], out=str(tmp_path / "e.safetensors"))
    assert (tmp_path / "e.safetensors").read_bytes() == path.read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["d.safetensors", "e.safetensors"]


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F64"])
@pytest.mark.filterwarnings("ignore:overflow")
def test_stored_dtypes(probe: Probe, tmp_path: Path, dtype: str) -> None:
    """Every bit pattern of the 16-bit numbers but those of NaNs; the edges of float64's rounding."""
    if dtype == "F64":
        edges = [np.finfo(np.float32).max * (1 + k * 2.0**-26) for k in range(6)]
        edges += [2.0**-150, 2.0**-149, 1.5 * 2.0**-150, 1 + 2.0**-24, 1 + 3 * 2.0**-24, 1e308, np.inf, 0.1]
        values = np.array(edges + [-x for x in edges], np.float64)
    else:
        bits = np.arange(2**16, dtype=np.uint16)
        exponent = {"F16": 0x7C00, "BF16": 0x7F80}[dtype]
        values = bits[(bits & exponent != exponent) | (bits & ~np.uint16(exponent | 0x8000) == 0)]
    tensor = {"dtype": dtype, "shape": [1, 1, len(values)], "data": values.tobytes()}
    (tmp_path / "d.safetensors").write_bytes(container({"x.lora_A": tensor}))
    assert "ok" in load(probe, tmp_path / "d.safetensors")


def container(tensors: dict[str, dict[str, Any]], metadata: Any = {"hywu.deltas": "1"}) -> bytes:  # noqa: B006
    """A safetensors file, written by hand: of dtypes that NumPy lacks too."""
    header: dict[str, Any] = {"__metadata__": metadata}
    data = b""
    for name, tensor in tensors.items():
        offsets = [len(data), len(data) + len(tensor["data"])]
        header[name] = {"dtype": tensor["dtype"], "shape": tensor["shape"], "data_offsets": offsets}
        data += tensor["data"]
    return pack(json.dumps(header).encode(), data)


def pack(header: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def bad_files() -> dict[str, bytes]:
    one = {"dtype": "F32", "shape": [1, 1, 2], "data_offsets": [0, 8]}
    files = {
        "empty": b"",
        "text": b"not a safetensors file at all",
        "header beyond": struct.pack("<Q", 1000) + b"{}",
        "header huge": struct.pack("<Q", 2**63 + 5) + b"{}",
        "header large": struct.pack("<Q", 10**8 + 1) + b"{}",
        "no mark": save(make()),
        "mark 2": save(make(), {"hywu.deltas": "2"}),
        "name": save({"x.weight": np.ones((1, 2, 3), np.float32)}, {"hywu.deltas": "1"}),
        "control": save({"x\x01\u2028.lora_C": np.ones((1, 2, 3), np.float32)}, {"hywu.deltas": "1"}),
        "int": container({"x.lora_A": {"dtype": "I32", "shape": [1, 1, 1], "data": bytes(4)}}),
        "unsigned": container({"x.lora_A": {"dtype": "U16", "shape": [1, 1, 1], "data": bytes(2)}}),
        "no such": container({"x.lora_A": {"dtype": "F33", "shape": [1, 1, 1], "data": bytes(4)}}),
        "float8": container({"x.lora_A": {"dtype": "F8_E4M3", "shape": [1, 1, 1], "data": bytes(1)}}),
        "half a byte": container({"x.lora_A": {"dtype": "F4", "shape": [1, 1, 1], "data": bytes(1)}}),
        "two axes": container({"x.lora_A": {"dtype": "F32", "shape": [1, 1], "data": bytes(4)}}),
        "scalar": container({"x.lora_A": {"dtype": "F32", "shape": [], "data": bytes(4)}}),
        "nine axes": container({"x.lora_A": {"dtype": "F32", "shape": [1] * 9, "data": bytes(4)}}),
        "many axes": container({"x.lora_A": {"dtype": "F32", "shape": [1] * 100, "data": bytes(4)}}),
        "no elements": container({"x.lora_A": {"dtype": "F32", "shape": [1, 0, 3], "data": b""}}),
        "no tensors": container({}),
        "two faults": container(
            {
                "z": {"dtype": "F32", "shape": [1, 1, 1], "data": bytes(4)},
                "a.lora_A": {"dtype": "I8", "shape": [4], "data": bytes(4)},
                "b.lora_A": {"dtype": "F32", "shape": [1], "data": bytes(4)},
            }
        ),
        "more behind": container({}) + b"\0",
        "metadata null": container({}, None),
        "metadata list": container({}, ["a"]),
        "metadata number": container({}, {"hywu.deltas": 1}),
        "not JSON": pack(b"{'a': 1}", b""),
        "list": pack(b"[]", b""),
        "spaces first": pack(b"  " + json.dumps({"x.lora_A": one}).encode(), bytes(8)),
        "spaces alone": pack(b"    ", b""),
        "not UTF-8": pack(b'{"\xff": 1}', b""),
        "surrogate": pack(b'{"\\ud800": 1}', b""),
        "nested": pack(b'{"x.lora_A": ' + b"[" * 5000 + b"]" * 5000 + b"}", b""),
    }
    changes: dict[str, Any] = {
        "shape larger": {"shape": [1, 1, 3]},
        "shape smaller": {"shape": [1, 1, 1]},
        "shape negative": {"shape": [1, -1, -2]},
        "shape overflows": {"shape": [2**62, 2**62, 2]},
        "shape overflows to the size": {"shape": [2**32, 2**32, 2]},
        "shape float": {"shape": [1, 1, 2.0]},
        "shape null": {"shape": None},
        "shape beyond": {"shape": [2**64, 1, 2]},
        "offset late": {"data_offsets": [1, 9]},
        "offset negative": {"data_offsets": [-1, 7]},
        "offsets turned": {"data_offsets": [8, 0]},
        "offset beyond": {"data_offsets": [0, 2**63]},
        "offsets three": {"data_offsets": [0, 8, 8]},
        "offsets float": {"data_offsets": [0.0, 8.0]},
        "dtype number": {"dtype": 1},
        "dtype lower case": {"dtype": "f32"},
        "unknown key": {"colour": 1},
    }
    for name, change in changes.items():
        header = {"__metadata__": {"hywu.deltas": "1"}, "x.lora_A": one | change}
        files[name] = pack(json.dumps(header).encode(), bytes(8))
    for key in one:
        header = {
            "__metadata__": {"hywu.deltas": "1"},
            "x.lora_A": {k: v for k, v in one.items() if k != key},
        }
        files[f"no {key}"] = pack(json.dumps(header).encode(), bytes(8))
    for name, offsets in (("overlap", [4, 12]), ("hole", [12, 20]), ("same", [0, 8]), ("swapped", [8, 16])):
        header = {
            "__metadata__": {"hywu.deltas": "1"},
            "x.lora_B": one | {"data_offsets": offsets},
            "x.lora_A": one,
        }
        files[name] = pack(json.dumps(header).encode(), bytes(max(offsets[1], 8)))
    return files


BAD_FILES = bad_files()


@pytest.mark.parametrize("name", BAD_FILES)
def test_odd_files_are_read_alike(probe: Probe, tmp_path: Path, name: str) -> None:
    (tmp_path / "d.safetensors").write_bytes(BAD_FILES[name])
    load(probe, tmp_path / "d.safetensors")


def test_files_damaged_anywhere_are_read_alike(probe: Probe, tmp_path: Path) -> None:
    """A bit flipped in every byte of the header, and every length of the file."""
    path = tmp_path / "d.safetensors"
    whole = save({"x.lora_A": make()["block.to_q.lora_A"]}, {"hywu.deltas": "1"})
    for i in range(len(whole)):
        damaged = bytearray(whole)
        damaged[i] ^= 1 << (i % 8)
        path.write_bytes(damaged)
        answer = probe("deltas", paths=[str(path)])
        same(answer, python(lambda: listed(Deltas.load(path))))
        path.write_bytes(whole[:i])
        assert probe("deltas", paths=[str(path)])["error"] == "DeltaError"


def test_where_nothing_can_be_read_or_written(probe: Probe, tmp_path: Path) -> None:
    path = tmp_path / "d.safetensors"
    Deltas(make()).save(path)
    (tmp_path / "dir").mkdir()
    for place in (tmp_path / "ghost.safetensors", tmp_path / "dir"):
        assert load(probe, place)["error"] == "DeltaError"
    for place in (tmp_path / "ghost/d.safetensors", tmp_path / "dir", Path("/dev/full/x")):
        expected = python(lambda place=place: Deltas.load(path).save(place))  # type: ignore[misc]
        same(probe("deltas", paths=[str(path)], out=str(place)), expected)
    assert sorted(os.listdir(tmp_path)) == ["d.safetensors", "dir"]
    other = shutil.copy(path, tmp_path / "other.safetensors")
    umask = os.umask(0)
    os.umask(umask)
    probe("deltas", paths=[str(path)], out=str(other))
    assert Path(other).stat().st_mode & 0o777 == 0o666 & ~umask


sets = st.lists(
    st.tuples(
        st.integers(0, 3),  # the numbers
        st.integers(1, 4),  # rank
        st.sampled_from([1, 1, 2, 3]),  # batch
        st.sampled_from(["", "", "", "drop", "rename", "axes", "D", "shape"]),
    ),
    min_size=1,
    max_size=3,
)


def written(parts: list[tuple[int, int, int, str]], folder: Path) -> list[Path]:
    paths = []
    for i, (seed, rank, batch, fault) in enumerate(parts):
        tensors = make(seed, rank, batch)
        name = list(tensors)[seed]
        if fault == "drop":
            del tensors[name]
        elif fault == "rename":
            tensors[name.replace("block", "blocks.0")] = tensors.pop(name)
        elif fault == "axes":
            tensors[name] = tensors[name][..., None]
        elif fault == "D":
            tensors[name] = np.concatenate([tensors[name]] * 2)
        elif fault == "shape":
            tensors[name] = np.concatenate([tensors[name]] * 2, 2)
        paths.append(folder / f"{i}.safetensors")
        save_file(
            {key: np.ascontiguousarray(value) for key, value in tensors.items()},
            paths[-1],
            {"hywu.deltas": "1"},
        )
    return paths


weights = st.sampled_from([1.0, 0.5, -2.0, 0.1, 1e-30, 1e38, 0.0, -0.0]) | st.floats(-3, 3)


@settings(SLOW_IS_FINE, max_examples=120)
@given(sets, st.data())
def test_blends_are_the_same(
    probe: Probe, tmp_path_factory: pytest.TempPathFactory, parts: Any, data: Any
) -> None:
    paths = written(parts, tmp_path_factory.mktemp("sets"))
    odd = st.sampled_from([float("inf"), float("nan")])
    factors = [data.draw(weights if data.draw(st.integers(0, 9)) else odd) for _ in parts]
    max_rank = data.draw(st.sampled_from([None, 6, 12]))
    question = {"weights": [repr(w) for w in factors], "max_rank": max_rank}
    same_deltas(
        probe, paths, lambda s: Deltas.blend(list(zip(s, factors)), max_rank), operation="blend", **question
    )


@settings(SLOW_IS_FINE, max_examples=80)
@given(sets)
def test_stacks_are_the_same(probe: Probe, tmp_path_factory: pytest.TempPathFactory, parts: Any) -> None:
    paths = written(parts, tmp_path_factory.mktemp("sets"))
    same_deltas(probe, paths, Deltas.stack, operation="stack")


@settings(SLOW_IS_FINE, max_examples=120)
@given(sets, st.sampled_from([None, 1, 2, 3]), st.booleans(), st.integers(-1, 3))
def test_sets_are_checked_padded_and_selected_alike(
    probe: Probe,
    tmp_path_factory: pytest.TempPathFactory,
    parts: Any,
    batch: int | None,
    bad: bool,
    sample: int,
) -> None:
    folder = tmp_path_factory.mktemp("sets")
    (path,) = written(parts[:1], folder)
    if bad:
        tensors = {name: tensor.copy() for name, tensor in Deltas.load(path).items()}
        list(tensors.values())[-1].reshape(-1)[-1] = np.nan
        save_file(tensors, path, {"hywu.deltas": "1"})

    def checked(s: list[Deltas]) -> Deltas:
        s[0].check(SPEC, batch)
        return s[0]

    padded = folder / "padded.safetensors"
    same_deltas(probe, [path], checked, operation="check", targets=PLAIN_TARGETS, batch=batch)
    same_deltas(probe, [path], lambda s: s[0].pad(SPEC), operation="pad", targets=PLAIN_TARGETS)
    Deltas.load(path).pad(SPEC).save(padded)
    same_deltas(probe, [padded], checked, operation="check", targets=PLAIN_TARGETS, batch=batch)
    same_deltas(probe, [path], lambda s: s[0].select(sample), operation="select", sample=sample)


def test_experts_blend_along_their_rank(probe: Probe, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    paths = []
    for rank in (2, 4):
        tensors = {
            "mlp.lora_A": rng.standard_normal((1, 3, rank, 6)),
            "mlp.lora_B": rng.standard_normal((1, 3, 5, rank)),
        }
        paths.append(tmp_path / f"{rank}.safetensors")
        Deltas(tensors).save(paths[-1])
    blend = lambda s: Deltas.blend([(s[0], 0.5), (s[1], -2.0)], 6)  # noqa: E731
    assert "ok" in same_deltas(probe, paths, blend, operation="blend", weights=["0.5", "-2"], max_rank=6)
    assert "ok" in same_deltas(probe, paths, Deltas.stack, operation="stack")
