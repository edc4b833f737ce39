"""Each extra alone, in an environment of its own: by hand, before a release (``make extras``).

python tests/extras_alone.py [EXTRA …]

For every extra of pyproject.toml that users install, and for none and all of them, a fresh
environment gets the package with that extra and nothing else, and commands that need it are run
outside of the source tree. An object store is asked where nobody answers: exit code 10 shows that
its library is there, for without it the code is 2.
"""

import os
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOT_FOR_USERS = {"dev", "docs"}
NOWHERE = "http://127.0.0.1:9"
PAIR = "demo/original demo/unlearned"
SCORES = "--score s.json:q --score s.json:u --maximize q --subject-to 'u>=0' --per-layer-groups 2"
QUESTIONS = """[{"question": "alice lives in", "answer": "paris",
  "paraphrased_answer": "paris", "perturbed_answer": ["rome", "oslo"]}]"""
RECIPE = """merge_method: uipe
base_model: demo/original
models: [{model: demo/unlearned, parameters: {alpha: 1}}]
dtype: float32
"""
# What is run, by extra, after `uipe-merge demo demo`: (exit code, command).
COMMANDS: dict[str, list[tuple[int, str]]] = {
    "": [(0, "uipe-merge verify demo/merged-1"), (2, f"uipe-merge inspect {PAIR} --plot map.png")],
    "plot": [
        (0, f"uipe-merge inspect {PAIR} --plot map.png"),
        (0, f"uipe-merge inspect {PAIR} --plot map.html"),
    ],
    "study": [
        (
            0,
            "uipe-merge evaluate demo/merged-1 --forget q.json --retain q.json --max-new-tokens 8 -o scores",
        ),
        (
            0,
            f"uipe-merge search {PAIR} -o best --eval 'sh score.sh {{model}} {{out}}' {SCORES} --trials 3",
        ),
    ],
    "s3": [(10, "uipe-merge verify s3://bucket/model")],
    "gcs": [(10, "uipe-merge verify gs://bucket/model")],
    "lm-eval": [(0, "uipe-merge lm-eval run --help")],
    "mergekit": [
        (0, "uipe-merge mergekit recipe.yml theirs --no-copy-tokenizer --no-write-model-card")
    ],
    "ray": [(10, f"uipe-merge {PAIR} --alpha 1 -o out --executor ray --ray-address 127.0.0.1:9")],
}


def extras() -> list[str]:
    """The extras that users install; the empty one first."""
    document = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    named = document["project"]["optional-dependencies"]
    return ["", *(name for name in named if name not in NOT_FOR_USERS)]


def run(command: str, directory: Path, environment: dict[str, str]) -> tuple[int, str]:
    """Run a command in a shell; return its exit code and all that it printed."""
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=directory,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        timeout=1800,
        check=False,
    )
    return done.returncode, done.stdout


def try_extra(extra: str, directory: Path) -> list[str]:
    """Return what went wrong with one extra, a line each."""
    venv.create(directory / "env", with_pip=True)
    what = f"{ROOT}[{extra}]" if extra else str(ROOT)
    environment = {
        **{key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        "PATH": f"{directory / 'env' / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "nothing",
        "AWS_ENDPOINT_URL": NOWHERE,
        "STORAGE_EMULATOR_HOST": NOWHERE,
    }
    (directory / "q.json").write_text(QUESTIONS)
    (directory / "score.sh").write_text('echo \'{"q": 1, "u": 1}\' > "$2/s.json"\n')
    (directory / "recipe.yml").write_text(RECIPE)
    pip = "python -m pip --disable-pip-version-check"
    asked = [extra] if extra != "all" else [name for name in COMMANDS if name]
    steps = [
        (0, f"{pip} install -q -c '{ROOT / 'constraints.txt'}' '{what}'"),
        (0, f"{pip} check"),
        (0, "uipe-merge demo demo"),
        *(step for name in asked for step in COMMANDS.get(name, [])),
    ]
    for expected, command in steps:
        code, printed = run(command, directory, environment)
        if code != expected or "Traceback" in printed:
            return [f"[{extra}] {command}: exit code {code}, not {expected}\n{printed}"]
    if extra != "all" and extra not in COMMANDS:
        return [f"[{extra}] installs; this file knows no command that needs it"]
    return []


def main() -> None:
    """Try what was named, or all of them; fail if one does not work."""
    problems = []
    for extra in sys.argv[1:] or extras():
        with tempfile.TemporaryDirectory() as directory:
            found = try_extra(extra, Path(directory))
        sys.stdout.write(f"{extra or '(none)'}: {'failed' if found else 'works'}\n")
        sys.stdout.flush()
        problems += found
    sys.exit("\n".join(problems) or 0)


if __name__ == "__main__":
    main()
