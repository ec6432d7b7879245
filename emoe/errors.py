"""Every exception emoe raises on purpose. Native code raises the same classes (csrc/bindings/errors.cpp)."""

from __future__ import annotations

from collections.abc import Callable


class EmoeError(Exception):
    """Base of all errors raised by emoe."""


class ConfigError(EmoeError, ValueError):
    """An option, environment value or argument is not one of the choices; the message lists them."""


class MissingFileError(ConfigError, FileNotFoundError):
    """A path names no file; says what was looked for there."""


class BudgetError(EmoeError):
    """The model cannot run inside the byte budget; names the smallest budget that works.

    Attributes:
        needed: smallest workable budget in bytes, or None where unknown.
        budget: the budget that was asked for, in bytes.
    """

    def __init__(self, message: str, *, needed: int | None = None, budget: int | None = None) -> None:
        super().__init__(message)
        self.needed = needed
        self.budget = budget


class UnsupportedModelError(EmoeError):
    """The model has no experts that emoe can manage; names its class and the families that work."""


class CheckpointError(EmoeError):
    """A checkpoint is truncated, corrupt, incomplete, or of another shape or dtype than its config says.

    Attributes:
        file: path of the file, or "".
        tensor: name of the tensor, or "".
        offset: first byte of the range that failed, or -1.
        nbytes: length of that range in bytes, or -1.
    """

    def __init__(self, message: str, *, file: str = "", tensor: str = "", offset: int = -1, nbytes: int = -1) -> None:
        super().__init__(message)
        self.file = file
        self.tensor = tensor
        self.offset = offset
        self.nbytes = nbytes


class UnsupportedEncodingError(CheckpointError, UnsupportedModelError):
    """A tensor is sound, in a format that emoe does not compute with; names it, and what is read instead."""


class ReadError(CheckpointError, OSError):
    """Reading expert bytes failed: an I/O error, or fewer bytes than the checkpoint promises."""


class StoreError(EmoeError, OSError):
    """Writing experts to the store failed (no space, no permission); nothing half-written is left behind."""


class WriteError(EmoeError, OSError):
    """A file cannot be written (no folder, no space, no permission); what was there before stays as it was."""


class CacheError(EmoeError):
    """A slot was asked to make a transition its state does not allow."""


class CacheFullError(CacheError):
    """Every slot of a layer is loading or held, so none can take another expert."""


class TransferError(EmoeError):
    """The transfer queue refused or lost a job."""


class QueueFullError(TransferError):
    """A prefetch would exceed the queue's bound in bytes."""


class CancelledError(TransferError):
    """The ticket was cancelled before its bytes arrived."""


class ClosedError(EmoeError):
    """The object was closed; a closed emoe model has no experts to run."""


class SaveError(EmoeError):
    """The model cannot be saved or given whole here; says why and what to do instead."""


class ExpertsElsewhereError(EmoeError):
    """The weights of experts were asked for where they are not: they are in a store; says what to do instead."""


class TraceError(EmoeError):
    """A routing trace is missing a field or has the wrong shape."""


class BackendUnavailable(EmoeError):
    """A compute backend was asked for that this build or machine does not have."""


class OverloadedError(EmoeError):
    """More is asked for than can be served in time, so the request is refused; nothing of it was begun.

    Attributes:
        retry_after: seconds after which to ask again.
    """

    def __init__(self, message: str, *, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[Callable[..., OverloadedError], tuple[str, float]]:
        return _overloaded, (str(self), self.retry_after)


def _overloaded(message: str, retry_after: float) -> OverloadedError:
    return OverloadedError(message, retry_after=retry_after)


class DemoBuildError(EmoeError):
    """The demo model could not be built; nothing half-built is left behind."""


def one_line(error: BaseException) -> str:
    """The message without line breaks; the class name where there is none."""
    return " ".join(str(error).split()) or type(error).__name__
