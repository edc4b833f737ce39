"""What the site says and no page holds: commands, Python, design, changes.

A hook of MkDocs. A line ``<!-- generated: NAME -->`` of a page is replaced, while the site is
built, by what the function of that name in ``GENERATORS`` returns: from the program as it is,
or from a document at the root. Without MkDocs, ``python docs/generated.py NAME`` prints it.
"""

import dataclasses
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MARK = re.compile(r"^<!-- generated: (?P<name>[a-z]+) -->$", re.MULTILINE)
SECTION = re.compile(r"^(Args|Attributes|Returns|Yields|Raises):$", re.MULTILINE)
ENTRY = re.compile(r"^(?P<name>\*{0,2}\w+)(?: \([^)]*\))?:\s(?P<text>.*)$", re.DOTALL)


def on_page_markdown(markdown: str, **_: object) -> str:
    """Fill the marks of a page; MkDocs calls this."""
    return MARK.sub(lambda mark: GENERATORS[mark["name"]](), markdown)


# ----------------------------------------------------------------- commands


def commands() -> str:
    """Return every command with its arguments and options, as the program itself lists them."""
    import typer

    from uipe_merge.cli.app import app

    return "\n".join(_command(typer.main.get_command(app), "uipe-merge"))


def _command(command: Any, path: str) -> Iterator[str]:  # noqa: ANN401 - typer's or click's
    context = command.context_class(command, info_name=path)
    below = getattr(command, "commands", {})
    if not below:
        yield f"## {path} {{ #{path.removeprefix('uipe-merge ').replace(' ', '-')} }}\n"
        yield f"{_prose(inspect.cleandoc(command.help or ''))}\n"
        yield f"```text\n{path} {' '.join(command.collect_usage_pieces(context))}\n```\n"
        for kind in ("argument", "option"):
            yield from _parameters(command, context, kind)
    for name, child in below.items():
        if not child.hidden:
            yield from _command(child, f"{path} {name}")


def _parameters(command: Any, context: Any, kind: str) -> Iterator[str]:  # noqa: ANN401
    records = [
        parameter.get_help_record(context)
        for parameter in command.params
        if parameter.param_type_name == kind
    ]
    rows = [
        f"| `{_cell(left)}` | {_cell(_prose(right))} |" for left, right in filter(None, records)
    ]
    if rows:
        yield "\n".join([f"| {kind} | meaning |", "| --- | --- |", *rows, ""])


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _prose(text: str) -> str:
    """What is plain text in a help text or a docstring, as Markdown."""
    text = re.sub(r"``(.+?)``", r"`\1`", text)
    parts = re.split(r"(`[^`]+`)", text)
    return "".join(
        part if part.startswith("`") else re.sub(r"([*_<\[\]])", r"\\\1", part) for part in parts
    )


# ------------------------------------------------------------------- Python


def python() -> str:
    """Return what ``uipe_merge`` exports, with signatures and docstrings."""
    import uipe_merge
    from uipe_merge import errors, gridding, inspected, report

    exported = [getattr(uipe_merge, name) for name in uipe_merge.__all__]
    functions = [one for one in exported if inspect.isfunction(one)]
    values = [
        one
        for one in exported
        if inspect.isclass(one) and not issubclass(one, errors.UipeMergeError)
    ]
    values += [report.MergeReport, report.Summary, gridding.GridReport]
    values += [inspected.Inspection, inspected.Group]
    lines = ["## Functions\n"]
    for function in sorted(functions, key=lambda one: one.__name__):
        lines += [f"### {function.__name__}\n", _signature(function), *_docstring(function)]
    lines += ["## What they take and return\n"]
    for one in sorted(set(values), key=lambda one: one.__name__):
        lines += [f"### {one.__name__}\n", f"`{one.__module__}.{one.__name__}`\n", *_docstring(one)]
        lines += _members(one)
    lines += ["## Errors\n", *_errors(errors.UipeMergeError)]
    return "\n".join(lines)


def _signature(function: Callable[..., object]) -> str:
    """The signature as it is written, one argument a line."""
    lines = inspect.getsource(function).splitlines()
    end = next(number for number, line in enumerate(lines) if line.endswith(":"))
    source = "\n".join(re.sub(r"\s*# noqa.*$", "", line) for line in lines[: end + 1])
    return f"```text\n{source.removeprefix('def ').removesuffix(':')}\n```\n"


def _docstring(thing: object) -> Iterator[str]:
    """A docstring in google style: its prose, then a list for each of its sections."""
    prose, *sections = SECTION.split(inspect.getdoc(thing) or "")
    yield f"{_prose(prose.strip())}\n"
    for title, body in zip(sections[::2], sections[1::2], strict=True):
        entries = re.split(r"\n(?=\S)", inspect.cleandoc(body).strip())
        if title in {"Returns", "Yields"}:
            yield f"**{title}:** {_prose(' '.join(' '.join(entries).split()))}\n"
            continue
        yield f"**{title}:**\n"
        yield "\n".join(f"- {_entry(entry)}" for entry in entries) + "\n"


def _entry(entry: str) -> str:
    found = ENTRY.match(" ".join(entry.split()))
    if found is None:
        return _prose(entry)
    return f"`{found['name']}`: {_prose(found['text'])}"


def _members(one: type) -> Iterator[str]:
    """The public properties and methods of a class."""
    fields = (
        {field.name for field in dataclasses.fields(one)}
        if dataclasses.is_dataclass(one)
        else set()
    )
    fields |= set(getattr(one, "_fields", ()))
    rows = []
    for name, member in vars(one).items():
        if name.startswith("_") or name in fields:
            continue
        if isinstance(member, property):
            rows.append(f"- `{name}`: {_first(member)}")
        elif inspect.isfunction(member):
            rows.append(
                f"- `{name}{inspect.signature(member)}`: {_first(member)}".replace("(self)", "()")
            )
    if rows:
        yield "**Also:**\n"
        yield "\n".join(rows) + "\n"


def _first(thing: object) -> str:
    return _prose((inspect.getdoc(thing) or "").split("\n\n")[0].replace("\n", " "))


def _errors(base: type[Any]) -> Iterator[str]:
    yield "| exception | exit code | raised where |"
    yield "| --- | --- | --- |"
    for error in sorted(base.__subclasses__(), key=lambda error: error.exit_code):
        yield f"| `{error.__name__}` | {error.exit_code} | {_first(error)} |"
    yield ""
    yield f"All are `{base.__name__}`, with `message`, `file`, `tensor` and `remedy`; [what to do](errors.md).\n"


# ---------------------------------------------------------------- documents


def design() -> str:
    """Return the architecture page, without its title."""
    return _document("ARCHITECTURE.md")


def changes() -> str:
    """Return the changelog, without its title."""
    return _document("CHANGELOG.md")


def _document(name: str) -> str:
    """Text of a document at the root; its links into ``docs/`` are links of the site."""
    text = (ROOT / name).read_text(encoding="utf-8")
    return re.sub(r"\A# .*\n", "", text).replace("](docs/", "](")


GENERATORS = {"commands": commands, "python": python, "design": design, "changes": changes}


if __name__ == "__main__":
    sys.stdout.write(GENERATORS[sys.argv[1]]())
