"""A store asked with patience: one fsspec file system.

What may pass (a connection that was cut, a timeout, 429, 5xx) is tried again; what stays becomes
one line. What a backend says is never shown: it may hold a signed request.
"""

from __future__ import annotations

import itertools
import random
import time
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from uipe_merge.errors import RemoteError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

Result = TypeVar("Result")
System: TypeAlias = Any  # an fsspec file system: the library has no types

_TRIES = 5
_FIRST_WAIT = 0.3  # seconds at most, doubled from try to try
_PATIENCE = 60.0  # seconds after which nothing is tried again
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
# We try again ourselves, and see changes: the libraries need not do either once more.
_OPTIONS: dict[str, dict[str, object]] = {
    "s3": {"config_kwargs": {"retries": {"max_attempts": 0}}},
    "s3a": {"config_kwargs": {"retries": {"max_attempts": 0}}},
}


class IgnoresRangesError(Exception):
    """The server sent more than the range that was asked for."""


class Store:
    """One fsspec file system, asked with patience."""

    def __init__(self, scheme: str, location: str) -> None:
        import fsspec

        try:
            self._system: System = fsspec.filesystem(
                scheme, use_listings_cache=False, **_OPTIONS.get(scheme, {})
            )
        except ImportError:
            extra = _EXTRAS.get(scheme)
            install = f"pip install 'uipe-merge[{extra}]'" if extra else "pip install"
            raise UsageError(
                f"needs a package for {scheme}:// that is not installed",
                file=location,
                remedy=f"`{install}`" if extra else "install the fsspec backend for it",
            ) from None
        except ValueError:
            raise UsageError(
                f"has the scheme {scheme}://, which is not known",
                file=location,
                remedy="use s3://, gs://, or another that fsspec knows",
            ) from None
        protocol = self._system.protocol
        self.kind = protocol if isinstance(protocol, str) else str(protocol[0])

    def path(self, location: str) -> str:
        """Return the path of a URL in the words of the backend."""
        return str(self._system._strip_protocol(location))  # noqa: SLF001 - fsspec has no other way

    def ask(self, shown: str, request: Callable[[System], Result]) -> Result:
        """Do a request, again where that may help; ``shown`` is what it is about.

        Raises:
            RemoteError: It was refused, or kept failing, or there is no such object.
        """
        try:
            return self._attempt(shown, request)
        except FileNotFoundError:
            raise RemoteError(
                "there is no such object or bucket",
                file=shown,
                remedy="check the URL, and create the bucket if it is missing",
            ) from None

    def ask_for(self, shown: str, request: Callable[[System], Result]) -> Result | None:
        """Do a request as ``ask`` does; ``None`` where there is no such object."""
        try:
            return self._attempt(shown, request)
        except FileNotFoundError:
            return None

    def _attempt(self, shown: str, request: Callable[[System], Result]) -> Result:
        began = time.monotonic()
        for attempt in itertools.count(1):
            try:
                return request(self._system)
            except FileNotFoundError:
                raise
            except Exception as error:  # noqa: BLE001 - a backend raises whatever its library does
                late = attempt == _TRIES or time.monotonic() - began > _PATIENCE
                if (refusal := _refusal(error)) or late:
                    raise _remote_error(shown, refusal, error, attempt) from None
                # A library may keep its failure for long, and with it every frame below ours and
                # above: a buffer among them could not be resized.
                error.__traceback__ = None
            # Not all at once again, where several threads were refused together.
            time.sleep(_FIRST_WAIT * 2 ** (attempt - 1) * random.uniform(0.5, 1))  # noqa: S311
        raise AssertionError  # it counts for ever


def _refusal(error: Exception) -> tuple[str, str] | None:
    """Return message and remedy of a failure that trying again will not cure."""
    status = getattr(error, "status", None) or getattr(error, "code", None)
    if "Credential" in type(error).__name__:
        return "no usable credentials were found", "give them by the environment (`AWS_PROFILE`, …)"
    if isinstance(error, PermissionError) or status in (401, 403, "401", "403"):
        return "access denied", "check the credentials and what they may do"
    if isinstance(error, IgnoresRangesError):
        return "the server ignores byte ranges", "download the checkpoint first"
    if isinstance(error, NotImplementedError):
        return "this store cannot do that", "use a local directory and copy it"
    return None


def _remote_error(
    shown: str, refusal: tuple[str, str] | None, error: Exception, tries: int
) -> RemoteError:
    if refusal is not None:
        return RemoteError(refusal[0], file=shown, remedy=refusal[1])
    return RemoteError(
        f"the store did not do it in {tries} tries (last: {type(error).__name__})",
        file=shown,
        remedy="check the connection and run the same command again",
    )
