"""Reads the pickle of a PyTorch checkpoint and prints which tensors it describes.

Runs as a process of its own, with the bytes of ``data.pkl`` on standard input and limits on
memory, time and files set by itself before the first byte is read. It imports no torch: the
handful of names that a state dict needs are replaced by plain records, and any other name
ends the process. Nothing in the pickle is ever called but these.

Run with ``python -I -S``; standard library only.
"""

from __future__ import annotations

import collections
import io
import json
import pickle
import resource
import sys

MEMORY = 400 * 2**20
SECONDS = 120

STORAGES = {
    "BFloat16Storage": "BF16",
    "HalfStorage": "F16",
    "FloatStorage": "F32",
    "DoubleStorage": "F64",
    "ComplexFloatStorage": "C64",
    "BoolStorage": "BOOL",
    "ByteStorage": "U8",
    "CharStorage": "I8",
    "ShortStorage": "I16",
    "IntStorage": "I32",
    "LongStorage": "I64",
}
"""Typed storages of torch and the safetensors name of their element type."""


class Refused(Exception):  # noqa: N818 - the message is the point
    """The pickle holds what a state dict does not."""


class Tensor:
    """A tensor as the pickle describes it."""

    def __init__(self, storage: object, offset: object, shape: object, stride: object) -> None:
        """Keep the description."""
        self.storage = storage
        self.offset = offset
        self.shape = shape
        self.stride = stride


def rebuild_tensor(
    storage: object, offset: object, shape: object, stride: object, *_rest: object
) -> Tensor:
    """Stand in for ``torch._utils._rebuild_tensor_v2``."""
    return Tensor(storage, offset, shape, stride)


def rebuild_parameter(tensor: object, *_rest: object) -> object:
    """Stand in for ``torch._utils._rebuild_parameter``."""
    return tensor


class StateDict(collections.OrderedDict[object, object]):
    """Stands in for ``OrderedDict``; state such as ``_metadata`` is dropped."""

    def __setstate__(self, _state: object) -> None:
        """Drop it."""


class Unpickler(pickle.Unpickler):
    """Knows a state dict's names and no other."""

    def find_class(self, module: str, name: str) -> object:
        """Return the stand-in for a name, or refuse it."""
        if module == "collections" and name == "OrderedDict":
            return StateDict
        if module == "torch._utils" and name == "_rebuild_tensor_v2":
            return rebuild_tensor
        if module == "torch._utils" and name == "_rebuild_parameter":
            return rebuild_parameter
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        raise Refused(f"names {module}.{name}, which a state dict does not need")

    def persistent_load(self, pid: object) -> object:
        """Return a storage as ``(key, dtype, elements)``."""
        if not (isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage"):
            raise Refused("names a storage in an unknown way")
        _, dtype, key, _, elements = pid
        if not isinstance(dtype, str) or not isinstance(key, str) or type(elements) is not int:
            raise Refused("names a storage in an unknown way")
        return (key, dtype, elements)


def main() -> None:
    """Print ``{"tensors": […]}`` or ``{"refused": why}``."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
    answer: dict[str, object]
    try:
        answer = {"tensors": describe(sys.stdin.buffer.read())}
    except Refused as error:
        answer = {"refused": str(error)}
    except MemoryError:
        answer = {"refused": "asks for more memory than a state dict needs"}
    except Exception as error:  # noqa: BLE001 - a hostile pickle may raise anything
        answer = {"refused": f"is not a readable pickle ({type(error).__name__})"}
    sys.stdout.write(json.dumps(answer))


def describe(raw: bytes) -> list[list[object]]:
    """Return ``[name, dtype, storage key, storage elements, offset, shape, stride]`` each."""
    state = Unpickler(io.BytesIO(raw)).load()
    if not isinstance(state, dict):
        raise Refused("holds no state dict")
    rows: list[list[object]] = []
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise Refused("holds more than a flat state dict of tensors")
        if not isinstance(tensor.storage, tuple):
            raise Refused("holds a tensor without a storage")
        key, dtype, elements = tensor.storage
        row = [name, dtype, key, elements, tensor.offset]
        rows.append([*row, _naturals(tensor.shape), _naturals(tensor.stride)])
    return rows


def _naturals(value: object) -> list[int]:
    if not isinstance(value, tuple) or not all(type(size) is int and size >= 0 for size in value):
        raise Refused("holds a tensor whose shape or stride is no tuple of natural numbers")
    return list(value)


if __name__ == "__main__":
    main()
