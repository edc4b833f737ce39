"""The shape of the package: what may import what, who may print, what an import costs."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "uipe_merge"

# Top to bottom. Modules in one entry may import each other as long as no cycle arises;
# apart from that an import runs from an entry to a later one. "" is the package itself:
# its lazy exports stand on api, and nothing below api may ask it for anything.
LAYERS: list[set[str]] = [
    {"__main__"},
    {"cli"},
    {"demo"},
    {"plots"},
    {"integrations"},
    {""},
    {"studying"},
    {"in_memory"},
    {"searching"},
    {"loading", "filling", "making"},
    {"api"},
    {"study"},
    {"verification"},
    {"recomputing"},
    {"recorded"},
    {"inspection"},
    {"gridding"},
    {"grids"},
    {"slicing"},
    {"running"},
    {"finishing"},
    {"rehearsing"},
    {"settling"},
    {"job"},
    {"decomposing", "measuring"},
    {"matrices"},
    {"device"},
    {"spreading"},
    {"engine"},
    {"fetching"},
    {"inputs"},
    {"opening"},
    {"worker"},
    {"guard"},
    {"computing"},
    {"deltas"},
    {"reader"},
    {"kernels", "native"},
    {"executors"},
    {"output"},
    {"inspected"},
    {"report"},
    {"resolving"},
    {"coherent"},
    {"adapter_plan"},
    {"planning"},
    {"coefficients"},
    {"cutting"},
    {"plan"},
    {"recipe_file"},
    {"mergekit_file"},
    {"recipe"},
    {"mergekit_recipe"},
    {"recipe_formats"},
    {"steering"},
    {"bits"},
    {"checkpoint"},
    {"arithmetic"},
    {"aligned", "drawing", "harnesses", "naming", "once", "progress", "errors", "_version"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}

# Distributions whose modules go by another name.
MODULE_OF = {"pyyaml": "yaml"}

HEAVY = {"torch", "transformers", "numpy", "matplotlib", "plotly", "pandas"}


class Import(NamedTuple):
    """One imported module, as a dotted name, and where."""

    target: str
    line: int


def module_name(path: Path) -> str:
    """Dotted name of a source file, packages without their `__init__`."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def parse(module: str) -> ast.Module:
    path = SOURCES[module]
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports_of(module: str) -> Iterator[Import]:
    """Every import of a module: at its top, in functions, and for type checkers only."""
    path = SOURCES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(parse(module)):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                parts = parts[: len(parts) - node.level + 1]
                base = ".".join([*parts, base] if base else parts)
            # `from package import name`: a module if there is one of that name.
            inner = [f"{base}.{alias.name}" for alias in node.names]
            found = dict.fromkeys(name if name in SOURCES else base for name in inner)
            yield from (Import(name, node.lineno) for name in found)
        elif isinstance(node, ast.Call) and (name := literal_import(node)):
            yield Import(f"{package}{name}" if name.startswith(".") else name, node.lineno)


def literal_import(call: ast.Call) -> str:
    """The module of `import_module("…")`, so that laziness is no way around the layers."""
    called = ast.unparse(call.func)
    if called not in {"import_module", "importlib.import_module", "__import__"} or not call.args:
        return ""
    first = call.args[0]
    return first.value if isinstance(first, ast.Constant) and isinstance(first.value, str) else ""


def internal(target: str) -> bool:
    return target.split(".", maxsplit=1)[0] == "uipe_merge"


def layer_of(module: str) -> str:
    """The entry of LAYERS that a module belongs to."""
    return [*module.split("."), ""][1]


def rank(module: str) -> int:
    # One without a place is reported by a test of its own.
    return RANK.get(layer_of(module), len(LAYERS))


def where(module: str, line: int) -> str:
    return f"{SOURCES[module].relative_to(ROOT)}:{line}"


def test_the_package_is_found() -> None:
    assert {"uipe_merge", "uipe_merge.api", "uipe_merge.cli.app"} <= set(SOURCES)


def test_every_module_has_a_layer() -> None:
    unplaced = sorted(name for name in SOURCES if layer_of(name) not in RANK)
    assert unplaced == [], "give these a place in LAYERS, and in ARCHITECTURE.md"


def test_imports_run_downward() -> None:
    upward = [
        f"{where(module, found.line)} imports {found.target}, which is above it"
        for module in SOURCES
        for found in imports_of(module)
        if internal(found.target) and rank(found.target) < rank(module)
    ]
    assert not upward, "\n".join(upward)


def test_no_import_cycles() -> None:
    graph = {
        module: {
            found.target
            for found in imports_of(module)
            if found.target in SOURCES and found.target != module
        }
        for module in SOURCES
    }
    finished: set[str] = set()

    def cycle_from(module: str, path: tuple[str, ...]) -> tuple[str, ...]:
        if module in path:
            return (*path[path.index(module) :], module)
        if module in finished:
            return ()
        for target in sorted(graph[module]):
            if cycle := cycle_from(target, (*path, module)):
                return cycle
        finished.add(module)
        return ()

    cycles = [" → ".join(cycle) for module in graph if (cycle := cycle_from(module, ()))]
    assert not cycles, "\n".join(cycles)


def test_arithmetic_knows_only_torch() -> None:
    allowed = sys.stdlib_module_names | {"torch"}
    foreign = [
        f"{where(module, found.line)} imports {found.target}"
        for module in SOURCES
        if layer_of(module) == "arithmetic"
        for found in imports_of(module)
        if found.target.split(".")[0] not in allowed and layer_of(found.target) != "arithmetic"
    ]
    assert not foreign, "\n".join(foreign)


@pytest.mark.parametrize(
    ("library", "owners"),
    [
        ("typer", {"cli"}),
        ("click", {"cli"}),
        ("rich", {"cli"}),
        ("matplotlib", {"plots", "study"}),
        ("plotly", {"plots", "study"}),
        (
            "transformers",
            {"demo", "checkpoint", "in_memory", "loading", "making", "study", "studying"},
        ),
    ],
)
def test_a_library_stays_in_its_layer(library: str, owners: set[str]) -> None:
    strays = [
        f"{where(module, found.line)} imports {found.target}"
        for module in SOURCES
        if layer_of(module) not in owners
        for found in imports_of(module)
        if found.target.split(".")[0] == library
    ]
    assert not strays, "\n".join(strays)


def test_only_the_command_line_prints_and_exits() -> None:
    reserved = {"print", "exit", "quit", "input", "sys.exit", "os._exit"}
    offences = []
    for module in SOURCES:
        if layer_of(module) in {"cli", "__main__"}:
            continue
        for node in ast.walk(parse(module)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in reserved:
                offences.append(f"{where(module, node.lineno)} calls {ast.unparse(node.func)}")
            elif isinstance(node, ast.Name) and node.id == "SystemExit":
                offences.append(f"{where(module, node.lineno)} names SystemExit")
            elif isinstance(node, ast.ImportFrom) and node.module == "sys":
                offences += [
                    f"{where(module, node.lineno)} imports exit from sys"
                    for alias in node.names
                    if alias.name == "exit"
                ]
    assert not offences, "\n".join(offences)


def test_every_library_is_declared() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    requirements = project["dependencies"] + [
        requirement
        for extra in ("plot", "study", "lm-eval", "mergekit", "ray")
        for requirement in project["optional-dependencies"][extra]
    ]
    names = {re.split(r"[^A-Za-z0-9._-]", requirement)[0].lower() for requirement in requirements}
    declared = {MODULE_OF.get(name, name.replace("-", "_")) for name in names}
    undeclared = [
        f"{where(module, found.line)} imports {found.target}"
        for module in SOURCES
        for found in imports_of(module)
        if found.target.split(".")[0]
        not in sys.stdlib_module_names | declared | {"uipe_merge", "click"}
    ]
    hint = "add the distribution to pyproject.toml and constraints.txt"
    assert not undeclared, "\n".join([hint, *undeclared])


def modules_loaded_by(code: str) -> set[str]:
    """Top-level names in `sys.modules` once `code` has run in a fresh interpreter."""
    # On stderr, so that what the program itself prints cannot be mistaken for it.
    report = (
        "import json, sys; print('\\nLOADED', "
        "json.dumps(sorted({name.split('.')[0] for name in sys.modules})), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{report}"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("LOADED ")]
    return set(json.loads(line.removeprefix("LOADED ")))


def command_line(*arguments: str) -> str:
    """Code that runs the entry point with `arguments` and insists on exit code 0."""
    return (
        "import sys\n"
        "from uipe_merge.cli.app import main\n"
        f"sys.argv = ['uipe-merge', *{arguments!r}]\n"
        "try:\n"
        "    code = main()\n"
        "except SystemExit as stop:\n"
        "    code = stop.code\n"
        "if code: raise RuntimeError(f'exit code {code}')\n"
    )


@pytest.mark.parametrize(
    "code",
    [
        pytest.param("import uipe_merge", id="import"),
        pytest.param("import uipe_merge; uipe_merge.__version__", id="version"),
        pytest.param("import uipe_merge; dir(uipe_merge)", id="dir"),
        pytest.param(command_line("--help"), id="--help"),
        pytest.param(command_line("--version"), id="--version"),
        pytest.param(command_line("merge", "--help"), id="merge --help"),
        pytest.param(command_line("inspect", "--help"), id="inspect --help"),
        pytest.param(command_line("verify", "--help"), id="verify --help"),
        pytest.param(command_line("demo", "--help"), id="demo --help"),
        pytest.param(command_line("lm-eval", "--help"), id="lm-eval --help"),
    ],
)
def test_looking_costs_no_heavy_import(code: str) -> None:
    loaded = modules_loaded_by(code)
    assert "uipe_merge" in loaded
    assert loaded & HEAVY == set()


@pytest.mark.found("`uipe_merge.plan` was a module once anything had been merged")
def test_no_module_takes_the_place_of_an_export() -> None:
    """``uipe_merge.plan`` is a function also when the module of that name has been loaded."""
    modules = [name for name in SOURCES if name.count(".") == 1 and "__main__" not in name]
    code = (
        "import importlib, uipe_merge\n"
        "before = {name: getattr(uipe_merge, name) for name in uipe_merge.__all__}\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "for name, export in before.items(): assert getattr(uipe_merge, name) is export, name\n"
    )
    assert "uipe_merge" in modules_loaded_by(code)


def test_every_export_resolves() -> None:
    code = (
        "import uipe_merge\n"
        "assert 'merge' in uipe_merge.__all__\n"
        "for name in uipe_merge.__all__: getattr(uipe_merge, name)\n"
    )
    assert "uipe_merge" in modules_loaded_by(code)
