"""ONNX's own checker and shape inference on every graph of a bundle, whatever the size of its weights.

    python -m tools.check_graphs BUNDLE --source base=DIR

ONNX refuses links as external data, so the checker sees stand-ins where the graph says its weights are: files
as long as those of the checkpoint, of which it reads nothing. Prints, for each graph, its nodes and how many
of their results have an inferred shape, its initializers, the bytes of weights that it refers to, CPU
seconds, and the process's largest memory so far.
"""

from __future__ import annotations

import contextlib
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import onnx

from hywu_export.engines.sources import GraphSource, graph_source
from hywu_runtime.bundle import Bundle


@dataclass(frozen=True)
class Checked:
    """What a graph has: nodes, initializers, bytes of external data, results of nodes whose shape was
    inferred."""

    nodes: int
    initializers: int
    external_bytes: int
    shaped: int


def check_graph(bundle: Bundle, name: str) -> Checked:
    """Check a graph.

    Raises:
        onnx.checker.ValidationError, onnx.shape_inference.InferenceError: it is not valid ONNX.
        ValueError: a result has other dimensions, by inference, than the graph declares.
    """
    source = graph_source(bundle, name, None)
    with _view(bundle, source) as path:
        onnx.checker.check_model(str(path), full_check=False)
    model = source.model
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    declared = {value.name: len(value.type.tensor_type.shape.dim) for value in model.graph.output}
    for value in inferred.graph.output:
        if len(value.type.tensor_type.shape.dim) != declared[value.name]:
            raise ValueError(f"{name}: {value.name} is inferred as {value.type}")
    lengths = [
        int(entry.value)
        for tensor in model.graph.initializer
        for entry in tensor.external_data
        if entry.key == "length"
    ]
    results = {name for node in model.graph.node for name in node.output}
    shapes = (*inferred.graph.value_info, *inferred.graph.output)
    shaped = sum(value.name in results and value.type.tensor_type.HasField("shape") for value in shapes)
    return Checked(len(model.graph.node), len(model.graph.initializer), sum(lengths), shaped)


@contextlib.contextmanager
def _view(bundle: Bundle, source: GraphSource) -> Iterator[Path]:
    """The graph's file, beside sparse files of the length of those that it refers to."""
    file = bundle.file(source.file)
    lengths = {name: bundle.file(name).stat().st_size for name in source.weights}
    for location, checkpoint, path in source.linked:
        lengths[location] = (bundle.sources[checkpoint] / path).stat().st_size
    with tempfile.TemporaryDirectory(prefix="hywu-check-") as folder:
        view = Path(folder) / file.name
        shutil.copyfile(file, view)
        for location, length in lengths.items():
            place = Path(folder) / location
            place.parent.mkdir(parents=True, exist_ok=True)
            with place.open("xb") as stream:
                stream.truncate(length)
        yield view


@click.command(help=__doc__)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--source", "sources", multiple=True, help="NAME=DIR of linked weights: base=…, generator=…")
def main(bundle: Path, sources: tuple[str, ...]) -> None:
    opened = Bundle.open(bundle, sources=dict(source.split("=", 1) for source in sources))
    click.echo("| graph | nodes | with a shape | initializers | weights, GB | CPU s | peak, GB |")
    click.echo("|---|---|---|---|---|---|---|")
    for name in opened.manifest.graphs:
        start = time.process_time()
        found = check_graph(opened, name)
        seconds = time.process_time() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        click.echo(
            f"| {name} | {found.nodes} | {found.shaped} | {found.initializers} "
            f"| {found.external_bytes / 1e9:.2f} | {seconds:.1f} | {peak:.2f} |"
        )


if __name__ == "__main__":
    main()
