"""What an error says, and with which code it ends the program."""

import inspect
import re

import pytest

from uipe_merge import errors
from uipe_merge.errors import LISTED, CorruptInputError, UipeMergeError, escape, listed

DRAWN = re.compile(r"(\w+Error)\s+(\d+)  \S")
TREE = {
    "UsageError": 2,
    "RecipeError": 3,
    "CorruptInputError": 4,
    "IncompatibleModelsError": 5,
    "UnsafeInputError": 6,
    "NumericError": 7,
    "OutputError": 8,
    "OutputLockedError": 9,
    "RemoteError": 10,
}


def exceptions() -> list[type[Exception]]:
    classes = [kind for _, kind in inspect.getmembers(errors, inspect.isclass)]
    return [kind for kind in classes if issubclass(kind, Exception)]


class TestTree:
    def test_exit_codes_are_the_documented_ones(self) -> None:
        found = {
            kind.__name__: kind.exit_code
            for kind in exceptions()
            if issubclass(kind, UipeMergeError)
        }
        assert found == {"UipeMergeError": 1, **TREE}

    def test_the_picture_in_the_module_shows_the_whole_tree(self) -> None:
        assert errors.__doc__ is not None
        assert {name: int(code) for name, code in DRAWN.findall(errors.__doc__)} == TREE

    def test_all_are_caught_by_the_base(self) -> None:
        assert all(issubclass(kind, UipeMergeError) for kind in exceptions())


class TestMessage:
    @pytest.mark.parametrize(
        ("parts", "line"),
        [
            ({}, "is broken"),
            ({"file": "a/b"}, "a/b: is broken"),
            ({"tensor": "w"}, "tensor 'w': is broken"),
            ({"remedy": "mend it"}, "is broken; mend it"),
            (
                {"file": "a/b", "tensor": "w", "remedy": "mend it"},
                "a/b: tensor 'w': is broken; mend it",
            ),
        ],
    )
    def test_is_file_tensor_message_remedy(self, parts: dict[str, str], line: str) -> None:
        error = UipeMergeError("is broken", **parts)
        assert str(error) == line
        assert (error.message, error.args) == ("is broken", ("is broken",))
        for name in ("file", "tensor", "remedy"):
            assert getattr(error, name) == parts.get(name)

    @pytest.mark.parametrize("part", ["message", "file", "tensor", "remedy"])
    def test_is_one_printable_line_whatever_a_file_put_into_it(self, part: str) -> None:
        hostile = "a\x1b[2J\r\nerror: b\0\x7f\x9b1m\u2028c\u202e\ud800"
        parts = {"message": "m", part: hostile}
        line = str(CorruptInputError(parts.pop("message"), **parts))
        assert line.splitlines() == [line]
        assert line.isascii()
        assert line.isprintable()
        assert r"a\x1b[2J\r\nerror: b\x00\x7f\x9b1m\u2028c\u202e\ud800" in line

    def test_a_name_of_megabytes_is_shortened(self) -> None:
        line = str(CorruptInputError("x" * 10**7, file="f", tensor="t" * 10**7, remedy="mend it"))
        assert len(line) < 11_000
        assert line.count("… (10000000 characters)") == 2
        assert line.startswith("f: tensor 'ttt")
        assert line.endswith("; mend it")


class TestEscape:
    @pytest.mark.parametrize(
        "text", ["", "model.layers.0.mlp", "θᵤ + α·v", "模型", "é", "a b\\n", "🙂", "\u00a0"]
    )
    def test_leaves_text_that_can_be_read(self, text: str) -> None:
        assert escape(text) == text

    @pytest.mark.parametrize(
        ("text", "shown"),
        [
            ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
            ("a\tb\nc\rd", r"a\tb\nc\rd"),
            ("\0", r"\x00"),
            ("\x85", r"\x85"),
            ("\u2028\u2029", r"\u2028\u2029"),
            ("\u202eevil", r"\u202eevil"),
            ("\u200b\ufeff", r"\u200b\ufeff"),
            ("caf\udce9", r"caf\udce9"),
            ("\U000e0041", r"\U000e0041"),
        ],
    )
    def test_shows_what_could_drive_a_terminal(self, text: str, shown: str) -> None:
        assert escape(text) == shown

    @pytest.mark.parametrize("text", ["\n", "a\x1bθ", "\ud800"])
    def test_is_stable(self, text: str) -> None:
        assert escape(escape(text)) == escape(text)

    def test_no_character_breaks_the_line(self) -> None:
        everything = "".join(map(chr, range(0x110000)))
        shown = escape(everything)
        assert shown.splitlines() == [shown]
        assert shown.encode("utf-8")


class TestListed:
    @pytest.mark.parametrize(
        ("count", "rest"), [(0, None), (1, None), (LISTED, None), (LISTED + 1, 1), (1000, 980)]
    )
    def test_names_the_first_and_counts_the_rest(self, count: int, rest: int | None) -> None:
        items = [f"item {number}" for number in range(count)]
        tail = [] if rest is None else [f"and {rest} more"]
        assert listed(iter(items)).split("; ") == (items[:LISTED] + tail or [""])
