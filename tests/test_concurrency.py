"""Two runs at once, readers that look on, and others that work where the output will be."""

import signal
import socket
from pathlib import Path

import pytest
from helpers import contents
from runs import Child, Merge


@pytest.fixture
def merge(tmp_path: Path) -> Merge:
    return Merge(tmp_path, shards=20).write_inputs()


def test_hazard_two_runs_on_one_output(merge: Merge) -> None:
    complete = merge.undisturbed()
    first = Child(merge.command())
    assert first.stop_when(merge.journal.exists)
    held = contents(merge.partial)
    for more in ([], ["--overwrite"]):
        code, err = Child(merge.command(*more)).finish()
        assert (code, err.count("\n")) == (9, 1), err
        assert f"process {first.pid} on {socket.gethostname()} is writing this output" in err
    other = Merge(merge.root, alpha=-1.0, shards=20)
    code, err = Child(other.command()).finish()
    assert code == 9, err
    assert contents(merge.partial) == held
    first.send(signal.SIGCONT)
    assert first.finish() == (0, "")
    assert merge.state(complete) == "complete"
    assert merge.left_over() == []


def test_hazard_stale_lock_of_a_killed_run_is_no_obstacle(merge: Merge) -> None:
    complete = merge.undisturbed()
    first = Child(merge.command())
    assert first.wait_for(merge.journal.exists)
    first.send(signal.SIGKILL)
    assert first.finish()[0] == -signal.SIGKILL
    assert (merge.partial / "lock").exists()
    assert Child(merge.command()).finish() == (0, "")
    assert merge.state(complete) == "complete"
    assert merge.left_over() == []


def test_what_a_run_leaves_that_was_killed_at_its_very_end_is_tidied_up(merge: Merge) -> None:
    complete = merge.undisturbed()
    merge.run()
    merge.partial.mkdir()
    (merge.partial / "lock").write_bytes(b"{}")
    assert merge.mend(complete) == 0


def test_hazard_reader_polling_during_publish_sees_nothing_or_all(merge: Merge) -> None:
    complete = merge.undisturbed()
    seen = []
    child = Child(merge.command())
    while child.wait_for(lambda: True):
        seen.append(merge.state(complete))
    assert child.finish() == (0, "")
    assert "absent" in seen
    assert merge.state(complete) == "complete"


def test_hazard_reader_polling_while_a_model_is_replaced_sees_the_old_or_the_new(
    merge: Merge,
) -> None:
    merge.run()
    manifest = merge.output / "uipe_merge.json"
    before = manifest.read_bytes()
    child = Child(Merge(merge.root, alpha=-1.0).command("--overwrite"))
    seen = []
    while child.wait_for(lambda: True):
        seen.append(manifest.read_bytes())  # is never missing
    assert child.finish() == (0, "")
    after = manifest.read_bytes()
    assert after != before
    assert seen[0] == before
    assert set(seen) <= {before, after}


@pytest.mark.parametrize("kind", ["directory", "file"])
def test_hazard_output_created_meanwhile_work_kept(merge: Merge, kind: str) -> None:
    complete = merge.undisturbed()
    child = Child(merge.command())
    assert child.stop_when(merge.journal.exists)
    work = merge.output
    if kind == "directory":
        work.mkdir()
        work = work / "thesis.tex"
    work.write_bytes(b"years")
    child.send(signal.SIGCONT)
    code, err = child.finish()
    assert code == 8
    assert err.count("\n") == 1
    assert f"error: {merge.output}: appeared while the model was made" in err
    assert "move it away and run the same command again: the finished work is kept" in err
    assert work.read_bytes() == b"years"
    code, err = Child(merge.command()).finish()
    assert code == 8
    assert str(merge.output) in err
    assert work.read_bytes() == b"years"
    work.unlink()
    assert merge.run().resumed == merge.shards
    assert merge.state(complete) == "complete"
    assert merge.left_over() == []
