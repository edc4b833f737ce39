"""What is asked of a Hugging Face hub, and of its client's cache.

Endpoint, token, cache, proxies and offline mode are the business of ``huggingface_hub``, with
its environment variables.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from uipe_merge._version import __version__
from uipe_merge.checkpoint.hub_errors import AGAIN, host, patiently
from uipe_merge.errors import RemoteError

COMMIT = re.compile(r"[0-9a-f]{40}")
_TIMEOUT = 30  # seconds without a byte


class Entry(NamedTuple):
    """One file of a repository.

    Attributes:
        size: Bytes.
        digest: SHA-256 of its content where it is a large file (LFS), else git's SHA-1.
    """

    size: int
    digest: str


class Listing(NamedTuple):
    """A repository at one commit.

    Attributes:
        commit: The commit, 40 hexadecimal digits.
        files: Its files by name.
    """

    commit: str
    files: dict[str, Entry]


def offline() -> bool:
    """Tell whether the hub is not to be asked (HF_HUB_OFFLINE)."""
    from huggingface_hub import is_offline_mode

    return is_offline_mode()


def cache_directory() -> Path:
    """Return where downloaded files are kept (HF_HUB_CACHE, HF_HOME)."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def list_files(repo: str, revision: str | None, shown: str) -> Listing:
    """Resolve a revision to its commit and list the files there, in one request.

    Args:
        repo: ``ORG/NAME``.
        revision: A branch, tag or commit; ``None`` for the default branch.
        shown: The repository in messages.

    Raises:
        RemoteError: There is no such repository or revision, it may not be read, or the hub
            does not answer.
    """
    from huggingface_hub import HfApi

    api = HfApi(library_name="uipe-merge", library_version=__version__)

    def ask() -> Listing:
        info = api.model_info(repo, revision=revision, files_metadata=True, timeout=_TIMEOUT)
        found = {
            file.rfilename: Entry(
                int(file.size or 0), (file.lfs.sha256 if file.lfs else file.blob_id) or ""
            )
            for file in info.siblings or []
        }
        if not COMMIT.fullmatch(info.sha or ""):
            raise ValueError
        return Listing(str(info.sha), found)

    try:
        return patiently(ask, shown)
    except (ValueError, TypeError, LookupError, AttributeError):  # no JSON, or of another shape
        raise RemoteError(
            f"{host()} does not answer as a hub does",
            file=shown,
            remedy="check HF_ENDPOINT, and whether a proxy or a login page is in between",
        ) from None


def read_range(
    repo: str, commit: str, name: str, size: int, buffer: memoryview, offset: int
) -> None:
    """Fill ``buffer`` with the bytes of one file from ``offset``, reading nothing else.

    A server that ignores the range and sends the whole file is cut off when the buffer is full.

    Raises:
        RemoteError: The file cannot be read, or does not have ``size`` bytes.
    """
    from huggingface_hub import get_session, hf_hub_url, hf_raise_for_status
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined] # lazily there

    url, shown = hf_hub_url(repo, name, revision=commit), f"{repo}@{commit}/{name}"
    headers = {
        **build_hf_headers(library_name="uipe-merge", library_version=__version__),
        "Range": f"bytes={offset}-{offset + len(buffer) - 1}",
        "Accept-Encoding": "identity",  # a range of what is stored, not of what is compressed
    }

    def ask() -> None:
        with get_session().stream("GET", url, headers=headers, timeout=_TIMEOUT) as response:
            hf_raise_for_status(response)
            partial = response.status_code == 206
            range_sent = response.headers.get("Content-Range", "")
            if partial and not range_sent.startswith(f"bytes {offset}-"):
                raise RemoteError("another range came than was asked for", file=shown, remedy=AGAIN)
            total = _total(response.headers, partial=partial)
            if total not in (None, size):
                raise RemoteError(
                    f"has {total} bytes, the hub's list says {size}", file=shown, remedy=AGAIN
                )
            before, done = 0 if partial else offset, 0
            for chunk in response.iter_bytes():
                piece = chunk[before:][: len(buffer) - done]
                before = max(before - len(chunk), 0)
                buffer[done : done + len(piece)] = piece
                done += len(piece)
                if done == len(buffer):
                    return
        raise RemoteError(f"ends {len(buffer) - done} bytes early", file=shown, remedy=AGAIN)

    patiently(ask, shown)


def download(repo: str, commit: str, name: str) -> Path:
    """Bring one file into the cache and return where it is.

    Raises:
        RemoteError: It cannot be had.
        OutputError: The disk of the cache is in the way.
    """
    from huggingface_hub import hf_hub_download

    shown = f"{repo}@{commit}/{name}"

    def ask() -> str:
        return hf_hub_download(
            repo,
            name,
            revision=commit,
            library_name="uipe-merge",
            library_version=__version__,
        )

    try:
        return Path(patiently(ask, shown))
    except (RuntimeError, ValueError) as error:  # of the Xet client, and of what is too large
        raise RemoteError(
            f"cannot be downloaded ({type(error).__name__})", file=shown, remedy=AGAIN
        ) from None


def cached(repo: str, commit: str, name: str) -> Path | None:
    """Return where a file is in the cache, if it is."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo, name, revision=commit)
    return Path(found) if isinstance(found, str) else None


def repository_directory(repo: str) -> Path:
    """Return a repository's place in the cache, with ``refs``, ``snapshots`` and ``blobs``."""
    return cache_directory() / f"models--{repo.replace('/', '--')}"


def _total(headers: Any, *, partial: bool) -> int | None:  # noqa: ANN401 - the HTTP library's
    """Return how long a whole file is by its response, where that says so."""
    text = headers.get("Content-Range", "").rpartition("/")[2] if partial else None
    text = headers.get("Content-Length", "") if text is None else text
    return int(text) if text.isdecimal() else None
