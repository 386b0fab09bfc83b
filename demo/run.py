"""The demo: export the trained pair, edit photographs it has never seen, and compare with exact operations.

``hywu demo`` and ``make demo`` run this. It writes to one folder:

- ``bundle/``: the exported pair;
- ``gallery.png``: source, every edit, the same without deltas, and one instruction with another's deltas;
- ``report.json`` and ``table.md``: PSNR per instruction, and seconds per stage.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from demo.recipe import operations
from hywu_export import ExportOptions, export
from hywu_runtime import Editor

HERE = Path(__file__).parent
Pixels = npt.NDArray[np.uint8]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Row:
    """One instruction: mean PSNR in dB against the exact operation, over all photographs."""

    instruction: str
    edit: float
    deltas_off: float
    wrong_deltas: float
    untouched: float
    vae_ceiling: float


def run(out: Path, progress: Progress | None = None) -> Path:
    """Do it all and return the gallery's path. ``progress(what, done, total)`` is called before each piece of work."""
    tell = progress or (lambda what, done, total: None)
    started = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    options = ExportOptions(overwrite=True)
    manifest = export(out / "bundle", HERE / "base", HERE / "generator", options, progress)
    exported = time.perf_counter() - started

    with Editor.load(out / "bundle") as editor:
        policy = manifest.image
        assert policy is not None
        # Loading the graphs is timed by itself.
        before = time.perf_counter()
        editor.warm_up()
        loading = time.perf_counter() - before
        photos = {path.stem: path for path in sorted((HERE / "photos").glob("*.jpg"))}
        ceiling = _Autoencoder(out / "bundle", HERE / "base")
        cases = [_Case(editor, ceiling, path, index) for index, path in enumerate(photos.values())]
        total = len(cases) * len(operations.OPERATIONS)
        for done, (case, operation) in enumerate((c, o) for c in cases for o in operations.OPERATIONS):
            tell(f"editing {case.path.stem}: {operation.name}", done, total)
            case.edit(operation)
        for case in cases:
            case.swap_deltas()
        tell("done", total, total)

    rows = [_row(operation.name, cases) for operation in operations.OPERATIONS]
    times = _times([seconds for case in cases for seconds in case.seconds])
    report = {
        "rows": [asdict(row) for row in rows],
        "mean": asdict(_mean(rows)),
        "seconds": {"export": exported, "load": loading, **times},
        "photographs": list(photos),
    }
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    (out / "table.md").write_text(_table(rows))
    gallery = out / "gallery.png"
    draw_gallery(cases).save(gallery)

    print(_table(rows))
    print("seconds    " + "   ".join(f"{name} {value:.3f}" for name, value in report["seconds"].items()))
    print(gallery)
    return gallery


class _Autoencoder:
    """The bundle's own VAE, there and back: what no edit can be better than."""

    def __init__(self, bundle: Path, base: Path):
        import onnxruntime

        self.encoder = onnxruntime.InferenceSession(str(bundle / "image_encoder.onnx"))
        self.decoder = onnxruntime.InferenceSession(str(bundle / "image_decoder.onnx"))
        config = json.loads((base / "vae" / "config.json").read_text())
        self.scaling = np.float32(config["scaling_factor"])

    def __call__(self, pixels: Pixels) -> Pixels:
        (latents,) = self.encoder.run(None, {"image": pixels[None]})
        (back,) = self.decoder.run(None, {"latents": latents * self.scaling})
        return np.asarray(back[0], np.uint8)


class _Case:
    """One photograph with all that is made of it."""

    def __init__(self, editor: Editor, autoencoder: _Autoencoder, path: Path, index: int):
        from hywu_runtime.images import load_photo

        self.editor, self.autoencoder, self.path, self.index = editor, autoencoder, path, index
        self.source = load_photo(path, editor.bundle.manifest.image)
        self.off = editor.edit(path, "", delta_strength=0.0, output="array")
        self.edits: dict[str, Pixels] = {}
        self.wrong: dict[str, Pixels] = {}
        self.exact: dict[str, Pixels] = {}
        self.ceiling: dict[str, Pixels] = {}
        self.seconds: list[dict[str, float]] = []

    def instruction(self, operation: operations.Operation) -> str:
        """Every photograph is asked in other words."""
        return operation.phrasings[self.index % len(operation.phrasings)]

    def edit(self, operation: operations.Operation) -> None:
        name = operation.name
        self.edits[name] = self.editor.edit(self.path, self.instruction(operation), output="array")
        timings = self.editor.timings
        self.seconds.append({**timings.graphs, "step": float(np.mean(timings.steps)), "edit": timings.total})
        self.exact[name] = _exact(name, self.source)
        self.ceiling[name] = self.autoencoder(self.exact[name])

    def swap_deltas(self) -> None:
        """Every instruction once more, with the deltas of the next."""
        for operation, other in zip(operations.OPERATIONS, _rotated(operations.OPERATIONS)):
            deltas = self.editor.generate(self.path, self.instruction(other))
            self.wrong[operation.name] = self.editor.edit(
                self.path, self.instruction(operation), deltas=deltas, output="array"
            )


def _rotated(items: Sequence[operations.Operation]) -> Sequence[operations.Operation]:
    return [*items[1:], items[0]]


def _exact(name: str, pixels: Pixels) -> Pixels:
    import torch

    x = torch.from_numpy(pixels.astype(np.float32) / 255).permute(2, 0, 1)[None]
    y = operations.apply(name, x)[0].permute(1, 2, 0)
    return np.asarray((y * 255).round().to(torch.uint8))


def psnr(a: Pixels, b: Pixels) -> float:
    """Peak signal-to-noise ratio of two 8-bit images, in dB."""
    error = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return float(10 * np.log10(255**2 / max(error, 1e-12)))


def _row(name: str, cases: Sequence[_Case]) -> Row:
    def mean(pick: Callable[[_Case], Pixels]) -> float:
        return float(np.mean([psnr(pick(case), case.exact[name]) for case in cases]))

    return Row(
        name,
        edit=mean(lambda case: case.edits[name]),
        deltas_off=mean(lambda case: case.off),
        wrong_deltas=mean(lambda case: case.wrong[name]),
        untouched=mean(lambda case: case.source),
        vae_ceiling=mean(lambda case: case.ceiling[name]),
    )


def _mean(rows: Sequence[Row]) -> Row:
    columns = [name for name in asdict(rows[0]) if name != "instruction"]
    return Row("mean", **{name: float(np.mean([getattr(row, name) for row in rows])) for name in columns})


def _table(rows: Sequence[Row]) -> str:
    lines = [
        "| instruction | edit | deltas off | wrong deltas | untouched source | VAE ceiling |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in [*rows, _mean(rows)]:
        numbers = [row.edit, row.deltas_off, row.wrong_deltas, row.untouched, row.vae_ceiling]
        lines.append(f"| {row.instruction} | " + " | ".join(f"{number:.1f}" for number in numbers) + " |")
    return "\n".join(lines) + "\n"


def _times(edits: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Median seconds per stage."""
    names = dict.fromkeys(name for seconds in edits for name in seconds)
    return {name: float(np.median([s[name] for s in edits if name in s])) for name in names}


CELL, GAP, CAPTION, MARGIN, COLUMNS = 160, 8, 20, 16, 7
INK, PAPER = (28, 28, 30), (255, 255, 255)


def draw_gallery(cases: Sequence[_Case]) -> Image.Image:
    """Two lines for each photograph: source, edits, deltas off, two edits with another instruction's deltas."""
    names = [operation.name for operation in operations.OPERATIONS]
    followed = dict(zip(names, [*names[1:], names[0]]))
    wrong = [name for name in ("brighten", "warm") if name in followed]
    titles = ["source", *names, "deltas off", *(f"{name}, deltas of {followed[name]}" for name in wrong)]
    lines = -(-len(titles) // COLUMNS)
    block = lines * (CELL + CAPTION) + GAP
    size = (2 * MARGIN + COLUMNS * (CELL + GAP) - GAP, 2 * MARGIN + len(cases) * block - GAP)
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(13)
    for index, case in enumerate(cases):
        pictures = [case.source, *case.edits.values(), case.off, *(case.wrong[name] for name in wrong)]
        for cell, (title, pixels) in enumerate(zip(titles, pictures)):
            x = MARGIN + cell % COLUMNS * (CELL + GAP)
            y = MARGIN + index * block + cell // COLUMNS * (CELL + CAPTION)
            sheet.paste(Image.fromarray(pixels).resize((CELL, CELL), Image.Resampling.BICUBIC), (x, y))
            draw.text((x, y + CELL + 1), title, INK, font)
    return sheet
