"""The writing seam's twin: it does every call, and knows what a power cut could leave of it.

The model is the weakest that file systems with atomic renames keep to. Bytes are durable when
their file was synced, a change of names when the directory that it was made in was (of a rename
the target's). Until then any part of the bytes, and any choice of the changes in any order that
names allow, may be on the disk: an unsynced file may be empty though it was renamed.

After every change ``Twin`` asks its ``Disk`` for the states that a power cut could leave now, and
keeps those that it has not seen. ``materialise`` makes one of them real.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import stat
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice, product
from typing import TYPE_CHECKING, NamedTuple
from unittest.mock import patch

from uipe_merge.output import linux
from uipe_merge.output.filesystem import LocalFile, LocalFileSystem
from uipe_merge.output.journal import _encode

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

SECTOR = 512
ALL_SUBSETS = 6
"""Of so many unsynced changes of names every choice is tried; of more a part."""
CHOSEN = 40
ALL_CONTENTS = 12
"""The same of what several unsynced files may hold."""
MOST = 300
"""States of one moment: of more a part."""

State = dict[str, bytes | int]
"""What lies on the disk: by relative path a file's bytes, or the real number of a directory."""


Seen = dict[frozenset[tuple[str, "bytes | int"]], State]
"""States, each once."""


@dataclass
class File:
    """A file: what is on the disk of it, and what was written since."""

    durable: bytes = b""
    pending: list[tuple[int, bytes] | None] = field(default_factory=list)
    """Writes, and ``None`` for a truncation."""

    def after(self, count: int) -> bytes:
        """The bytes, had only the first ``count`` of the pending changes reached the disk."""
        content = bytearray(self.durable)
        for change in self.pending[:count]:
            if change is None:
                content.clear()
                continue
            offset, data = change
            content.extend(bytes(max(0, offset + len(data) - len(content))))
            content[offset : offset + len(data)] = data
        return bytes(content)

    def variants(self) -> list[bytes]:
        """What may be on the disk: nothing new, prefixes, all, torn, zeros; the last is all."""
        whole = self.after(len(self.pending))
        found = [self.after(count) for count in range(len(self.pending))]
        found.append(b"")  # opened to be emptied, or its size was never written
        last = self.pending[-1] if self.pending else None
        if last is not None:
            offset, data = last
            before = self.after(len(self.pending) - 1)
            cuts = {len(data) // 2, (offset // SECTOR + 1) * SECTOR - offset}
            for cut in cuts & set(range(1, len(data))):
                found.append(before[:offset].ljust(offset, b"\0") + data[:cut])
                found.append(found[-1].ljust(len(whole), b"\0"))
        if whole != self.durable:
            pairs = enumerate(zip(self.durable, whole, strict=False))
            shorter = min(len(self.durable), len(whole))
            kept = next((at for at, (one, two) in pairs if one != two), shorter)
            found.append(whole[:kept] + bytes(len(whole) - kept))  # full size, and only zeros
            # The end is there and what came before is not: blocks reach the disk in any order.
            half = kept + (len(whole) - kept) // 2
            found.append(whole[:kept] + bytes(half - kept) + whole[half:])
        return [*dict.fromkeys(each for each in found if each != whole), whole]


class Change(NamedTuple):
    """One name in one directory is given to ``node``, or taken from ``was`` where node is 0."""

    directory: int
    name: str
    node: int
    was: int = 0


class Unit(NamedTuple):
    """Changes that reach the disk together, at the latest when ``home`` is synced."""

    home: int
    changes: tuple[Change, ...]


class Disk:
    """Inodes and names: as the program sees them, and as they are on the disk for certain."""

    def __init__(self, seed: int) -> None:
        self.files: dict[int, File] = {}
        self.live: dict[int, dict[str, int]] = {}
        self.durable: dict[int, dict[str, int]] = {}
        self.real: dict[int, int] = {}
        self.pending: list[Unit] = []
        self._chance = random.Random(seed)
        self._next = 0
        self.root = self.new_directory(0)

    def new_directory(self, real: int) -> int:
        self._next += 1
        self.live[self._next], self.durable[self._next] = {}, {}
        self.real[self._next] = real
        return self._next

    def new_file(self) -> int:
        self._next += 1
        self.files[self._next] = File()
        return self._next

    def change(self, home: int, *changes: Change) -> None:
        _apply(self.live, changes)
        self.pending.append(Unit(home, changes))

    def sync_directory(self, directory: int) -> None:
        for unit in self.pending:
            if unit.home == directory:
                _apply(self.durable, unit.changes)
        left = [unit for unit in self.pending if unit.home != directory]
        # What was changed in a directory that is gone for good shows nowhere.
        tops = {self.root, *(change.node for unit in left for change in unit.changes)}
        below = (_walk(self.durable, top) for top in tops & self.durable.keys())
        there = tops.union(*({node for _, node in found} for found in below))
        self.pending = [unit for unit in left if any(at.directory in there for at in unit.changes)]

    def states(self) -> list[State]:
        """What a power cut may leave now; of very many a seeded part, and always the ends."""
        found: list[State] = []
        for kept in self._subsets():
            tree = {node: dict(names) for node, names in self.durable.items()}
            for number in kept:
                _apply(tree, self.pending[number].changes)
            found += self._contents(dict(_walk(tree, self.root)))
        if len(found) > MOST:
            found = [found[0], found[-1], *self._chance.sample(found, MOST)]
        return found

    def _subsets(self) -> list[tuple[int, ...]]:
        count = len(self.pending)
        numbers = range(count)
        if count <= ALL_SUBSETS:
            chosen = [
                tuple(number for number in numbers if bits >> number & 1)
                for bits in range(2**count)
            ]
        else:
            chosen = [tuple(numbers[:end]) for end in range(count + 1)]
            chosen += [(*numbers[:at], *numbers[at + 1 :]) for at in numbers]
            chosen += [(at,) for at in numbers]
            chosen += [
                tuple(number for number in numbers if self._chance.random() < share)
                for share in (0.2, 0.5, 0.8)
                for _ in range(CHOSEN // 3)
            ]
        return list(dict.fromkeys(chosen))

    def _contents(self, nodes: dict[str, int]) -> Iterator[State]:
        fixed: State = {
            path: self.real[node] if node in self.real else self.files[node].durable
            for path, node in nodes.items()
        }
        dirty = sorted({at for at in nodes.values() if at in self.files and self.files[at].pending})
        variants = [self.files[node].variants() for node in dirty]
        total = 1
        for each in variants:
            total *= len(each)
        combinations: Iterable[tuple[bytes, ...]] = product(*variants)
        if total > ALL_CONTENTS:
            # One file at a time, the others whole; then whatever chance says.
            some = [
                tuple(one if at == number else each[-1] for at, each in enumerate(variants))
                for number, choices in enumerate(variants)
                for one in choices
            ]
            some += [tuple(map(self._chance.choice, variants)) for _ in range(4)]
            combinations = [tuple(each[0] for each in variants), *some]
        for combination in combinations:
            content = dict(zip(dirty, combination, strict=True))
            yield fixed | {path: content[at] for path, at in nodes.items() if at in content}


def _apply(tree: dict[int, dict[str, int]], changes: Iterable[Change]) -> None:
    for directory, name, node, was in changes:
        names = tree[directory]
        if node:
            names[name] = node
        elif names.get(name) == was:
            del names[name]


def _walk(tree: dict[int, dict[str, int]], node: int, path: str = "") -> Iterator[tuple[str, int]]:
    """Every path below a directory, and what it leads to."""
    for name, child in tree[node].items():
        yield path + name, child
        if child in tree:
            yield from _walk(tree, child, f"{path}{name}/")


class Twin(LocalFileSystem):
    """The local file system, and with it all states that a power cut may leave on the way.

    Args:
        root: What is followed: everything below it, and nothing else, is the disk.
        seen: The states so far, so that several runs do not give the same one twice.
        seed: Of what is sampled.
        exchanges: Whether the system can swap two directories.
    """

    def __init__(
        self,
        root: Path,
        seen: Seen,
        *,
        seed: int = 0,
        exchanges: bool = True,
    ) -> None:
        self.root = root
        self.seen = seen
        self.boundaries = 0
        self._exchanges = exchanges
        self.disk = Disk(seed)
        self._observe()
        # What was there before the run is on the disk; a lock of this run is not yet there.
        for file in self.disk.files.values():
            file.durable, file.pending = file.after(len(file.pending)), []
        for directory in list(self.disk.live):
            self.disk.sync_directory(directory)
        self.disk.pending = []

    # ------------------------------------------------------------------ the seam

    def make_directory(self, path: Path) -> None:
        self._observe()
        there = path.exists()
        super().make_directory(path)
        if not there:
            self._adopt(path)
            self._boundary()

    def create(self, path: Path) -> TwinFile:
        self._observe()
        home, name = self._place(path)
        node = self.disk.live[home].get(name)
        if node is None:
            node = self.disk.new_file()
            self.disk.change(home, Change(home, name, node))
        else:
            self.disk.files[node].pending.append(None)
        self._boundary()
        return TwinFile(self, path, node)

    def append(self, path: Path, data: bytes) -> None:
        self._observe()
        size = path.stat().st_size if path.exists() else 0
        super().append(path, data)
        home, name = self._place(path)
        node = self.disk.live[home].get(name)
        if node is None:
            node = self.disk.new_file()
            self.disk.change(home, Change(home, name, node))
            self._boundary()
        self.written(node, size, data)
        self.synced(node)

    def rename(self, source: Path, target: Path) -> None:
        self._observe()
        super().rename(source, target)
        (old_home, old), (home, name) = self._place(source), self._place(target)
        node = self.disk.live[old_home][old]
        self.disk.change(home, Change(old_home, old, 0, node), Change(home, name, node))
        self._boundary()

    def exchange(self, one: Path, two: Path) -> None:
        self._observe()
        if not self._exchanges:
            with patch.object(linux, "exchange", lambda one, two: False):
                super().exchange(one, two)  # by renames, which are this object's own
            return
        (first_home, first), (home, second) = self._place(one), self._place(two)
        was, will = self.disk.live[home][second], self.disk.live[first_home][first]
        super().exchange(one, two)
        self.disk.change(home, Change(first_home, first, was), Change(home, second, will))
        self._boundary()

    def sync_directory(self, path: Path) -> None:
        self._observe()
        super().sync_directory(path)
        self.disk.sync_directory(self._node(path))
        self._boundary()

    def remove(self, path: Path) -> None:
        self._observe()
        super().remove(path)
        self._forget(path)

    def remove_tree(self, path: Path) -> None:
        self._observe()
        entries = sorted(path.rglob("*"), reverse=True)
        super().remove_tree(path)
        for entry in [*entries, path]:
            self._forget(entry, boundary=entry == path)

    # ------------------------------------------------------------- its own file

    def written(self, node: int, offset: int, data: bytes) -> None:
        self.disk.files[node].pending.append((offset, data))
        self._boundary()

    def synced(self, node: int) -> None:
        file = self.disk.files[node]
        file.durable, file.pending = file.after(len(file.pending)), []
        self._boundary()

    # ------------------------------------------------------------------ the end

    def finish(self) -> None:
        """Look at what was done behind the seam at the very end: the lock is gone."""
        self._observe()
        self._boundary()

    def _boundary(self) -> None:
        self.boundaries += 1
        for state in self.disk.states():
            self.seen.setdefault(frozenset(state.items()), state)

    def _observe(self) -> None:
        """Find what came and went behind the seam: the partial directory and its lock."""
        for path, node in dict(_walk(self.disk.live, self.disk.root)).items():
            real = self.root / path
            if not os.path.lexists(real) and (node in self.disk.real or "lock" in real.name):
                self._forget(real)
        for directory in [self.root, *sorted(self.root.rglob("*"))]:
            with suppress(FileNotFoundError, NotADirectoryError):
                for entry in sorted(directory.iterdir()):
                    if entry.name not in self.disk.live[self._node(directory)]:
                        self._adopt(entry)

    def _adopt(self, path: Path) -> None:
        home, name = self._place(path)
        status = path.lstat()
        if stat.S_ISDIR(status.st_mode):
            node = self.disk.new_directory(status.st_ino)
            self.disk.change(home, Change(home, name, node))
            return
        content = path.read_bytes()
        if name == "lock":  # the machine that finds it has booted since
            with suppress(ValueError):  # torn by an earlier power cut
                content = json.dumps({**json.loads(content), "boot": "another"}).encode()
        node = self.disk.new_file()
        self.disk.change(home, Change(home, name, node))
        self.disk.files[node].pending.append((0, content))

    def _forget(self, path: Path, *, boundary: bool = True) -> None:
        with suppress(KeyError):
            home, name = self._place(path)
            node = self.disk.live[home][name]
            self.disk.change(home, Change(home, name, 0, node))
            if boundary:
                self._boundary()

    def _node(self, path: Path) -> int:
        node = self.disk.root
        for part in path.relative_to(self.root).parts:
            node = self.disk.live[node][part]
        return node

    def _place(self, path: Path) -> tuple[int, str]:
        return self._node(path.parent), path.name


class TwinFile(LocalFile):
    """A file of the twin."""

    def __init__(self, twin: Twin, path: Path, node: int) -> None:
        super().__init__(path)
        self._twin = twin
        self._node = node

    def write_at(self, data: memoryview | bytes, offset: int) -> None:
        super().write_at(data, offset)
        self._twin.written(self._node, offset, bytes(data))

    def sync(self) -> None:
        super().sync()
        self._twin.synced(self._node)


def materialise(state: State, root: Path) -> None:
    """Make the disk at ``root`` what a state says.

    A directory has another number than the one it had. A journal that says which directory was
    about to be published is told the number it has now.
    """
    for entry in root.iterdir():
        shutil.rmtree(entry)
    numbers = {}
    for path, content in sorted(state.items()):
        place = root / path
        if isinstance(content, int):
            place.mkdir()
            numbers[content] = place.stat().st_ino
        else:
            place.write_bytes(content)
    for path, content in state.items():
        if path.endswith("/journal") and isinstance(content, bytes):
            lines = [_renumbered(line, numbers) for line in content.split(b"\n")]
            (root / path).write_bytes(b"\n".join(lines))


def _renumbered(line: bytes, numbers: dict[int, int]) -> bytes:
    _, _, text = line.partition(b" ")
    try:
        value = json.loads(text)
    except ValueError:
        return line
    if not isinstance(value, dict) or "publishing" not in value or _encode(value)[:-1] != line:
        return line
    return _encode({"publishing": numbers.get(value["publishing"], 0)})[:-1]


def sampled(states: Iterable[State], most: int, seed: int) -> list[State]:
    """Some of many states, in a seeded order."""
    listed = list(states)
    random.Random(seed).shuffle(listed)
    return list(islice(listed, most))
