"""Transformer blocks of DiT sizes with deltas, on one device: this runtime beside PyTorch with PEFT.

    python -m bench.gpu [--device cuda] [--tokens 1024,4096,16384] [--ranks 8,16,64] [--batches 1,4]

For every rank the blocks are exported once (`hywu_export.trace`), with tokens and batch free. Before anything
is timed, both are compared with float32 on the CPU. Then, in turn: the graph with deltas and the same
without (overhead), PyTorch with the adapters in PEFT and without, compiled too with ``--compile``; and what
new deltas cost the runtime, over the time of one run. Both work in float32, in which CUDA libraries may use
TF32. Last comes the generator at the width of the released one, with as many blocks as
``--generator-blocks`` says: its operations in a second over those of a plain product. The table is short and
comes last; ``--json`` has all.

On a GPU it needs onnxruntime-gpu and a CUDA build of torch. ``--device cpu`` runs the same, for a look.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

if TYPE_CHECKING:
    from torch import nn

TARGETS = ("qkv", "proj", "fc1", "fc2")
MOST_ERROR = 2e-2  # relative, with TF32 on both sides


def _numbers(_: Any, __: Any, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise click.BadParameter(f"{text!r} is no list of numbers such as 8,16,64") from None


@click.command(help=__doc__)
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True)
@click.option("--tokens", default="1024,4096,16384", callback=_numbers)
@click.option("--ranks", default="8,16,64", callback=_numbers)
@click.option("--batches", default="1,4", callback=_numbers)
@click.option("--hidden", default=3072, show_default=True)
@click.option("--blocks", default=2, show_default=True)
@click.option("--seconds", default=2.0, show_default=True, help="For each figure.")
@click.option("--compile", "compiled", is_flag=True, help="Also torch.compile.")
@click.option("--generator-blocks", default=4, show_default=True, help="0: leave the generator out.")
@click.option("--json", "file", type=click.Path(path_type=Path))
def main(
    device: str, tokens: list[int], ranks: list[int], batches: list[int], hidden: int, blocks: int,
    seconds: float, compiled: bool, generator_blocks: int, file: Path | None,
) -> None:  # fmt: skip
    import torch

    torch.manual_seed(0)
    rows = []
    for rank in ranks:
        with tempfile.TemporaryDirectory() as folder:
            module = transformer(hidden, blocks)
            bundle = _export(module, hidden, rank, max(tokens), max(batches), Path(folder))
            for count in tokens:
                for batch in batches:
                    row = _measure(module, hidden, bundle, device, count, batch, rank, seconds, compiled)
                    rows.append(row)
                    print(json.dumps(row), file=sys.stderr, flush=True)
    found: dict[str, Any] = {"device": _device_name(device), "date": time.strftime("%Y-%m-%d"), "rows": rows}
    found |= {"hidden": hidden, "blocks": blocks}
    if generator_blocks:
        found["generator"] = _generator(device, generator_blocks, hidden, seconds)
    if file is not None:
        file.write_text(json.dumps(found, indent=1) + "\n")
    _show(found)


def transformer(hidden: int, blocks: int) -> nn.Module:
    """Blocks of attention (heads of 64) and a feed-forward layer four times as wide; ``[B, n, hidden]``."""
    import torch
    import torch.nn.functional as F
    from torch import Tensor, nn

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
            self.qkv, self.proj = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
            self.fc1, self.fc2 = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)

        def forward(self, x: Tensor) -> Tensor:
            qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, -1, 64)).permute(2, 0, 3, 1, 4)
            attended = F.scaled_dot_product_attention(*qkv.unbind(0))
            x = x + self.proj(attended.transpose(1, 2).flatten(2))
            made: Tensor = x + self.fc2(F.gelu(self.fc1(self.norm2(x)), approximate="tanh"))
            return made

    class Transformer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(blocks))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    with torch.no_grad():
        return Transformer().eval()


def _export(module: nn.Module, hidden: int, rank: int, tokens: int, batch: int, folder: Path) -> Path:
    import torch

    import hywu_export

    traced = hywu_export.trace(
        module, {"x": torch.zeros(2, 16, hidden)}, targets=TARGETS, max_rank=rank,
        dynamic_shapes={"x": ("batch", "tokens", None)}, axes={"tokens": (2, max(tokens, 64))},
        max_batch=max(batch, 2), outputs=["output"],
    )  # fmt: skip
    traced.save(folder / "bundle")
    return folder / "bundle"


def _measure(
    module: nn.Module, hidden: int, bundle: Path, device: str, tokens: int, batch: int, rank: int,
    seconds: float, compiled: bool,
) -> dict[str, Any]:  # fmt: skip
    import torch

    from hywu_export.benchmark.plain import step_overhead
    from hywu_runtime import Deltas, Editor

    row: dict[str, Any] = {"tokens": tokens, "batch": batch, "rank": rank}
    x = torch.randn(batch, tokens, hidden)
    with Editor.load(bundle, f"ort-{device}") as editor:
        spec = editor.bundle.manifest.deltas
        assert spec is not None
        rng = np.random.default_rng(0)
        sets = [
            Deltas(
                {
                    name: (0.1 * rng.standard_normal((1, *shape)) / np.sqrt(shape[-1])).astype(np.float32)
                    for name, shape in spec.tensors.items()
                }
            )
            for _ in range(2)
        ]
        adapted = _with_adapter(module, sets[0], rank)
        few = min(tokens, 1024)
        with torch.no_grad():
            expected = adapted(x[:1, :few]).numpy()
        ours = editor.run({"x": x[:1, :few].numpy()}, deltas=sets[0])["output"]
        row["error"] = _error(ours, expected)
        theirs = adapted.to(device)
        with torch.no_grad():
            row["torch_error"] = _error(theirs(x[:1, :few].to(device)).cpu().numpy(), expected)
        if max(row["error"], row["torch_error"]) > MOST_ERROR:
            raise click.ClickException(f"The results differ: {row}")
        changes = []
        for number in range(6):
            editor.run({"x": x.numpy()}, deltas=sets[number % 2])
            changes.append(editor.timings.bind)
        backend, axes = editor.backend, {"batch": batch, "delta_batch": 1, "tokens": tokens}
        full, plain = step_overhead(editor.bundle, backend, "model", None, axes, seconds)
    row["ours"], row["ours_plain"] = statistics.median(full), statistics.median(plain)
    row["ours_overhead"] = statistics.median(np.array(full) / np.array(plain)) - 1
    # Input and deltas go up together: the deltas' part is that of their bytes.
    share = spec_bytes(spec.tensors) / (spec_bytes(spec.tensors) + x.numel() * 4)
    row["change_of_a_run"] = statistics.median(changes[2:]) * share / row["ours"]
    on = x.to(device)
    for name, wrap in (("torch", _as_it_is), *((("compiled", _compiled),) if compiled else ())):
        with_deltas, without = wrap(theirs), wrap(module.to(device))
        pair = _in_turn(device, [partial(with_deltas, on), partial(without, on)], seconds)
        row[name], row[f"{name}_plain"] = (statistics.median(times) for times in pair)
        row[f"{name}_overhead"] = statistics.median(np.array(pair[0]) / np.array(pair[1])) - 1
    module.to("cpu")
    return row


def spec_bytes(shapes: Any) -> int:
    """Of one set of deltas in float32."""
    return 4 * sum(int(np.prod(shape)) for shape in shapes.values())


def _with_adapter(module: nn.Module, deltas: Any, rank: int) -> nn.Module:
    """A copy with the deltas as a PEFT adapter of scale 1."""
    import copy

    import torch
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(TARGETS))
    adapted = get_peft_model(copy.deepcopy(module), config)
    own = dict(adapted.named_parameters())
    with torch.no_grad():
        for name, array in deltas.items():
            own[f"base_model.model.{name}.default.weight"].copy_(torch.from_numpy(array[0]))
    made: nn.Module = adapted.eval()
    return made


def _in_turn(device: str, runs: Sequence[Callable[[], Any]], seconds: float) -> list[list[float]]:
    import torch

    times: list[list[float]] = [[] for _ in runs]
    with torch.no_grad():
        for run in runs:
            run()
            run()
        end = time.perf_counter() + seconds
        while len(times[0]) < 3 or time.perf_counter() < end:
            for index, run in enumerate(runs):
                _wait(device)
                start = time.perf_counter()
                run()
                _wait(device)
                times[index].append(time.perf_counter() - start)
    return times


def _generator(device: str, blocks: int, width: int, seconds: float) -> dict[str, Any]:
    """The generator's graph: seconds, operations a second, and the same of a plain product of the device."""
    import copy

    import torch

    from hywu_export import ExportOptions, export
    from hywu_export.generator import GeneratorConfig, ParameterGenerator
    from hywu_runtime import Editor
    from tools.sparse_checkpoints import GENERATOR

    length = 1024
    settings = copy.deepcopy(GENERATOR) | {
        "d_model": width // 128 * 128, "input_dim": width // 128 * 128, "num_pg_layers": blocks,
        "num_base_model_layers": 8,
    }  # fmt: skip
    module = ParameterGenerator(GeneratorConfig.from_dict(settings))
    condition = torch.randn(1, length, settings["input_dim"])
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, bundle = Path(folder) / "checkpoint", Path(folder) / "bundle"
        module.save_pretrained(checkpoint)
        export(bundle, generator=checkpoint, options=ExportOptions(max_batch=2))
        with Editor.load(bundle, f"ort-{device}") as editor:
            for _ in range(2):
                editor.generate(inputs={"condition": condition.numpy()})
            times: list[float] = []
            end = time.perf_counter() + seconds
            while len(times) < 3 or time.perf_counter() < end:
                editor.generate(inputs={"condition": condition.numpy()})
                times.append(editor.timings.graphs["generator"])
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module.deltas(condition)
    flops, size = counter.get_total_flops(), 8192 if device == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device) for _ in range(2))
    product = statistics.median(_in_turn(device, [lambda: a @ b], seconds)[0])
    peak, reached = 2 * size**3 / product, flops / statistics.median(times)
    return {"blocks": blocks, "seconds": statistics.median(times), "flops": flops, "reached": reached,
            "product": peak, "share": reached / peak}  # fmt: skip


def _error(made: Any, expected: Any) -> float:
    """The largest difference over the largest value."""
    return float(np.abs(made - expected).max() / np.abs(expected).max())


def _as_it_is(module: nn.Module) -> Any:
    return module


def _compiled(module: nn.Module) -> Any:
    import torch

    return torch.compile(module)


def _wait(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def _device_name(device: str) -> str:
    import platform

    if device == "cpu":
        return platform.processor() or platform.machine()
    import torch

    return str(torch.cuda.get_device_name())


def _show(found: dict[str, Any]) -> None:
    print(f"\n{found['device']}, {found['date']}: {found['blocks']} blocks of {found['hidden']}, float32\n")
    head = "tokens batch rank |     ours  deltas   change |    torch  deltas"
    print(head + (" | compiled  deltas" if "compiled" in found["rows"][0] else ""))
    for row in found["rows"]:
        line = f"{row['tokens']:6} {row['batch']:5} {row['rank']:4} | {1e3 * row['ours']:6.2f}ms "
        line += f"{row['ours_overhead']:+7.1%} {row['change_of_a_run']:8.2%} |"
        for name in ("torch", "compiled"):
            if name in row:
                line += f" {1e3 * row[name]:6.2f}ms {row[f'{name}_overhead']:+7.1%} |"
        print(line.rstrip("|"))
    if "generator" in found:
        made = found["generator"]
        print(
            f"\ngenerator, {made['blocks']} blocks: {1e3 * made['seconds']:.1f} ms, "
            f"{made['reached'] / 1e12:.2f} TFLOP/s, {made['share']:.0%} of a plain product"
        )


if __name__ == "__main__":
    main()
