"""A shell script that compiles a bundle's graphs on a device without Python bindings of TensorRT.

It runs ``trtexec`` (or TensorRT-RTX's ``tensorrt_rtx``) and leaves plans, logs and `SETTINGS` in a folder,
which `importing` makes an engine of the bundle. It needs a POSIX shell and coreutils.
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Iterator, Mapping
from pathlib import Path
from shlex import quote
from typing import Any

from hywu_export.bundle.staging import writing
from hywu_export.engines.job import DEFAULT_RTX, BuildOptions, Work, check_turing_work, plan_name, plan_work
from hywu_export.engines.sources import GraphSource
from hywu_export.engines.tensorrt import Settings
from hywu_runtime.errors import UnsupportedError

SETTINGS = "hywu-build.json"
"""What the script was made for; beside the plans."""
FORMAT = 1
_LONGEST = 131071  # bytes of one argument that Linux passes on

_TOOLS = {"tensorrt": "trtexec", "tensorrt-rtx": "tensorrt_rtx"}

_HEAD = """#!/bin/sh
# Compiles {count} of the bundle {name} with {tool}.
#
#     sh {file} BUNDLE OUT{usage}
#
# BUNDLE is a copy of the bundle on this machine; OUT is a new folder for the plans.{linked}
# {upper}=PATH names another {tool}. Afterwards, where hywu-export is installed:
#
#     hywu build BUNDLE --import OUT
set -eu

if [ $# -lt {least} ]; then
    echo "Usage: sh $0 BUNDLE OUT{usage}" >&2
    exit 2
fi
bundle=$(cd "$1" && pwd -P)
mkdir -p "$2"
out=$(cd "$2" && pwd -P)
shift 2
tool=${{{upper}:-{tool}}}
if ! help=$("$tool" --help 2>&1); then
    echo "$tool cannot be run. Expected {tool} of {product}. Say {upper}=/path/to/{tool}." >&2
    exit 1
fi

# supported FLAG: FLAG if this version knows it.
supported() {{
    case $help in
    *"${{1%%=*}}"*) printf '%s' "$1" ;;
    esac
}}

# compile NAME PLAN ARGUMENT...: leaves OUT/PLAN, or stops.
compile() {{
    name=$1 plan=$2
    shift 2
    echo "$name"
    if ! "$tool" "$@" "--saveEngine=$out/$plan.partial" >"$out/$plan.log" 2>&1; then
        tail -n 5 "$out/$plan.log" >&2
        echo "$name could not be compiled: see $out/$plan.log" >&2
        exit 1
    fi
    mv "$out/$plan.partial" "$out/$plan"
}}
"""

_VIEW = """
view=$(mktemp -d)
trap 'rm -rf "$view"' EXIT

# put PLACE FILE: FILE seems to lie at PLACE of the folder that the compiler reads from.
put() {
    mkdir -p "$(dirname "$view/$1")"
    ln -sfn "$2" "$view/$1"
}
"""


def write_script(path: Path, bundle: str | Path, options: BuildOptions) -> Work:
    """Writes the script; neither TensorRT nor a GPU is needed here.

    Raises:
        BundleError, InputError, UnsupportedError: see `job.build`; or the path cannot be
            written, or a command would be longer than a system takes.
    """
    work = plan_work(bundle, options)
    if options.backend == "tensorrt-rtx":
        capabilities = options.compute_capabilities or DEFAULT_RTX
        check_turing_work(work, capabilities)
    else:
        capabilities = ()
    text = "".join(_script(path.name, work, capabilities))
    with writing(path):
        path.write_text(text, encoding="utf-8")
        path.chmod(0o755)
    return work


def settings_dict(work: Work, capabilities: tuple[str, ...]) -> dict[str, Any]:
    """What an import must know: plain JSON values."""
    settings = {k: v for k, v in work.settings.to_dict().items() if k != "compute_capabilities"}
    return {
        "format": FORMAT,
        "backend": work.options.backend,
        "compute_capabilities": list(capabilities),
        "variant": work.options.variant,
        "shapes": {name: list(sizes) for name, sizes in work.shapes.items()},
        "settings": settings,
        "graphs": {source.name: plan_name(source.name) for source in work.sources},
        "files": work.files,
    }


def _script(file: str, work: Work, capabilities: tuple[str, ...]) -> Iterator[str]:
    tool = _TOOLS[work.options.backend]
    checkpoints = sorted({source for graph in work.sources for _, source, _ in graph.linked})
    count = len(work.sources)
    yield _HEAD.format(
        count="1 graph" if count == 1 else f"{count} graphs",
        name=_comment(work.bundle.manifest.name),
        file=_comment(file),
        usage="".join(f" {_comment(name)}=DIR" for name in checkpoints),
        linked="\n# ID=DIR is where a checkpoint with linked weights lies." if checkpoints else "",
        tool=tool,
        upper=tool.upper(),
        product="TensorRT 10.3 or later" if tool == "trtexec" else "TensorRT-RTX",
        least=2 + len(checkpoints),
    )
    yield "\n# The bundle must be the one that this script was made for.\n"
    lines = "".join(f"{digest}  {name}\n" for name, digest in work.files.items())
    yield f"cd \"$bundle\"\nsha256sum --quiet -c - <<'EOF'\n{lines}EOF\n"
    if checkpoints:
        yield _VIEW
        yield from _checkpoints(work, checkpoints)
    yield "\n"
    for source in work.sources:
        yield from _command(work, source, capabilities, tool)
    text = json.dumps(settings_dict(work, capabilities), indent=1)
    yield f"\ncat >\"$out/{SETTINGS}\" <<'EOF'\n{text}\nEOF\n"
    yield 'echo "Done. Now, where hywu-export is installed: hywu build BUNDLE --import $out"\n'


def _checkpoints(work: Work, names: list[str]) -> Iterator[str]:
    """Finds the folders that the arguments name, and checks the files."""
    yield "\nfor argument; do\n    case $argument in\n"
    for number, name in enumerate(names):
        yield f'    {quote(name + "=")}*) source{number}=$(cd "${{argument#*=}}" && pwd -P) ;;\n'
    yield '    *) echo "$argument is not understood" >&2; exit 2 ;;\n    esac\ndone\n'
    sizes = {
        (source, file): work.bundle.manifest.sources[source].files[file].size
        for graph in work.sources
        for _, source, file in graph.linked
    }
    for (name, file), size in sorted(sizes.items()):
        place = f'"${{source{names.index(name)}?the folder of {_comment(name)} is missing}}"/{quote(file)}'
        yield f'[ "$(wc -c <{place})" -eq {size} ] || {{ echo {quote(file)} is another file >&2; exit 1; }}\n'


def _command(work: Work, source: GraphSource, capabilities: tuple[str, ...], tool: str) -> Iterator[str]:
    onnx = f'"$bundle"/{quote(source.file)}'
    if source.linked:
        yield from _links(work, source)
        onnx = f'"$view"/{quote(posixpath.basename(source.file))}'
    arguments = [f"--onnx={onnx}"]
    profile = work.profile(source.name)
    for point, flag in enumerate(("--minShapes", "--optShapes", "--maxShapes")):
        if profile:
            arguments.append(quote(f"{flag}={_shapes(source.name, profile, point)}"))
    arguments += [quote(flag) for flag in _flags(work.settings, capabilities)]
    plan = plan_name(source.name)
    optional = ["--stronglyTyped", "--profilingVerbosity=detailed"]
    if tool == "trtexec":
        arguments.append('"--timingCacheFile=$out/timing.cache"')
        arguments.append(f'"--exportLayerInfo=$out/"{quote(plan + ".layers.json")}')
    else:
        optional.append("--verbose")
    arguments += [f"$(supported {flag})" for flag in optional]
    yield f"compile {quote(source.name)} {quote(plan)} \\\n    " + " \\\n    ".join(arguments) + "\n"


def _links(work: Work, source: GraphSource) -> Iterator[str]:
    """The graph and its weights where the ONNX file says that they lie."""
    folder = posixpath.dirname(source.file) or "."
    yield 'rm -rf "$view"; mkdir "$view"\n'
    yield f'put {quote(posixpath.basename(source.file))} "$bundle"/{quote(source.file)}\n'
    for weights in source.weights:
        yield f'put {quote(posixpath.relpath(weights, folder))} "$bundle"/{quote(weights)}\n'
    names = sorted({name for graph in work.sources for _, name, _ in graph.linked})
    for location, name, file in source.linked:
        yield f'put {quote(location)} "$source{names.index(name)}"/{quote(file)}\n'


def _flags(settings: Settings, capabilities: tuple[str, ...]) -> Iterator[str]:
    yield "--skipInference"
    if capabilities:
        yield "--computeCapabilities=" + ",".join(c.replace(".", "") for c in capabilities)
    if settings.optimization_level is not None:
        yield f"--builderOptimizationLevel={settings.optimization_level}"
    if settings.workspace is not None:
        yield f"--memPoolSize=workspace:{settings.workspace}"
    if settings.version_compatible:
        yield "--versionCompatible"
    if settings.hardware_compatible is not None:
        level = {"ampere+": "ampere+", "same": "sameComputeCapability"}[settings.hardware_compatible]
        yield f"--hardwareCompatibilityLevel={level}"
    if settings.weight_streaming:
        yield "--allowWeightStreaming"


def _shapes(graph: str, profile: Mapping[str, Any], point: int) -> str:
    """``name:1x2x3,name:4x5`` as trtexec reads it."""
    for name in profile:
        if "'" in name or "," in name:
            raise UnsupportedError(
                f"Graph {graph!r} has an input {name!r}",
                "trtexec cannot be told shapes of a name with a comma or a quote",
                "Rename it and export again, or build with the Python bindings",
            )
    text = ",".join(f"{_input(name)}:{'x'.join(map(str, shapes[point]))}" for name, shapes in profile.items())
    if len(text) + 16 > _LONGEST:
        raise UnsupportedError(
            f"Graph {graph!r} has {len(profile)} inputs, whose shapes are {len(text)} bytes long",
            f"A system passes on arguments of {_LONGEST} bytes at the most",
            "Build it with the Python bindings",
        )
    return text


def _input(name: str) -> str:
    return f"'{name}'" if ":" in name else name


def _comment(text: str) -> str:
    """Text for a comment or a message of the script: without what a shell would act on."""
    return "".join(c if c.isalnum() or c in " ._-/" else "_" for c in text)
