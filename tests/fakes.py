"""Stand-ins for the seams of the program."""

from collections.abc import Iterable

from uipe_merge.checkpoint.storage import Absent, Stamp
from uipe_merge.errors import CorruptInputError


class MemoryFile:
    """An open file whose bytes are in memory."""

    def __init__(self, path: str, content: bytes, mtime_ns: int = 0) -> None:
        self.path = path
        self.stamp = Stamp(len(content), mtime_ns)
        self._content = memoryview(content)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        piece = self._content[offset : offset + len(buffer)]
        if len(piece) < len(buffer):
            raise CorruptInputError(f"ends {len(buffer) - len(piece)} bytes early", file=self.path)
        buffer[:] = piece

    def close(self) -> None:
        self._content = memoryview(b"")


class MemoryFolder:
    """A checkpoint folder in memory: names to bytes."""

    def __init__(self, files: dict[str, bytes], location: str = "memory") -> None:
        self.files = files
        self.location = location

    def names(self) -> list[str]:
        return sorted(self.files)

    def open_file(self, name: str) -> MemoryFile:
        shown = f"{self.location}/{name}"
        if any(other.startswith(f"{name}/") for other in self.files):
            raise CorruptInputError("is a directory, not a regular file", file=shown)
        if name not in self.files:
            raise CorruptInputError("no such file", file=shown, remedy="download it again")
        # As good as a clock: other bytes are another modification.
        return MemoryFile(shown, self.files[name], hash(self.files[name]))

    def absent(self, names: Iterable[str]) -> Absent:
        return Absent([], 0, self.location)

    def fetch(self, names: Iterable[str]) -> None:
        pass
