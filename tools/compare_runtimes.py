"""One edit with hywu-edit, the Python runtime, and the diffusers pipeline in torch: times and memory.

    python tools/compare_runtimes.py --build build/release --bundle out/bundle --rounds 5

The three take turns, each in processes of their own, so that a busy machine is busy for all of them. A round
measures the time from the start of the process to the picture in its file, CPU time and peak resident memory
of that process (`wait4`), and then, in another process, edits that follow on the first. Prints a table;
``--json`` writes all numbers.

The diffusers pipeline is the base alone: it makes no deltas and applies none, so it has less to do.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "make it sepia"

PYTHON = """
import sys, time
from hywu_runtime import Editor
bundle, photo, out, threads, edits = sys.argv[1:]
editor = Editor.load(bundle, "ort-cpu", threads=int(threads))
editor.edit(photo, "make it sepia", seed=1).save(out)
for k in range(int(edits)):
    start = time.perf_counter()
    editor.edit(photo, "make it sepia", seed=k)
    print(time.perf_counter() - start)
"""
TORCH = """
import sys, time
import torch
from diffusers import StableDiffusionInstructPix2PixPipeline
from PIL import Image
bundle, photo, out, threads, edits = sys.argv[1:]
torch.set_num_threads(int(threads))
pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(
    bundle, torch_dtype=torch.float32, safety_checker=None
)
pipeline.set_progress_bar_config(disable=True)
image = Image.open(photo).convert("RGB").resize((128, 128))
def edit(seed):
    generator = torch.Generator().manual_seed(seed)
    return pipeline("", image=image, num_inference_steps=2, generator=generator).images[0]
edit(1).save(out)
for k in range(int(edits)):
    start = time.perf_counter()
    edit(k)
    print(time.perf_counter() - start)
"""


def measure(command: list[str], environment: dict[str, str]) -> tuple[float, float, float, str]:
    """Wall time, CPU time (s), peak resident memory (bytes), stdout."""
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.DEVNULL, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            raise SystemExit(f"{' '.join(command[:3])} … ended with {process.returncode}")
        output.seek(0)
        return wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, output.read()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "release")
    parser.add_argument("--bundle", type=Path, default=ROOT / "out" / "bundle")
    parser.add_argument("--photo", type=Path, default=ROOT / "demo" / "photos" / "coffee.jpg")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--edits", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    import onnxruntime

    library = next((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so*"))
    environment = {**os.environ, "HYWU_ONNXRUNTIME_LIBRARY": str(library), "HF_HUB_OFFLINE": "1"}
    tools, base = options.build / "tools", ROOT / "demo" / "base"
    found: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "out.png")
        common = [str(options.photo), out, str(options.threads)]
        cold = {
            "hywu-edit": [str(tools / "hywu-edit"), str(options.bundle), common[0], PROMPT, "--out", out,
                          "--threads", common[2]],
            "Python runtime": [sys.executable, "-c", PYTHON, str(options.bundle), *common, "0"],
            "diffusers, torch": [sys.executable, "-c", TORCH, str(base), *common, "0"],
        }  # fmt: skip
        steady = {
            "hywu-edit": [str(tools / "hywu-bench"), str(options.bundle), "--photo", common[0],
                          "--threads", common[2], "--runs", str(options.edits), "--warm-up", "0", "--json"],
            "Python runtime": [*cold["Python runtime"][:-1], str(options.edits)],
            "diffusers, torch": [*cold["diffusers, torch"][:-1], str(options.edits)],
        }  # fmt: skip
        for round_number in range(options.rounds + 1):
            for name, command in cold.items():
                wall, cpu, memory, _ = measure(command, environment)
                text = measure(steady[name], environment)[3]
                if round_number == 0:
                    continue  # files come into the page cache
                numbers = found.setdefault(name, {"cold": [], "cold_cpu": [], "memory": [], "edit": []})
                edits = (
                    [json.loads(text)["stages"]["edit"]["p50"]]
                    if text.startswith("{")
                    else map(float, text.split())
                )
                numbers["cold"].append(wall)
                numbers["cold_cpu"].append(cpu)
                numbers["memory"].append(memory)
                numbers["edit"].append(statistics.median(edits))
    print("| | start to picture, s | CPU time of that, s | peak memory, MB | a further edit, s |")
    print("|---|---|---|---|---|")
    for name, numbers in found.items():
        cells = [statistics.median(numbers[key]) for key in ("cold", "cold_cpu", "memory", "edit")]
        print(f"| {name} | {cells[0]:.2f} | {cells[1]:.2f} | {cells[2] / 1e6:.0f} | {cells[3]:.3f} |")
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
