"""The way through full TensorRT, up to its calls: a module that looks like it writes them down.

TensorRT itself needs a GPU. What these tests show is which symbols are asked for, with what values, in
versions that have them and in versions that do not.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from quantized import model, write_model_bundle

from hywu_export.engines import BuildOptions, build
from hywu_export.engines.devices import Gpu
from hywu_export.engines.shapes import ShapeOptions
from hywu_export.engines.tensorrt import Settings
from hywu_runtime.errors import EngineError, InputError

ORIN = Gpu("Orin", "8.7")


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """TensorRT looks installed, here and in the worker; gives the calls that it got."""
    pytest.importorskip("polygraphy")
    fake = Path(__file__).parent / "fake"
    monkeypatch.setenv("PYTHONPATH", str(fake))
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.syspath_prepend(str(fake))
    monkeypatch.setattr("hywu_export.engines.devices.gpu", lambda: ORIN)
    monkeypatch.delitem(__import__("sys").modules, "tensorrt", raising=False)
    yield lambda: [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
    __import__("sys").modules.pop("tensorrt", None)


@pytest.fixture
def quantized(tmp_path: Path) -> Path:
    return write_model_bundle(tmp_path / "bundle", model())


@pytest.mark.parametrize(("version", "flags"), [("10.3.0", 2), ("11.4.0", 0)])
def test_every_setting_reaches_the_builder(
    calls: Any, quantized: Path, tmp_path: Path, version: str, flags: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TENSORRT_VERSION", version)
    cache = tmp_path / "timing.cache"
    cache.write_bytes(b"before")
    settings = Settings(
        optimization_level=4, workspace=256, version_compatible=True, hardware_compatible="ampere+",
        weight_streaming=True,
    )  # fmt: skip
    options = BuildOptions(
        backend="tensorrt", shapes=ShapeOptions(batch="1:2:4", delta_batch="1:1:2"), settings=settings,
        timing_cache=cache,
    )  # fmt: skip
    built = build(quantized, options)
    said = calls()
    assert ["network", flags] in said  # strongly typed, which TensorRT 11 always is
    assert ["parser flag", "NATIVE_INSTANCENORM"] in said
    assert ["config", "builder_optimization_level", 4] in said
    assert ["config", "hardware_compatibility_level", "AMPERE_PLUS"] in said
    assert ["config", "profiling_verbosity", "DETAILED"] in said
    assert ["pool", "WORKSPACE", 256 << 20] in said
    assert ["timing cache", "before"] in said
    assert sorted(call[1] for call in said if call[0] == "flag") == ["VERSION_COMPATIBLE", "WEIGHT_STREAMING"]
    (profile,) = (call[1] for call in said if call[0] == "profile")
    assert profile["x"] == [[1, 16, 64], [2, 16, 64], [4, 16, 64]]
    assert profile["m.lora_A"] == [[1, 8, 64], [1, 8, 64], [2, 8, 64]]
    assert cache.read_bytes() == b"before+measured"

    engine = built.manifest.engines[built.key]
    assert (engine.backend, engine.version, engine.device) == ("tensorrt", version, "Orin")
    assert engine.compute_capabilities == ("8.7",)
    assert engine.version_compatible
    assert engine.hardware_compatible
    assert build(quantized, options).reused


def test_the_inspector_is_asked_where_there_is_a_gpu(calls: Any, quantized: Path) -> None:
    report = build(quantized, BuildOptions(backend="tensorrt")).report["graphs"]["step"]
    assert report["layers_from"] == "engine inspector"
    assert report["products"] == {"fp16": 2, "int8": 1}
    assert report["deltas"]["sum"] == {"in the product with B": 1}
    (branch,) = report["deltas"]["branches"]
    assert branch["base"]["precision"] == "int8"


def test_nothing_is_set_that_was_not_asked_for(calls: Any, quantized: Path) -> None:
    build(quantized, BuildOptions(backend="tensorrt"))
    said = calls()
    assert [call for call in said if call[0] in ("flag", "pool")] == []
    assert {call[1] for call in said if call[0] == "config"} == {"profiling_verbosity", "progress_monitor"}


def test_a_symbol_that_this_version_lacks(calls: Any, quantized: Path) -> None:
    with pytest.raises(EngineError, match="SAME_COMPUTE_CAPABILITY"):
        build(quantized, BuildOptions(backend="tensorrt", settings=Settings(hardware_compatible="same")))
    assert not (quantized / "engines").exists()


def test_another_gpu_is_another_engine(calls: Any, quantized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build(quantized, BuildOptions(backend="tensorrt"))
    monkeypatch.setattr("hywu_export.engines.devices.gpu", lambda: Gpu("L4", "8.9"))
    second = build(quantized, BuildOptions(backend="tensorrt"))
    assert first.key != second.key
    assert set(second.manifest.engines) == {first.key, second.key}


def test_capabilities_are_not_for_tensorrt(quantized: Path) -> None:
    with pytest.raises(InputError, match="--compute-capability"):
        build(quantized, BuildOptions(backend="tensorrt", compute_capabilities=("8.7",)))
