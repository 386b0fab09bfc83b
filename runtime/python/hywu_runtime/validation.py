"""What makes a manifest consistent: references, axes, and the data flow of its program.

Everything is a dictionary look-up per reference: time is linear in the size of the manifest, whatever it
says.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from hywu_runtime.codec import MAX_INT, malformed, show
from hywu_runtime.manifest import (
    FILE_NAME,
    ITEM_SIZES,
    PHASES,
    Call,
    Manifest,
    ProvidedTensor,
    Term,
    Value,
)

# The keys of a provided tensor that each source needs and allows; of `text`, exactly one of the two, and of
# `image` any.
_SOURCE_KEYS: dict[str, tuple[str, ...]] = {
    "image": ("index", "origin", "resize"),
    "text": ("text", "constant", "tokenizer"),
    "mask": ("of",),
    "noise": ("draw",),
    "schedule": ("column",),
    "guidance": ("guidance",),
    "gate": (),
    "input": (),
}
_MAX_PORTS = 2**20  # of all calls; a graph is listed once and may be called often
_OPTIONAL_KEYS = (
    "text", "constant", "tokenizer", "of", "draw", "column", "guidance", "index", "origin", "resize",
)  # fmt: skip
_MAX_PICTURES = 64  # of one request


def validate(manifest: Manifest) -> None:
    """Checks a manifest whose types are already right.

    Raises:
        BundleError: naming the first key that is wrong.
    """
    _files(manifest)
    _axes(manifest)
    _guidance(manifest)
    _schedules(manifest)
    _deltas(manifest)
    _tensors(manifest)
    _graphs(manifest)
    _program(manifest)
    _image(manifest)
    _linked(manifest)
    _engines(manifest)


def _known(where: str, name: str, known: Iterable[str], what: str) -> None:
    if name not in known:
        names = sorted(known)
        listed = ", ".join(show(n)[1:-1] for n in names[:8]) + (", …" if len(names) > 8 else "")
        raise malformed(
            where,
            f"names {show(name)}, which is not {what}",
            f"one of: {listed}" if names else f"{what}; there is none",
        )


def _files(m: Manifest) -> None:
    if FILE_NAME in m.files:
        raise malformed("files", f"lists {FILE_NAME} itself", "every file but the manifest")
    references = {f"graphs[{show(name)}].file": graph.file for name, graph in m.graphs.items()}
    references |= {
        f"tokenizers[{show(name)}].file": tokenizer.file for name, tokenizer in m.tokenizers.items()
    }
    references |= {
        f"licences[{i}].file": entry.file for i, entry in enumerate(m.licences) if entry.file is not None
    }
    if m.schedules is not None:
        references["schedules.file"] = m.schedules.file
    for section, additions in (("variants", m.variants), ("engines", m.engines)):
        for name, addition in additions.items():
            where = f"{section}[{show(name)}]"
            for graph, file in addition.graphs.items():
                _known(f"{where}.graphs", graph, m.graphs, "a graph of this bundle")
                references[f"{where}.graphs[{show(graph)}]"] = file
            if addition.report is not None:
                references[f"{where}.report"] = addition.report
    for where, file in references.items():
        if file not in m.files:
            raise malformed(where, f"is {show(file)}, which `files` does not list", "a file of the bundle")
    for i, licence in enumerate(m.licences):
        _known(f"licences[{i}].of", licence.of, m.sources, "a source id")


def _axes(m: Manifest) -> None:
    if "batch" in m.axes and (m.axes["batch"].derived or m.axes["batch"].one_or is not None):
        raise malformed("axes.batch", "depends on another axis", "an axis with limits of its own")
    for name, axis in m.axes.items():
        where = f"axes[{show(name)}]"
        forms = (axis.min is not None) + (axis.of is not None) + bool(axis.sum)
        halves = (axis.of is None) != (axis.divide is None) or (axis.min is None) != (axis.max is None)
        if halves or forms != 1:
            raise malformed(
                where, "mixes the forms of an axis", "either `min` and `max`, or `of` and `divide`, or `sum`"
            )
        if axis.min is not None and axis.max is not None:
            if axis.min > axis.max:
                raise malformed(where, f"has min {axis.min} above max {axis.max}", "min ≤ max")
            if axis.max // axis.multiple * axis.multiple < axis.min:
                raise malformed(
                    where, f"has no multiple of {axis.multiple} within its limits", "at least one size"
                )
        elif axis.multiple != 1 or axis.one_or is not None:
            raise malformed(
                where, "is derived and has `multiple` or `one_or`", "`of` and `divide`, or `sum`, alone"
            )
        if axis.one_or is not None:
            _known(f"{where}.one_or", axis.one_or, m.axes, "an axis")
            if m.axes[axis.one_or].one_or is not None or m.axes[axis.one_or].derived or axis.one_or == name:
                raise malformed(
                    f"{where}.one_or", f"is {show(axis.one_or)}", "an axis with limits of its own"
                )
        if axis.of is not None:
            _known(f"{where}.of", axis.of, m.axes, "an axis")
            base = m.axes[axis.of]
            if base.derived or base.one_or is not None:
                raise malformed(
                    f"{where}.of", f"is {show(axis.of)}, itself derived", "an axis with limits of its own"
                )
            if base.multiple % (axis.divide or 1):
                raise malformed(
                    f"{where}.divide",
                    f"is {axis.divide}, which does not divide every size of {show(axis.of)}",
                    f"a divisor of its multiple, {base.multiple}",
                )
        for i, term in enumerate(axis.sum):
            _term(m, f"{where}.sum[{i}]", term)


def _term(m: Manifest, where: str, term: Term) -> None:
    multiple = largest = term.times
    for name in term.of:
        _known(f"{where}.of", name, m.axes, "an axis")
        base = m.axes[name]
        if base.derived or base.one_or is not None:
            raise malformed(
                f"{where}.of", f"has {show(name)}, itself derived", "axes with limits of their own"
            )
        multiple *= base.multiple
        largest *= base.max or 1
    if largest > MAX_INT:
        raise malformed(where, "may be larger than 2^53", "smaller limits")
    if multiple % term.divide:
        raise malformed(
            f"{where}.divide",
            f"is {term.divide}, which does not always divide",
            "a divisor of times and the multiples",
        )


def _guidance(m: Manifest) -> None:
    seen = set()
    for i, guidance in enumerate(m.guidance):
        if guidance.name in seen:
            raise malformed(f"guidance[{i}].name", f"repeats {show(guidance.name)}", "a name of its own")
        seen.add(guidance.name)
        if guidance.above is not None and guidance.at_least is not None:
            raise malformed(f"guidance[{i}]", "has two conditions", "`above`, `at_least`, or neither")


def _schedules(m: Manifest) -> None:
    if m.schedules is None:
        return
    _known("schedules.default", m.schedules.default, m.schedules.samplers, "a sampler")
    low, high = m.schedules.samplers[m.schedules.default].steps
    if not low <= m.schedules.default_steps <= high:
        raise malformed(
            "schedules.default_steps",
            f"is {m.schedules.default_steps}",
            f"{low} to {high}, as the sampler takes",
        )
    strength = m.schedules.strength
    if (
        strength is not None
        and strength.default < 1
        and m.schedules.samplers[m.schedules.default].order is None
    ):
        raise malformed(
            "schedules.strength.default",
            f"is {strength.default}, but the default sampler has no `order`",
            "1, or a sampler that may start midway",
        )


def _deltas(m: Manifest) -> None:
    if m.deltas is None:
        return
    _known("deltas.axis", m.deltas.axis, m.axes, "an axis")
    _known("deltas.gate", m.deltas.gate, m.tensors, "a tensor that the runtime provides")
    if m.tensors[m.deltas.gate].source != "gate":
        raise malformed("deltas.gate", f"is {show(m.deltas.gate)}", "a tensor with source `gate`")
    modules = set()
    for i, target in enumerate(m.deltas.targets):
        where = f"deltas.targets[{i}]"
        if target.module in modules:
            raise malformed(f"{where}.module", f"repeats {show(target.module)}", "one entry for each module")
        modules.add(target.module)
        if (target.kind == "conv") != (target.kernel is not None):
            raise malformed(
                f"{where}.kernel", f"does not go with kind {target.kind}", "`kernel` for conv and only there"
            )
        if (target.kind == "experts") != (target.experts is not None):
            raise malformed(
                f"{where}.experts",
                f"does not go with kind {target.kind}",
                "`experts` for experts and only there",
            )
        if target.rank > m.deltas.rank:
            raise malformed(f"{where}.rank", f"is {target.rank}", f"at most `deltas.rank`, {m.deltas.rank}")


def _shape(m: Manifest, where: str, shape: tuple[int | str, ...]) -> None:
    for dimension in shape:
        if isinstance(dimension, str):
            _known(where, dimension, m.axes, "an axis")
    size = math.prod(d if isinstance(d, int) else m.least_sizes[d] for d in shape)
    if size > 2**40:
        raise malformed(where, "has more than 2^40 elements", "a tensor that a machine could hold")


def _tensors(m: Manifest) -> None:
    scales = {guidance.name for guidance in m.guidance}
    for name, tensor in m.tensors.items():
        where = f"tensors[{show(name)}]"
        _shape(m, f"{where}.shape", tensor.shape)
        allowed = _SOURCE_KEYS[tensor.source]
        for key in _OPTIONAL_KEYS:
            given = getattr(tensor, key) not in (None, ())
            if given and key not in allowed:
                shown = "from" if key == "origin" else key
                raise malformed(f"{where}.{shown}", f"does not go with source {tensor.source}", "no such key")
            if not given and key in allowed and key not in ("text", "constant", "index", "origin", "resize"):
                raise malformed(f"{where}.{key}", "is missing", f"it with source {tensor.source}")
        _source(m, where, tensor, scales)
    if m.deltas is not None:
        for name in m.deltas.tensors:
            if name in m.tensors:
                raise malformed(f"tensors[{show(name)}]", "is a delta", "deltas in `deltas` alone")


def _source(m: Manifest, where: str, tensor: ProvidedTensor, scales: set[str]) -> None:
    """What each source fixes about a tensor's dtype and shape."""
    integers, floats = ("int32", "int64"), ("float32",)
    batch = ("batch",)
    if tensor.source in ("image", "text", "noise", "guidance", "gate") and tensor.shape[:1] != batch:
        raise malformed(f"{where}.shape", f"is {list(tensor.shape)}", "`batch` as the first axis")
    if tensor.source == "image":
        _fixed(where, tensor, ("uint8",))
        if len(tensor.shape) != 4 or tensor.shape[3] != 3:
            raise malformed(f"{where}.shape", f"is {list(tensor.shape)}", '["batch", height, width, 3]')
        _picture(m, where, tensor)
    elif tensor.source == "text":
        if (tensor.text is None) == (tensor.constant is None):
            raise malformed(where, "does not say which text", "exactly one of `text` and `constant`")
        _known(f"{where}.tokenizer", tensor.tokenizer or "", m.tokenizers, "a tokenizer")
        _fixed(where, tensor, integers, ("batch", m.tokenizers[tensor.tokenizer or ""].max_length))
    elif tensor.source == "mask":
        _known(f"{where}.of", tensor.of or "", m.tensors, "a tensor that the runtime provides")
        text = m.tensors[tensor.of or ""]
        if text.source != "text":
            raise malformed(f"{where}.of", f"is {show(tensor.of)}", "a tensor with source `text`")
        _fixed(where, tensor, integers, text.shape)
    elif tensor.source == "noise":
        _fixed(where, tensor, floats)
    elif tensor.source == "schedule":
        if m.schedules is None:
            raise malformed(where, "reads the schedule, but there is no `schedules`", "a `schedules` section")
        if tensor.column == "start" and m.schedules.strength is None:
            raise malformed(
                where, "reads where a request starts, but there is no `schedules.strength`", "`strength`"
            )
        row = tensor.column in ("coefficients", "start")
        _fixed(where, tensor, floats, None if row else ())
        if row and (len(tensor.shape) != 1 or not isinstance(tensor.shape[0], int)):
            raise malformed(f"{where}.shape", f"is {list(tensor.shape)}", "[K], an integer")
    elif tensor.source == "guidance":
        _known(f"{where}.guidance", tensor.guidance or "", scales, "a guidance scale")
        _fixed(where, tensor, floats, batch)
    elif tensor.source == "gate":
        _fixed(where, tensor, floats, batch)


def _picture(m: Manifest, where: str, tensor: ProvidedTensor) -> None:
    """Which of a request's photographs a tensor shows, and at what size."""
    if (tensor.index or 0) >= _MAX_PICTURES:
        raise malformed(f"{where}.index", f"is {tensor.index}", f"a number below {_MAX_PICTURES}")
    if tensor.origin is not None:
        _known(f"{where}.from", tensor.origin, m.tensors, "a tensor that the runtime provides")
        origin = m.tensors[tensor.origin]
        if origin.source != "image" or origin.resize or (origin.index or 0) != (tensor.index or 0):
            raise malformed(
                f"{where}.from", f"is {show(tensor.origin)}",
                "a tensor with source `image`, the same `index` and no `resize`",
            )  # fmt: skip
        if not tensor.resize:
            raise malformed(f"{where}.resize", "is missing", "it with `from`")
    for step in tensor.resize:
        if (step.min_area or 1) > (step.max_area or math.inf):
            raise malformed(f"{where}.resize", "has a min_area above its max_area", "the smaller one first")


def _fixed(
    where: str, tensor: ProvidedTensor, dtypes: tuple[str, ...], shape: tuple[int | str, ...] | None = None
) -> None:
    if tensor.dtype not in dtypes:
        raise malformed(
            f"{where}.dtype", f"is {tensor.dtype}", " or ".join(dtypes) + f" with source {tensor.source}"
        )
    if shape is not None and tensor.shape != shape:
        raise malformed(
            f"{where}.shape", f"is {list(tensor.shape)}", f"{list(shape)} with source {tensor.source}"
        )


def _graphs(m: Manifest) -> None:
    for name, graph in m.graphs.items():
        for side, values in (("inputs", graph.inputs), ("outputs", graph.outputs)):
            seen = set()
            for i, value in enumerate(values):
                where = f"graphs[{show(name)}].{side}[{i}]"
                if value.name in seen:
                    raise malformed(f"{where}.name", f"repeats {show(value.name)}", "a name of its own")
                seen.add(value.name)
                _shape(m, f"{where}.shape", value.shape)


def _program(m: Manifest) -> None:
    ports = 0
    for i, call in enumerate(m.program):
        where = f"program[{i}]"
        _known(f"{where}.graph", call.graph, m.graphs, "a graph of this bundle")
        graph = m.graphs[call.graph]
        ports += len(graph.inputs) + len(graph.outputs)
        if ports > _MAX_PORTS:
            raise malformed(
                "program", "has more than 2^20 inputs and outputs", "a program that a machine could run"
            )
        for side, mapping, values in (
            ("inputs", call.inputs, graph.inputs),
            ("outputs", call.outputs, graph.outputs),
        ):
            names = {value.name for value in values}
            for key in mapping:
                _known(f"{where}.{side}", key, names, f"among the {side} of graph {show(call.graph)}")
    made = {name for call in m.program for name in m.writes(call).values()}
    for i, state in enumerate(m.state):
        _known(f"state[{i}].next", state.next, made, "made by a call")
        if state.tensor in m.tensors or (m.deltas is not None and state.tensor in m.deltas.tensors):
            raise malformed(
                f"state[{i}].tensor",
                f"is {show(state.tensor)}, which has another source",
                "a name of its own",
            )
    # Execution order: phase by phase, within a phase in the order of the list.
    order = sorted(range(len(m.program)), key=lambda i: PHASES.index(m.program[i].phase))
    for guided in (False, True) if any(scale.decides for scale in m.guidance) else (False,):
        _flow(m, [i for i in order if m.program[i].runs(guided)], guided)


def _flow(m: Manifest, order: list[int], guided: bool) -> None:
    """Every tensor has one producer that comes before its readers, and both agree about dtype and shape."""
    states = {state.tensor: state for state in m.state}
    if len(states) != len(m.state):
        raise malformed("state", "names a tensor twice", "one entry for each tensor")
    deltas = m.deltas.tensors if m.deltas is not None else {}
    made: dict[str, tuple[Value, int]] = {}
    fixed: set[str] = set()  # tensors that a load call may read
    for i in order:
        call = m.program[i]
        where = f"program[{i}]"
        for value in m.graphs[call.graph].inputs:
            name = call.inputs.get(value.name, value.name)
            _readable(m, f"{where}.inputs[{show(value.name)}]", name, call, states, made, deltas, fixed)
            _agree(m, f"{where}.inputs[{show(value.name)}]", value, m.signatures[name])
        for value in m.graphs[call.graph].outputs:
            name = call.outputs.get(value.name, value.name)
            key = f"{where}.outputs[{show(value.name)}]"
            if name in made:
                raise malformed(
                    key,
                    f"makes {show(name)}, which program[{made[name][1]}] makes too (guided: {guided})",
                    "one producer for each tensor",
                )
            if name in m.tensors or name in states:
                raise malformed(key, f"makes {show(name)}, which the runtime provides", "a name of its own")
            _agree(m, key, value, m.signatures[name])
            if call.phase == "load":
                fixed.add(name)
                if any(isinstance(d, str) and d != "batch" for d in value.shape):
                    raise malformed(
                        key, f"has shape {list(value.shape)}", "no axis but `batch` in the load phase"
                    )
            made[name] = (value, i)
    _state(m, made)
    _results(m, made)


def _readable(
    m: Manifest,
    where: str,
    name: str,
    call: Call,
    states: Mapping[str, object],
    made: Mapping[str, object],
    deltas: Mapping[str, object],
    fixed: set[str],
) -> None:
    tensor = m.tensors.get(name)
    if tensor is not None:
        constant = tensor.constant is not None or (
            tensor.source == "mask" and m.tensors[tensor.of or ""].constant is not None
        )
        if call.phase == "load" and not constant:
            raise malformed(
                where, f"reads {show(name)} in the load phase", "constant texts and what is made of them"
            )
        if call.phase != "step" and tensor.changes:
            raise malformed(
                where, f"reads {show(name)} in phase {call.phase}", "the step phase, where it has a value"
            )
        return
    if call.phase == "load":
        if name not in fixed:
            raise malformed(
                where, f"reads {show(name)} in the load phase", "constant texts and what is made of them"
            )
    elif name in states:
        if call.phase == "request":
            raise malformed(
                where, f"reads the state {show(name)} before the steps", "a tensor of the request"
            )
    elif name not in made and name not in deltas:
        raise malformed(
            where, f"reads {show(name)}, which nothing makes before", "a tensor that exists by then"
        )


def _agree(m: Manifest, where: str, value: Value, other: Value) -> None:
    if value.dtype != other.dtype:
        raise malformed(
            where, f"has dtype {value.dtype}, but {show(other.name)} is {other.dtype}", "equal dtypes"
        )
    if len(value.shape) == len(other.shape) and all(
        map(lambda a, b: _same(m, a, b), value.shape, other.shape)
    ):
        return
    raise malformed(
        where,
        f"has shape {list(value.shape)}, but {show(other.name)} has {list(other.shape)}",
        "equal shapes",
    )


def _same(m: Manifest, a: int | str, b: int | str) -> bool:
    """Equal dimensions; an axis that is ``one_or`` of another goes with that other."""
    if a == b:
        return True
    return any(isinstance(x, str) and m.axes[x].one_or == y for x, y in ((a, b), (b, a)))


def _state(m: Manifest, made: Mapping[str, tuple[Value, int]]) -> None:
    for i, state in enumerate(m.state):
        where = f"state[{i}]"
        if state.next not in made or m.program[made[state.next][1]].phase != "step":
            raise malformed(
                f"{where}.next",
                f"is {show(state.next)}, which no step call makes",
                "an output of a step call",
            )
        signature = m.signatures[state.tensor]
        if isinstance(state.initial, str):
            initial = state.initial
            provided = m.tensors.get(initial)
            per_step = provided is not None and provided.changes
            early = initial in made and m.program[made[initial][1]].phase in ("load", "request")
            if per_step or (provided is None and not early):
                raise malformed(
                    f"{where}.initial",
                    f"is {show(initial)}, which does not exist before the steps",
                    "a tensor made in the request or load phase, or provided",
                )
            _agree(m, f"{where}.initial", m.signatures[initial], signature)
        else:
            _shape(m, f"{where}.initial.zeros", state.initial.zeros)
            _agree(
                m, f"{where}.initial", Value(state.tensor, signature.dtype, state.initial.zeros), signature
            )
        _agree(m, f"{where}.next", made[state.next][0], signature)


def _results(m: Manifest, made: Mapping[str, object]) -> None:
    if m.results.image is None and not m.results.deltas and not m.results.outputs:
        raise malformed("results", "is empty", "an `image`, `deltas` or `outputs`")
    if m.results.image is not None:
        _known("results.image", m.results.image, made, "made by a call")
        value = m.signatures[m.results.image]
        if (
            value.dtype != "uint8"
            or len(value.shape) != 4
            or value.shape[0] != "batch"
            or value.shape[3] != 3
        ):
            raise malformed(
                "results.image", f"is {value.dtype} {list(value.shape)}", "uint8 [batch, height, width, 3]"
            )
    for i, name in enumerate(m.results.deltas):
        key = f"results.deltas[{i}]"
        _known(key, name, made, "made by a call")
        if m.deltas is not None:
            _known(key, name, m.deltas.tensors, "in `deltas`")
        elif not name.endswith((".lora_A", ".lora_B")):
            raise malformed(key, f"is {show(name)}", "a name that ends in `.lora_A` or `.lora_B`")
        elif m.signatures[name].dtype != "float32" or len(m.signatures[name].shape) < 3:
            value = m.signatures[name]
            raise malformed(key, f"is {value.dtype} {list(value.shape)}", "float32 with at least 3 axes")
    seen: set[str] = set()
    for i, name in enumerate(m.results.outputs):
        _known(f"results.outputs[{i}]", name, made, "made by a call")
        if name in seen:
            raise malformed(f"results.outputs[{i}]", f"repeats {show(name)}", "each name once")
        seen.add(name)


def _engines(m: Manifest) -> None:
    for name, engine in m.engines.items():
        where = f"engines[{show(name)}]"
        for axis, sizes in engine.shapes.items():
            key = f"{where}.shapes[{show(axis)}]"
            _known(f"{where}.shapes", axis, m.axes, "an axis")
            limits = m.axes[axis]
            if limits.min is None or limits.max is None:
                raise malformed(key, "is a derived axis", "an axis with limits of its own")
            if any(not limits.min <= size <= limits.max or size % limits.multiple for size in sizes):
                raise malformed(
                    key,
                    f"is {list(sizes)}",
                    f"multiples of {limits.multiple} from {limits.min} to {limits.max}",
                )


def _image(m: Manifest) -> None:
    if m.image is None:
        return
    policy = m.image
    _known("image.tensor", policy.tensor, m.tensors, "a tensor that the runtime provides")
    if m.tensors[policy.tensor].source != "image":
        raise malformed("image.tensor", f"is {show(policy.tensor)}", "a tensor with source `image`")
    low, high = -(-policy.min // policy.multiple), policy.max // policy.multiple
    if low > high:
        raise malformed(
            "image",
            f"has no multiple of {policy.multiple} from {policy.min} to {policy.max}",
            "at least one size",
        )
    for i, size in enumerate(policy.sizes):
        if any(side % policy.multiple or not policy.min <= side <= policy.max for side in size):
            raise malformed(
                f"image.sizes[{i}]",
                f"is {list(size)}",
                f"multiples of {policy.multiple} from {policy.min} to {policy.max}",
            )


def _linked(m: Manifest) -> None:
    graph_files = {graph.file for graph in m.graphs.values()}
    graph_files |= {file for variant in m.variants.values() for file in variant.graphs.values()}
    for graph_file, tensors in m.linked.items():
        where = f"linked[{show(graph_file)}]"
        _known("linked", graph_file, graph_files, "the file of a graph")
        for name, tensor in tensors.items():
            key = f"{where}[{show(name)}]"
            _known(f"{key}.source", tensor.source, m.sources, "a source id")
            files = m.sources[tensor.source].files
            _known(f"{key}.file", tensor.file, files, f"a file of source {show(tensor.source)}")
            if tensor.length != math.prod(tensor.shape) * ITEM_SIZES[tensor.dtype]:
                raise malformed(
                    f"{key}.length", f"is {tensor.length}", f"the size of {tensor.dtype} {list(tensor.shape)}"
                )
            if tensor.offset + tensor.length > files[tensor.file].size:
                raise malformed(
                    f"{key}.offset",
                    f"is {tensor.offset}, which reads past the file's end",
                    "an offset within the file",
                )
