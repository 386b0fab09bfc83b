"""The C ABI through ctypes, with the verbs of :class:`hywu_runtime.Editor`, so that one test can run both."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

UINT8, INT32, INT64, FLOAT16, FLOAT32, BFLOAT16, FLOAT64 = range(1, 8)
_DTYPES = {
    "uint8": UINT8, "int32": INT32, "int64": INT64,
    "float16": FLOAT16, "float32": FLOAT32, "float64": FLOAT64,
}  # fmt: skip
STATUS = {
    0: "OK", -1: "BUNDLE", -2: "CHECKPOINT", -3: "UNSUPPORTED", -4: "DELTA", -5: "ENGINE", -6: "DEVICE",
    -7: "INPUT", -8: "CANCELLED", -9: "MEMORY", -10: "CALLBACK", -11: "INTERNAL",
}  # fmt: skip

_P, _S, _I32, _SZ = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32, ctypes.c_size_t
Progress = ctypes.CFUNCTYPE(_I32, _P, _I32, _I32)
Log = ctypes.CFUNCTYPE(None, _P, _I32, _S)


class Pixels(ctypes.Structure):
    _fields_ = [("data", _P), ("width", _I32), ("height", _I32), ("stride", _SZ)]


class Tensor(ctypes.Structure):
    _fields_ = [("name", _S), ("data", _P), ("dtype", _I32), ("rank", _I32), ("shape", ctypes.c_int64 * 8)]


class Guidance(ctypes.Structure):
    _fields_ = [("name", _S), ("scale", ctypes.c_double), ("scales", ctypes.POINTER(ctypes.c_double))]


class BundleParams(ctypes.Structure):
    _fields_ = [
        ("struct_size", _SZ), ("verify", _I32), ("reserved", _I32), ("source_count", _SZ),
        ("source_ids", ctypes.POINTER(_S)), ("source_directories", ctypes.POINTER(_S)),
    ]  # fmt: skip


class EditorParams(ctypes.Structure):
    _fields_ = [
        ("struct_size", _SZ), ("backend", _S), ("variant", _S), ("device", _I32), ("threads", _I32),
        ("low_memory", _I32), ("reserved", _I32), ("engine", _S),
    ]  # fmt: skip


class EditParams(ctypes.Structure):
    _fields_ = [
        ("struct_size", _SZ), ("count", _SZ), ("photos", ctypes.POINTER(Pixels)),
        ("prompts", ctypes.POINTER(_S)), ("prompt_lengths", ctypes.POINTER(_SZ)),
        ("negative_prompts", ctypes.POINTER(_S)), ("negative_prompt_lengths", ctypes.POINTER(_SZ)),
        ("seed", ctypes.c_uint64), ("seeds", ctypes.POINTER(ctypes.c_uint64)),
        ("guidance", ctypes.POINTER(Guidance)), ("guidance_count", _SZ),
        ("delta_strength", ctypes.c_double), ("delta_strengths", ctypes.POINTER(ctypes.c_double)),
        ("deltas", ctypes.POINTER(_P)), ("delta_count", _SZ), ("sampler", _S), ("steps", _I32),
        ("width", _I32), ("height", _I32), ("reserved", _I32),
        ("noise", ctypes.POINTER(Tensor)), ("latents", ctypes.POINTER(Tensor)),
        ("inputs", ctypes.POINTER(Tensor)), ("input_count", _SZ),
        ("progress", Progress), ("progress_user", _P), ("cancel", _P), ("strength", ctypes.c_double),
        ("photo_count", _SZ),
    ]  # fmt: skip


class GenerateParams(ctypes.Structure):
    _fields_ = [
        ("struct_size", _SZ), ("photo", ctypes.POINTER(Pixels)), ("prompt", _S), ("prompt_length", _SZ),
        ("width", _I32), ("height", _I32), ("inputs", ctypes.POINTER(Tensor)), ("input_count", _SZ),
        ("cancel", _P), ("photo_count", _SZ),
    ]  # fmt: skip


class RunParams(ctypes.Structure):
    _fields_ = [
        ("struct_size", _SZ), ("inputs", ctypes.POINTER(Tensor)), ("input_count", _SZ),
        ("outputs", ctypes.POINTER(_S)), ("output_count", _SZ), ("delta_strength", ctypes.c_double),
        ("delta_strengths", ctypes.POINTER(ctypes.c_double)), ("strength_count", _SZ),
        ("deltas", ctypes.POINTER(_P)), ("delta_count", _SZ), ("cancel", _P),
    ]  # fmt: skip


class Limits(ctypes.Structure):
    _fields_ = [
        ("struct_size", _SZ), ("batch_min", _I32), ("batch_max", _I32), ("has_size", _I32),
        ("size_multiple", _I32), ("size_min", _I32), ("size_max", _I32),
        ("size_default_area", ctypes.c_int64),
        ("rank", _I32), ("edits", _I32), ("generates", _I32), ("default_steps", _I32),
        ("sampler_count", _SZ), ("guidance_count", _SZ), ("default_strength", ctypes.c_double),
        ("photo_count", _SZ),
    ]  # fmt: skip


class Memory(ctypes.Structure):
    _fields_ = [
        ("struct_size", _SZ),
        *((n, ctypes.c_uint64) for n in ("buffers", "constants", "graphs", "shared")),
    ]


class Timings(ctypes.Structure):
    _fields_ = [
        ("struct_size", _SZ), ("total", ctypes.c_double), ("load", ctypes.c_double),
        ("graph_count", _SZ), ("step_count", _SZ),
    ]  # fmt: skip


class NativeError(Exception):
    """A negative status, and what hywu_last_error says."""

    def __init__(self, library: Library):
        lib = library.lib
        self.status = STATUS[lib.hywu_last_status()]
        self.parts = tuple(lib.hywu_last_error_part(i).decode() for i in range(3))
        super().__init__(lib.hywu_last_error().decode())


class Library:
    """The loaded library; functions that give a status raise NativeError."""

    def __init__(self, path: Path):
        self.path = path
        self.lib = lib = ctypes.CDLL(str(path))
        texts = (
            "version_string", "status_name", "last_error", "last_error_part", "backend", "backend_missing",
            "bundle_name", "bundle_variant", "bundle_engine", "editor_backend", "editor_sampler",
            "editor_guidance", "editor_output",
        )  # fmt: skip
        for name in texts:
            getattr(lib, f"hywu_{name}").restype = _S
        for name in ("images_count", "deltas_count", "tensors_count"):
            getattr(lib, f"hywu_{name}").restype = _SZ
        for name in ("deltas_rank", "deltas_batch"):
            getattr(lib, f"hywu_{name}").restype = ctypes.c_int64
        for name in ("bundle", "editor", "images", "deltas", "tensors", "cancel"):
            function = getattr(lib, f"hywu_{name}_free")
            function.restype, function.argtypes = None, [_P]
        for name in ("cancel_request", "cancel_reset"):
            function = getattr(lib, f"hywu_{name}")
            function.restype, function.argtypes = None, [_P]
        lib.hywu_backend.argtypes = [_SZ]
        for name in ("bundle_variant", "bundle_engine", "editor_sampler", "editor_output"):
            getattr(lib, f"hywu_{name}").argtypes = [_P, _SZ]
        lib.hywu_bundle_name.argtypes = lib.hywu_editor_backend.argtypes = [_P]
        lib.hywu_editor_guidance.argtypes = [_P, _SZ, ctypes.POINTER(ctypes.c_double)]
        for name in ("images_count", "deltas_count", "tensors_count", "deltas_rank", "deltas_batch"):
            getattr(lib, f"hywu_{name}").argtypes = [_P]

    def check(self, name: str, *arguments: Any) -> None:
        function = getattr(self.lib, f"hywu_{name}")
        function.restype = _I32
        if function(*arguments) != 0:
            raise NativeError(self)

    def init(self, kind: type[Any], name: str) -> Any:
        params = kind()
        self.check(f"{name}_params_init", ctypes.byref(params), _SZ(ctypes.sizeof(params)))
        return params

    def backends(self) -> dict[str, str | None]:
        found: dict[str, str | None] = {}
        while (name := self.lib.hywu_backend(len(found))) is not None:
            reason = self.lib.hywu_backend_missing(name)
            found[name.decode()] = None if reason is None else reason.decode()
        return found


class Handle:
    """An opaque pointer with its free function."""

    def __init__(self, library: Library, kind: str):
        self.library, self._kind, self.pointer = library, kind, _P()

    def out(self) -> Any:
        return ctypes.byref(self.pointer)

    def close(self) -> None:
        if self.pointer:
            getattr(self.library.lib, f"hywu_{self._kind}_free")(self.pointer)
            self.pointer = _P()

    def __del__(self) -> None:
        self.close()


class Deltas(Handle):
    """A set of deltas behind the C ABI."""

    def __init__(self, library: Library):
        super().__init__(library, "deltas")

    @classmethod
    def load(cls, library: Library, path: Path) -> Deltas:
        made = cls(library)
        library.check("deltas_load", str(path).encode(), made.out())
        return made

    @classmethod
    def create(cls, library: Library, tensors: Mapping[str, Array]) -> Deltas:
        made, keep = cls(library), [(name, np.ascontiguousarray(a)) for name, a in tensors.items()]
        library.check("deltas_create", tensor_list(keep), _SZ(len(keep)), made.out())
        return made

    @classmethod
    def blend(cls, library: Library, parts: Sequence[tuple[Deltas, float]], max_rank: int = 0) -> Deltas:
        made = cls(library)
        sets = (_P * len(parts))(*[deltas.pointer for deltas, _ in parts])
        weights = (ctypes.c_double * len(parts))(*[weight for _, weight in parts])
        library.check("deltas_blend", sets, weights, _SZ(len(parts)), ctypes.c_int64(max_rank), made.out())
        return made

    @classmethod
    def stack(cls, library: Library, sets: Sequence[Deltas]) -> Deltas:
        made = cls(library)
        library.check(
            "deltas_stack", (_P * len(sets))(*[s.pointer for s in sets]), _SZ(len(sets)), made.out()
        )
        return made

    def select(self, sample: int) -> Deltas:
        made = Deltas(self.library)
        self.library.check("deltas_select", self.pointer, ctypes.c_int64(sample), made.out())
        return made

    def save(self, path: Path) -> None:
        self.library.check("deltas_save", self.pointer, str(path).encode())

    def tensors(self) -> dict[str, Array]:
        found = {}
        for i in range(self.library.lib.hywu_deltas_count(self.pointer)):
            tensor = Tensor()
            self.library.check("deltas_tensor", self.pointer, _SZ(i), ctypes.byref(tensor))
            found[tensor.name.decode()] = array_of(tensor)
        return found


def pixels_of(photo: Array) -> Pixels:
    assert photo.dtype == np.uint8
    assert photo.flags.c_contiguous
    return Pixels(photo.ctypes.data, photo.shape[1], photo.shape[0], 0)


def photo_list(given: Any) -> list[Array]:
    """The photos of a request: none, one, or several."""
    if given is None:
        return []
    return list(given) if isinstance(given, list) else [given]


def tensor_of(name: str, array: Array) -> Tensor:
    shape = (ctypes.c_int64 * 8)(*array.shape)
    return Tensor(name.encode(), array.ctypes.data, _DTYPES[array.dtype.name], array.ndim, shape)


def array_of(tensor: Tensor) -> Array:
    """A copy of what the library holds."""
    dtype = np.dtype(next(name for name, number in _DTYPES.items() if number == tensor.dtype))
    shape = tuple(tensor.shape[: tensor.rank])
    data = ctypes.string_at(tensor.data, dtype.itemsize * int(np.prod(shape)))
    return np.frombuffer(data, dtype).reshape(shape)


def tensor_list(named: Sequence[tuple[str, Array]]) -> Any:
    return (Tensor * len(named))(*[tensor_of(name, array) for name, array in named])


class Editor(Handle):
    """An editor behind the C ABI; arguments as in Python, photos as uint8 arrays [H, W, 3]."""

    def __init__(self, library: Library):
        super().__init__(library, "editor")

    @classmethod
    def load(
        cls,
        library: Library,
        path: Path,
        *,
        backend: str | None = None,
        threads: int = 0,
        low_memory: bool = False,
        verify: bool = False,
        sources: Mapping[str, Path] | None = None,
        variant: str | None = None,
        engine: str | None = None,
    ) -> Editor:
        made = cls(library)
        library.check(
            "editor_load", str(path).encode(), bundle_params(library, verify, sources),
            editor_params(library, backend, threads, low_memory, variant, engine), made.out(),
        )  # fmt: skip
        return made

    def edit_batch(
        self,
        requests: Sequence[tuple[Any, str | bytes]],
        *,
        negative_prompt: Sequence[str] | None = None,
        steps: int = 0,
        strength: float = 0.0,
        seed: int | Sequence[int] = 0,
        guidance: Mapping[str, float | Sequence[float]] | None = None,
        delta_strength: float | Sequence[float] = 1.0,
        deltas: Sequence[Deltas] = (),
        sampler: str | None = None,
        size: tuple[int, int] = (0, 0),
        noise: Array | None = None,
        latents: Array | None = None,
        inputs: Mapping[str, Array] | None = None,
        progress: Callable[[int, int], int | None] | None = None,
        cancel: Handle | None = None,
    ) -> list[Array]:
        library, count = self.library, len(requests)
        params = library.init(EditParams, "edit")
        params.count = count
        photos = [photo for given, _ in requests for photo in photo_list(given)]
        if photos:
            params.photos = (Pixels * len(photos))(*map(pixels_of, photos))
            params.photo_count = len(photos) // count
        prompts = [p if isinstance(p, bytes) else p.encode() for _, p in requests]
        params.prompts = (_S * count)(*prompts)
        params.prompt_lengths = (_SZ * count)(*map(len, prompts))
        if negative_prompt is not None:
            params.negative_prompts = (_S * count)(*[p.encode() for p in negative_prompt])
        if isinstance(seed, int):
            params.seed = seed
        else:
            params.seeds = (ctypes.c_uint64 * len(seed))(*seed)
        scales = []
        for name, scale in (guidance or {}).items():
            each = None if isinstance(scale, (int, float)) else (ctypes.c_double * len(scale))(*scale)
            scales.append(Guidance(name.encode(), scale if isinstance(scale, (int, float)) else 0.0, each))
        params.guidance, params.guidance_count = (Guidance * len(scales))(*scales), len(scales)
        if isinstance(delta_strength, (int, float)):
            params.delta_strength = delta_strength
        else:
            params.delta_strengths = (ctypes.c_double * len(delta_strength))(*delta_strength)
        params.deltas, params.delta_count = (_P * len(deltas))(*[d.pointer for d in deltas]), len(deltas)
        params.sampler, params.steps = None if sampler is None else sampler.encode(), steps
        params.strength = strength
        params.width, params.height = size
        keep = [(name, np.ascontiguousarray(a)) for name, a in (inputs or {}).items()]
        params.inputs, params.input_count = tensor_list(keep), len(keep)
        if noise is not None:
            params.noise = ctypes.pointer(tensor_of("", noise))
        if latents is not None:
            params.latents = ctypes.pointer(tensor_of("", latents))
        if progress is not None:
            params.progress = Progress(lambda _, done, total: progress(done, total) or 0)
        if cancel is not None:
            params.cancel = cancel.pointer
        images = Handle(library, "images")
        library.check("edit", self.pointer, ctypes.byref(params), images.out())
        pictures = []
        for i in range(library.lib.hywu_images_count(images.pointer)):
            view = Pixels()
            library.check("images_get", images.pointer, _SZ(i), ctypes.byref(view))
            data = ctypes.string_at(view.data, view.stride * view.height)
            pictures.append(np.frombuffer(data, np.uint8).reshape(view.height, view.width, 3))
        return pictures

    def edit(self, photo: Any, prompt: str | bytes, **options: Any) -> Array:
        return self.edit_batch([(photo, prompt)], **options)[0]

    def generate(
        self,
        photo: Any = None,
        prompt: str = "",
        *,
        size: tuple[int, int] = (0, 0),
        inputs: Mapping[str, Array] | None = None,
    ) -> Deltas:
        params, made = self.library.init(GenerateParams, "generate"), Deltas(self.library)
        if photo is not None:
            photos = photo_list(photo)
            params.photo, params.photo_count = (Pixels * len(photos))(*map(pixels_of, photos)), len(photos)
        params.prompt, params.prompt_length = prompt.encode(), len(prompt.encode())
        params.width, params.height = size
        keep = [(name, np.ascontiguousarray(a)) for name, a in (inputs or {}).items()]
        params.inputs, params.input_count = tensor_list(keep), len(keep)
        self.library.check("generate", self.pointer, ctypes.byref(params), made.out())
        return made

    def run(
        self,
        inputs: Mapping[str, Array],
        *,
        outputs: Sequence[str] = (),
        deltas: Sequence[Deltas] = (),
        delta_strength: float | Sequence[float] = 1.0,
    ) -> dict[str, Array]:
        library, params = self.library, self.library.init(RunParams, "run")
        keep = [(name, np.ascontiguousarray(a)) for name, a in inputs.items()]
        params.inputs, params.input_count = tensor_list(keep), len(keep)
        params.outputs = (_S * len(outputs))(*[name.encode() for name in outputs])
        params.output_count = len(outputs)
        if isinstance(delta_strength, (int, float)):
            params.delta_strength = delta_strength
        else:
            params.delta_strengths = (ctypes.c_double * len(delta_strength))(*delta_strength)
            params.strength_count = len(delta_strength)
        params.deltas, params.delta_count = (_P * len(deltas))(*[d.pointer for d in deltas]), len(deltas)
        tensors = Handle(library, "tensors")
        library.check("run", self.pointer, ctypes.byref(params), tensors.out())
        made = {}
        for i in range(library.lib.hywu_tensors_count(tensors.pointer)):
            tensor = Tensor()
            library.check("tensors_get", tensors.pointer, _SZ(i), ctypes.byref(tensor))
            made[tensor.name.decode()] = array_of(tensor)
        return made

    def outputs(self) -> list[str]:
        found: list[str] = []
        while (name := self.library.lib.hywu_editor_output(self.pointer, _SZ(len(found)))) is not None:
            found.append(name.decode())
        return found

    def warm_up(self) -> None:
        self.library.check("editor_warm_up", self.pointer)

    def _filled(self, kind: type[Any], name: str) -> Any:
        values = kind(struct_size=ctypes.sizeof(kind))
        self.library.check(f"editor_{name}", self.pointer, ctypes.byref(values))
        return values

    def limits(self) -> Any:
        return self._filled(Limits, "limits")

    def memory(self) -> Any:
        return self._filled(Memory, "memory")

    def timings(self) -> tuple[float, dict[str, float], list[float]]:
        totals = self._filled(Timings, "timings")
        graphs, steps = {}, []
        name, seconds = _S(), ctypes.c_double()
        for i in range(totals.graph_count):
            self.library.check(
                "editor_graph_time", self.pointer, _SZ(i), ctypes.byref(name), ctypes.byref(seconds)
            )
            assert name.value is not None
            graphs[name.value.decode()] = seconds.value
        for i in range(totals.step_count):
            self.library.check("editor_step_time", self.pointer, _SZ(i), ctypes.byref(seconds))
            steps.append(seconds.value)
        return totals.total, graphs, steps


class Bundle(Handle):
    """A bundle behind the C ABI, for several editors."""

    def __init__(self, library: Library):
        super().__init__(library, "bundle")

    @classmethod
    def open(cls, library: Library, path: Path) -> Bundle:
        made = cls(library)
        library.check("bundle_open", str(path).encode(), None, made.out())
        return made

    def engines(self) -> list[str]:
        found: list[str] = []
        while (key := self.library.lib.hywu_bundle_engine(self.pointer, len(found))) is not None:
            found.append(key.decode())
        return found

    def editor(self, threads: int = 0, low_memory: bool = False) -> Editor:
        made = Editor(self.library)
        params = editor_params(self.library, None, threads, low_memory, None)
        self.library.check("editor_create", self.pointer, params, made.out())
        return made


def bundle_params(library: Library, verify: bool, sources: Mapping[str, Path] | None) -> Any:
    params, named = library.init(BundleParams, "bundle"), dict(sources or {})
    params.verify, params.source_count = int(verify), len(named)
    params.source_ids = (_S * len(named))(*[name.encode() for name in named])
    params.source_directories = (_S * len(named))(*[str(folder).encode() for folder in named.values()])
    return ctypes.byref(params)


def editor_params(
    library: Library,
    backend: str | None,
    threads: int,
    low_memory: bool,
    variant: str | None,
    engine: str | None = None,
) -> Any:
    params = library.init(EditorParams, "editor")
    params.backend = None if backend is None else backend.encode()
    params.variant = None if variant is None else variant.encode()
    params.engine = None if engine is None else engine.encode()
    params.threads, params.low_memory = threads, int(low_memory)
    return ctypes.byref(params)
