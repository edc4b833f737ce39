"""Every way in which a hub may not answer: what is tried again, and what is said of the rest.

What fails for the moment (too many requests, a server's own error, a broken connection) is
asked for again a few times. What remains becomes one line of our own. The text of an
exception is never shown: it may hold an address that is signed.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from uipe_merge.checkpoint.storage import system_error
from uipe_merge.errors import RemoteError, UipeMergeError

if TYPE_CHECKING:
    from collections.abc import Callable

Answer = TypeVar("Answer")

AGAIN = "run the same command again later: files that have arrived are kept"
"""What to do about a hub that fails."""

_WAITS = (1, 2, 4)  # seconds before each further try
_LONGEST_WAIT = 60  # of those a server may ask for
_PASSING = frozenset([408, 429, 500, 502, 503, 504])
_LOG_IN = "`hf auth login` with a token that may read it (or set HF_TOKEN)"


def patiently(ask: Callable[[], Answer], shown: str) -> Answer:
    """Ask, and ask again after what will pass.

    Args:
        ask: Calls the hub's client.
        shown: What is asked for, in messages.

    Raises:
        RemoteError: The answer is no, or there is none.
        OutputError: The local disk fails.
    """
    from huggingface_hub.errors import HfHubHTTPError

    # The HTTP library's own errors, whichever library this version of the client stands on.
    network: Any = (HfHubHTTPError.__bases__[0], OSError)
    for wait in _WAITS:
        try:
            return ask()
        except network as error:
            if not _passes(error):
                raise _refusal(error, shown) from None
            pause = max(wait, _asked_wait(error))
        time.sleep(pause)
    try:
        return ask()
    except network as error:
        raise _refusal(error, shown) from None


def host() -> str:
    """Return the hub's host; an endpoint may hold a password, so no more of it is shown."""
    return urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname or "the hub"


def _passes(error: Exception) -> bool:
    """Tell whether it may go well the next time."""
    status = _status(error)
    if status is not None:
        return status in _PASSING
    return not isinstance(error, OSError)  # a transport error; the others are final


def _asked_wait(error: Exception) -> int:
    """Return the seconds that a server asked to wait."""
    response: Any = getattr(error, "response", None)
    text = "" if response is None else response.headers.get("Retry-After", "")
    return min(int(text), _LONGEST_WAIT) if text.isdecimal() else 0


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _refusal(error: BaseException, shown: str) -> UipeMergeError:
    """Say in our own words what an exception of the client means."""
    from huggingface_hub import errors

    # The client wraps what happened when it finds nothing in its cache either.
    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    status = _status(error)
    if status is not None:
        message, remedy = _by_status(error, status)
    elif isinstance(error, OSError) and error.errno is not None:
        return system_error(error, error.filename or "the Hugging Face cache")
    elif type(error) is OSError:
        message, remedy = "did not arrive whole: another number of bytes came", AGAIN
    else:
        message = f"{host()} cannot be reached ({type(error).__name__})"
        remedy = "check the connection; HF_HUB_OFFLINE=1 uses what is in the cache"
    return RemoteError(message, file=shown, remedy=remedy)


def _by_status(error: Any, status: int) -> tuple[str, str]:  # noqa: ANN401 - has a response
    """Return message and remedy for a hub that answered with an error."""
    from huggingface_hub import errors, get_token

    named = (
        (errors.GatedRepoError, "is gated", "accept its licence on its page, then `hf auth login`"),
        (errors.RevisionNotFoundError, "has no such revision", "check what stands after the @"),
        (errors.EntryNotFoundError, "is listed by the hub and not there", AGAIN),
    )
    for kind, message, remedy in named:
        if isinstance(error, kind):
            return message, remedy
    # A hub says 401 of what it does not have too, to those who gave no token.
    absent = get_token() is None or error.response.headers.get("X-Error-Code") == "RepoNotFound"
    if status == 401 and not absent:
        return "the hub refuses the token, which is wrong or has expired", _LOG_IN
    if status == 401 or isinstance(error, errors.RepositoryNotFoundError):
        return "the hub has no such repository, or it is private", f"check the id, or {_LOG_IN}"
    if status == 403:
        return "may not be read with this token", _LOG_IN
    if status == 429:
        return "the hub has had too many requests (429)", AGAIN
    return f"the hub answers with an error ({status})", AGAIN
