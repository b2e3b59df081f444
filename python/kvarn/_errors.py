"""Exceptions. Each one is also the standard exception that fits it best."""

from __future__ import annotations


class KvarnError(Exception):
    """Base of every exception that kvarn raises on purpose."""


class InvalidArgumentError(KvarnError, ValueError):
    """A value, shape, stride or device outside what the message says was expected."""


class ArgumentTypeError(KvarnError, TypeError):
    """An argument of the wrong type or element type, or a tensor that requires grad or has no memory."""


class UnsupportedError(KvarnError, NotImplementedError):
    """The request is well formed, but this backend or build cannot do it."""


class OutOfMemoryError(KvarnError, MemoryError):
    """Memory could not be allocated."""


class OutOfBlocksError(KvarnError, MemoryError):
    """The pool has too few free blocks or slots; every sequence is as it was before the call."""


class StaleHandleError(KvarnError, RuntimeError):
    """A sequence that was freed already."""


class UnavailableError(KvarnError, RuntimeError):
    """The backend exists but cannot run here; the message says why."""


class LaunchError(KvarnError, RuntimeError):
    """The device runtime reported an error."""


class CorruptError(KvarnError, RuntimeError):
    """Stored data fails its checks."""


class InternalError(KvarnError, RuntimeError):
    """A defect of kvarn."""
