"""Post-hoc checkpoint arithmetic for LLM unlearning: θᵤ + α·(θᵤ − θ₀), streamed.

``merge`` writes an extrapolated model, ``grid`` one for every α, ``load`` gives one in memory;
``plan`` says what a merge would take, ``inspect`` measures an update before anything is written,
``verify`` checks a written model, with ``Deep`` against its inputs; ``evaluate`` asks a model
questions, ``search`` looks for α. The exceptions are those of ``uipe_merge.errors``. Importing the
package loads neither torch nor transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

# A module is put into its package when it is loaded: later it would take the function's place.
import uipe_merge.plan  # noqa: F401 - see above
from uipe_merge._version import __version__
from uipe_merge.api import Deep, Verification, grid, inspect, merge, plan, verify
from uipe_merge.errors import (
    CorruptInputError,
    IncompatibleModelsError,
    NumericError,
    OutputError,
    OutputLockedError,
    RecipeError,
    UipeMergeError,
    UnsafeInputError,
    UsageError,
)
from uipe_merge.steering import ORIGINAL_ITSELF, Steering, Update

if TYPE_CHECKING:
    from uipe_merge.loading import load
    from uipe_merge.studying import evaluate, search

__all__ = [
    "ORIGINAL_ITSELF",
    "CorruptInputError",
    "Deep",
    "IncompatibleModelsError",
    "NumericError",
    "OutputError",
    "OutputLockedError",
    "RecipeError",
    "Steering",
    "UipeMergeError",
    "UnsafeInputError",
    "Update",
    "UsageError",
    "Verification",
    "__version__",
    "evaluate",
    "grid",
    "inspect",
    "load",
    "merge",
    "plan",
    "search",
    "verify",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - what a module has
    """Import ``load``, ``evaluate`` and ``search``, and what they stand on, when asked for."""
    if name == "load":
        from uipe_merge.loading import load

        return load
    if name in ("evaluate", "search"):
        from uipe_merge import studying

        return getattr(studying, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
