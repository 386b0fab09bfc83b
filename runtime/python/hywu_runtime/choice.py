"""Which backend runs a bundle, and with which of its engines."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from hywu_runtime.backends import COMPILED, Backend, available_backends, create_backend
from hywu_runtime.bundle import Bundle
from hywu_runtime.engines import check_key, usable
from hywu_runtime.errors import DeviceError, EngineError, InputError

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choice:
    """``engines`` are those that may serve requests, the newest first; none where graphs run as they are."""

    backend: Backend
    variant: str | None
    engines: tuple[str, ...]


def choose(
    bundle: Bundle,
    backend: str = "auto",
    device: int | None = None,
    threads: int | None = None,
    variant: str | None = None,
    engine: str | None = None,
) -> Choice:
    """Chooses for :meth:`hywu_runtime.Editor.load`, whose arguments these are.

    ``auto`` takes TensorRT, then TensorRT-RTX, where the bundle has an engine that runs here, and otherwise
    ONNX Runtime. The choice is logged.

    Raises:
        DeviceError: the backend is not there.
        EngineError: it has no engine that can be used.
        InputError: arguments that contradict one another, or name what the bundle does not have.
    """
    if engine is not None:
        check_key(bundle.manifest, engine)
        entry = bundle.manifest.engines[engine]
        for what, asked, own in (("backend", backend, entry.backend), ("variant", variant, entry.variant)):
            if asked not in (None, "auto", own):
                raise InputError(
                    f"Engine {engine} is for {what} {own or 'none'}, not {asked}",
                    f"Expected `{what}` {own or 'to be left out'} beside it",
                    "Leave one of the two out",
                )
        backend, variant = entry.backend, entry.variant
    if backend in COMPILED:
        return _compiled(bundle, backend, device, variant, engine)
    if backend == "auto":
        reasons: dict[str, str | None] | None = None
        for name in COMPILED:
            if not any(e.backend == name and e.variant == variant for e in bundle.manifest.engines.values()):
                continue
            reasons = reasons or available_backends(device or 0)
            if reasons[name] is not None:
                _log.info("engines of %s are passed over: %s", name, reasons[name])
                continue
            try:
                return _compiled(bundle, name, device, variant, None)
            except (DeviceError, EngineError) as error:
                _log.warning("engines of %s are passed over: %s", name, error)
    return Choice(create_backend(backend, device, threads), variant, ())


def _compiled(bundle: Bundle, name: str, device: int | None, variant: str | None, key: str | None) -> Choice:
    made = create_backend(name, device)
    assert made.target is not None  # a compiled backend has one
    keys = usable(bundle.root, bundle.manifest, made.target, variant, key)
    _log.info("backend %s chosen on %s, engine %s", name, made.target.device, keys[0])
    return Choice(made, variant, keys)
