"""What a tiled VAE decoder saves and costs in ONNX Runtime: memory, time, and levels of the picture.

    python -m tools.measure_tiling VAE_DIR --max-size 1024 --tile 640 --size 512 [--photo FILE]

Each form runs in a process of its own, on one thread: its memory is the largest resident set above that of
the loaded graph before the run. Without a photo the latents are random. The result is JSON on stdout.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np


def _graph(folder: Path, tile: int | None, max_size: int, path: Path) -> None:
    """Writes the decoder of the VAE in ``folder`` as an ONNX file with its weights beside it."""
    import onnx_ir as ir

    from hywu_export.bundle.weights import read_tensor
    from hywu_export.families.autoencoder import ImageDecoder, pixels_per_latent
    from hywu_export.families.components import open_component
    from hywu_export.families.pix2pix import make_vae
    from hywu_export.families.tiling import Tiles
    from hywu_export.tracing import Axis, GraphSpec, TensorSpec, trace

    vae = open_component("vae", folder, make_vae)
    module: Any = vae.module
    factor = pixels_per_latent(module)
    side = Axis(8 * factor, max_size, 8 * factor)
    axes = {
        "batch": Axis(1, 2),
        "height": side,
        "width": side,
        "h": Axis(of="height", divide=factor),
        "w": Axis(of="width", divide=factor),
    }
    tiles = Tiles.covering(max_size, tile, factor)
    traced = trace(
        GraphSpec(
            "image_decoder",
            ImageDecoder(module, lambda latents: latents, tiles),
            [TensorSpec("latents", "float32", ("batch", module.config.latent_channels, "h", "w"))],
            [TensorSpec("edited", "uint8", ("batch", "height", "width", 3))],
        ),
        axes,
    )
    for initializer, parameter in traced.initializers.items():
        location = vae.tensors[parameter.removeprefix("vae.")]
        data = b"".join(read_tensor(parameter, location, "F32"))
        array = np.frombuffer(data, np.float32).reshape(location.shape)
        traced.model.graph.initializers[initializer].const_value = ir.tensor(array, name=initializer)
    ir.save(traced.model, path, external_data=f"{path.name}.data")


def _latents(folder: Path, photo: Path | None, size: int) -> np.ndarray:
    import torch
    from diffusers import AutoencoderKL
    from PIL import Image

    if photo is None:
        config = json.loads((folder / "config.json").read_text())
        side = size // 2 ** (len(config["block_out_channels"]) - 1)
        return np.random.default_rng(0).standard_normal(
            (1, config["latent_channels"], side, side), np.float32
        )
    pixels = np.asarray(Image.open(photo).convert("RGB").resize((size, size), Image.Resampling.LANCZOS))
    image = torch.from_numpy(pixels / np.float32(127.5) - 1).permute(2, 0, 1)[None]
    with torch.no_grad():
        latents: np.ndarray = AutoencoderKL.from_pretrained(folder).encode(image).latent_dist.mode().numpy()
    return latents


def _run(model: Path, latents: Path, out: Path) -> None:
    """In a process of its own."""
    from hywu_runtime.backends.onnxruntime import OnnxRuntime

    session = OnnxRuntime("ort-cpu", 0, 1).load(model, {})
    given = np.load(latents)
    Path("/proc/self/clear_refs").write_text("5")  # the largest resident set so far is forgotten
    before = _peak()
    start = time.process_time()
    picture = session.run({"latents": given})["edited"]
    print(
        json.dumps(
            {
                "loaded_bytes": before,
                "bytes": _peak() - before,
                "cpu_seconds": round(time.process_time() - start, 1),
            }
        )
    )
    np.save(out, picture)


def _peak() -> int:
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


@click.command(help=__doc__)
@click.argument("vae", type=click.Path(path_type=Path))
@click.option("--max-size", type=int, default=1024, show_default=True)
@click.option("--tile", type=int, default=640, show_default=True)
@click.option("--size", "sizes", type=int, multiple=True, required=True)
@click.option("--photo", type=click.Path(path_type=Path))
def main(vae: Path, max_size: int, tile: int, sizes: tuple[int, ...], photo: Path | None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for name, side in (("whole", None), ("tiled", tile)):
            _graph(vae, side, max_size, work / f"{name}.onnx")
        for size in sizes:
            np.save(work / "latents.npy", _latents(vae, photo, size))
            measured: dict[str, Any] = {"size": size, "max_size": max_size, "tile": tile}
            for name in ("whole", "tiled"):
                files = [work / f"{name}.onnx", work / "latents.npy", work / f"{name}.npy"]
                command = [sys.executable, "-m", "tools.measure_tiling", "run", *map(str, files)]
                result = subprocess.run(command, check=True, capture_output=True, text=True)
                measured[name] = json.loads(result.stdout)
            whole, tiled = (np.load(work / f"{name}.npy").astype(np.float64) for name in ("whole", "tiled"))
            difference = np.abs(whole - tiled)
            measured["levels"] = {"largest": int(difference.max()), "mean": round(difference.mean(), 3)}
            measured["psnr_db"] = round(10 * np.log10(255**2 / max((difference**2).mean(), 1e-9)), 1)
            print(json.dumps(measured), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["run"]:
        _run(*map(Path, sys.argv[2:5]))
    else:
        main()
