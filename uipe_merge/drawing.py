"""How much of a published model is computed again, and from what."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from uipe_merge.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

SHARE = 0.1
"""Of the blocks that are computed again where nothing else is asked for."""


@dataclass(frozen=True, slots=True)
class Deep:
    """How much of a model is computed again, and from what.

    Attributes:
        sample: Share of the blocks, above 0 and at most 1; one block at least.
        blocks: Number of blocks instead.
        seed: Which ones: the same seed draws the same blocks.
        original: The original checkpoint, where it is no longer what the manifest names.
        unlearned: The unlearned checkpoint, likewise.
        moved: Where further checkpoints are now, by the names that the recipe has for them.
        allow_pickle: As for ``merge``.
        device: As for ``merge``: where the singular vectors were found.
        threads: As for ``merge``.

    Raises:
        UsageError: So many blocks cannot be drawn.
    """

    sample: float = SHARE
    blocks: int | None = None
    seed: int = 0
    original: str | None = None
    unlearned: str | None = None
    moved: Mapping[str, str] = field(default_factory=dict)
    allow_pickle: bool = False
    device: str = "cpu"
    threads: int | None = None

    def __post_init__(self) -> None:
        """Check what is drawn."""
        if not 0 < self.sample <= 1:
            raise UsageError(
                f"cannot draw the share {self.sample:g} of the blocks",
                remedy="give one above 0, and at most 1 for all of them",
            )
        if self.blocks is not None and self.blocks < 1:
            raise UsageError(f"cannot draw {self.blocks} blocks", remedy="give at least 1")

    def drawn(self, number: int) -> set[int]:
        """Return which of so many blocks are computed again."""
        count = math.ceil(number * self.sample) if self.blocks is None else self.blocks
        return set(random.Random(self.seed).sample(range(number), min(count, number)))  # noqa: S311 - no secret
