"""What a parser or builder says when it fails, as an error: graph, node, and the rule likely broken."""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path

from hywu_runtime.errors import DeviceError, EngineError

_RULES: tuple[tuple[str, str, str], ...] = (
    (
        r"(bf16|bfloat16).*(not supported|turing|sm75)|HW-specific datatypes: b16",
        "BF16 needs compute capability 8.0 or later",
        "Leave 7.5 out, or build the variant fp16",
    ),
    (
        r"FP32 GEMM is not supported",
        "TensorRT-RTX has no FP32 matrix products on compute capability 7.5",
        "Leave 7.5 out, or build a variant that computes them in FP16 or INT8",
    ),
    (
        r"out ?of ?memory|bad_alloc|OUT_OF_MEMORY|memory allocation",
        "The builder needs memory for the weights several times over",
        "Free some, build with smaller --shapes or --batch, or limit --workspace",
    ),
    (
        r"strongly.?typed|must have (the )?same (input )?type|type mismatch|types? (do|does) not match",
        "Every operation has inputs of one type: nothing is cast that the graph does not cast",
        "Put explicit Casts where types meet, by exporting or calibrating again with this version",
    ),
    (
        r"UINT8|uint8",
        "uint8 stands only beside a Cast, at an input or output of a graph",
        "Cast pictures first and last; export again with this version",
    ),
    (
        r"quantiz|Q/DQ|zero.?point",
        "Q/DQ is signed INT8 with zero point 0: activations per tensor, weights per channel, scales constant",
        "Make the variant again with `hywu calibrate`",
    ),
    (
        r"no (importer|plugin)|unsupported op|not supported.*operator|getPluginCreator|plugin not found",
        "Graphs use operators that every TensorRT from 10.3 on knows [rule: operator]",
        "Change the module that was traced, or use a later TensorRT",
    ),
    (
        r"opset",
        "Graphs have opset 20 at most [rule: opset]",
        "Export again with this version",
    ),
    (
        r"external|weights file|open file|initializer",
        "Weights lie in files of the bundle or in the linked checkpoint",
        "Check the bundle with `hywu inspect --verify`, and --source for linked weights",
    ),
    (
        r"profile|kMIN|kOPT|kMAX|dynamic (shape|input)",
        "Every axis has a smallest, a best and a largest size, and derived axes follow",
        "Choose other --shapes, --batch or --delta-batch",
    ),
    (
        r"could not find any implementation|No (valid )?tactic",
        "Some layer has no kernel for these types and sizes on this GPU",
        "Raise --workspace, choose other --shapes, or build another variant",
    ),
    (
        r"cuda(Error| ?error)? ?(code )?:? ?35|driver version is insufficient|no CUDA-capable device",
        "This step needs an NVIDIA driver and a GPU",
        "Build with --backend tensorrt-rtx, which needs none, or on the machine with the GPU",
    ),
)  # fmt: skip
"""Pattern in a message, what is expected, what to do; the first that fits."""

_NODE = (
    r"operation '([^']+)'",
    r"ForeignNode\[([^\]]+)\]",
    r"[Nn]ode(?: name)?:? [\"'`]?([\w./:-]+/[\w./:-]+)",
    r"[Ll]ayer:? [\"'`]?([\w./:-]+/[\w./:-]+)",
    r"^([\w./:-]+/[\w.-]+): ",
)


def parser_error(graph: str, problems: Sequence[Mapping[str, str]]) -> EngineError:
    """The error for what an ONNX parser has against a graph."""
    first = problems[0]
    node = f" at node {first['node']!r}" if first["node"] else ""
    operator = f" ({first['operator']})" if first["operator"] else ""
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    rule = _rule(f"{first['operator']} {first['message']}")
    return EngineError(
        f"Graph {graph!r} is refused by the ONNX parser{node}{operator}: {_brief(first['message'])}{more}",
        rule[0],
        rule[1],
    )


def builder_error(graph: str, errors: Sequence[str], log: Path) -> EngineError:
    """The error for a builder that gave up after logging ``errors``."""
    message = errors[-1] if errors else _last_words(log)
    for text in errors:  # the most telling comes first, its consequences after it
        if _node(text) or _matches(text):
            message = text
            break
    node = _node(message)
    place = f" at {node!r}" if node and f"'{node}'" not in message else ""
    expected, remedy = _rule(message)
    return EngineError(f"Graph {graph!r} cannot be built{place}: {_brief(message)}", expected, remedy)


def crash_error(graph: str, code: int, stderr: str) -> EngineError:
    """The error for a builder's process that ended without an answer."""
    if code in (-signal.SIGKILL, 137):
        return EngineError(
            f"Graph {graph!r}: the builder's process was killed, most likely because memory ran out",
            "The builder needs memory for the weights several times over",
            "Free some, or build with smaller --shapes or --batch; nothing half-written is left behind",
        )
    last = stderr.strip().rsplit("\n", 1)[-1]
    name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return EngineError(
        f"Graph {graph!r}: the builder's process ended with {name}{f': {_brief(last)}' if last else ''}",
        "Expected it to report success or failure",
        "Run it again with --log FILE to keep the builder's log; update TensorRT and the driver",
    )


def no_gpu() -> DeviceError:
    """The error for TensorRT on a machine without a GPU."""
    return DeviceError(
        "TensorRT builds for the GPU of the machine it runs on, and here is none (no driver, or no device)",
        "Expected an NVIDIA GPU and its driver; TensorRT-RTX alone builds without",
        "Build with --backend tensorrt-rtx, or write a script for the device with --emit-script FILE",
    )


def _rule(message: str) -> tuple[str, str]:
    found = _matches(message)
    if found:
        return found
    return (
        "Graphs follow the rules that every TensorRT from 10.3 on shares (docs/engines.md)",
        "Look at the builder's whole log, which --log FILE keeps",
    )


def _matches(message: str) -> tuple[str, str] | None:
    for pattern, expected, remedy in _RULES:
        if re.search(pattern, message, re.IGNORECASE):
            return expected, remedy
    return None


def _node(message: str) -> str | None:
    for pattern in _NODE:
        if found := re.search(pattern, message):
            return found[1]
    return None


def _brief(message: str) -> str:
    text = " ".join(message.split())
    return text if len(text) <= 400 else text[:399] + "…"


def _last_words(log: Path) -> str:
    """The last warning or error in a log; a builder that fails may have named it a warning."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    telling = [line[4:] for line in lines if line.startswith(("[F]", "[E]", "[W]"))]
    return telling[-1] if telling else "the builder does not say why"
