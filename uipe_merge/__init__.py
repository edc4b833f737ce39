"""Post-hoc checkpoint arithmetic for LLM unlearning: θᵤ + α·(θᵤ − θ₀), streamed.

``merge`` writes an extrapolated model, ``plan`` says what that would take, ``inspect``
measures an update before anything is written, ``verify`` checks a written model. The
exceptions are those of ``uipe_merge.errors``. Importing the package loads neither torch nor
transformers.
"""

from __future__ import annotations

# A module is put into its package when it is loaded: later it would take the function's place.
import uipe_merge.plan  # noqa: F401 - see above
from uipe_merge._version import __version__
from uipe_merge.api import Verification, grid, inspect, merge, plan, verify
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
from uipe_merge.loading import load
from uipe_merge.steering import ORIGINAL_ITSELF, Steering, Update

__all__ = [
    "ORIGINAL_ITSELF",
    "CorruptInputError",
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
    "grid",
    "inspect",
    "load",
    "merge",
    "plan",
    "verify",
]
