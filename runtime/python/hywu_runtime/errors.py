"""The errors that a user may meet. Both the runtime and the toolchain raise these and no others.

A message has three parts: what is wrong with which thing, what was expected, what to do about it.
"""

from __future__ import annotations


class HywuError(Exception):
    """Base of all errors raised on purpose. ``str(error)`` is one paragraph of up to three sentences."""

    exit_code = 1

    def __init__(self, wrong: str, expected: str = "", remedy: str = ""):
        self.wrong, self.expected, self.remedy = wrong, expected, remedy
        sentences = [part.strip().rstrip(".") + "." for part in (wrong, expected, remedy) if part]
        super().__init__(" ".join(sentences))


class BundleError(HywuError):
    """A bundle, its manifest or one of its files is missing, damaged or of another format."""

    exit_code = 2


class CheckpointError(HywuError):
    """A checkpoint (base, generator, adapter) is missing, damaged or inconsistent."""

    exit_code = 2


class UnsupportedError(HywuError):
    """The input is sound, but asks for something that this version does not do."""

    exit_code = 2


class DeltaError(HywuError):
    """A set of deltas does not fit the bundle: missing, extra, mis-shaped, mis-typed or non-finite."""

    exit_code = 2


class InputError(HywuError):
    """An argument, an image or a prompt cannot be used."""

    exit_code = 2


class EngineError(HywuError):
    """A compiled engine cannot be built, loaded or run."""


class DeviceError(HywuError):
    """The backend or device that was asked for is not there."""


class CancelledError(HywuError):
    """The caller cancelled the request; what ran it can be used again."""
