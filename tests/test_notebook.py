"""The notebook runs from top to bottom, and what is stored in it is what it prints."""

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).resolve().parent.parent / "examples" / "first_steps.ipynb"
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("nbclient", "ipykernel", "matplotlib")),
    reason="a notebook needs nbclient, ipykernel and matplotlib",
)


def printed(notebook: Any) -> list[str]:
    """What each cell of code printed, without numbers, which differ between machines."""
    outputs = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    texts = [
        "".join(output.text for output in cell if output.get("name") == "stdout")
        for cell in outputs
    ]
    return [" ".join(NUMBER.sub("#", text).split()) for text in texts]


def read() -> Any:
    import nbformat

    notebook = nbformat.read(NOTEBOOK, as_version=4)  # type: ignore[no-untyped-call]
    nbformat.validate(notebook)
    return notebook


@pytest.mark.timeout(600)
def test_the_notebook_runs_and_prints_what_is_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nbclient import NotebookClient

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook, stored = read(), printed(read())
    client = NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    )
    client.execute()
    assert printed(notebook) == stored


def test_what_is_stored_is_small_and_says_nothing_about_a_machine() -> None:
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert len(text) < 100_000
    assert not re.search(r"/(home|root|tmp|Users|opt|work)/", text)
    outputs = [output for cell in read().cells for output in cell.get("outputs", ())]
    assert {output.output_type for output in outputs} == {"stream", "display_data"}
    assert {output.name for output in outputs if output.output_type == "stream"} == {"stdout"}
    assert any("image/png" in output.get("data", ()) for output in outputs)
