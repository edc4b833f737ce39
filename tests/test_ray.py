"""Shards on a real Ray cluster of several nodes; one of them is killed, the bytes are the same."""

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from bucket_tools import SECRET, Bucket, s3_server
from helpers import (
    Result,
    assert_refused,
    contents,
    read_tensors,
    run_cli,
    run_here,
    write_checkpoint,
    write_pair,
)
from ray_tools import Nodes, ray_cluster
from runs import Merge, interrupt
from test_executors import ExecutorContract, Recorder, Squarer

from uipe_merge import api, running
from uipe_merge.checkpoint.urls import RemoteFolder
from uipe_merge.executors import Executor, Serial, Threads
from uipe_merge.output.filesystem import LocalFileSystem
from uipe_merge.progress import Silent

NAMED = {"README.md", "uipe_merge.json"}  # they say where the inputs were

# The program, but that it does not get far by itself: a node has to be killed in the middle.
GATED = """
import sys
from pathlib import Path
from uipe_merge import api, running
from uipe_merge.executors import Serial
from uipe_merge.integrations.ray import cluster
from uipe_merge.progress import Silent
from ray_tools import GatedFileSystem

original, unlearned, output, address, gate = sys.argv[1:]
job = api.plan(original, unlearned, output, alpha=2.0)
with cluster(job, address, 4) as workers:
    running.run(job, Serial(), GatedFileSystem(gate, 4), Silent(), workers)
"""


class Running(NamedTuple):
    """A cluster, and the S3 server that its nodes have the credentials of."""

    nodes: Nodes
    port: int
    environment: dict[str, str]


@pytest.fixture(scope="module")
def running_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    pytest.importorskip("ray", reason="Ray is not installed")
    with s3_server() as port:
        environment = Bucket(port, "any").environment(tmp_path_factory.mktemp("nodes"))
        with ray_cluster(2, environment) as nodes:
            yield Running(nodes, port, environment)


def ray_cli(cluster: Running, *words: object, **more: Any) -> Result:
    where = ("--executor", "ray", "--ray-address", cluster.nodes.address)
    return run_cli(*words, *where, env=cluster.environment, timeout=400, **more)


def gated(merge: Merge, cluster: Running, gate: Path) -> "subprocess.Popen[bytes]":
    """Start a merge on four workers that stops after four shards until ``gate`` is there."""
    words = [*map(str, merge.inputs), str(merge.output), cluster.nodes.address, str(gate)]
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.Popen(
        [sys.executable, "-c", GATED, *words],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)


@pytest.mark.timeout(900)
class TestOnACluster:
    def test_hazard_a_node_is_killed_in_the_middle_and_the_bytes_are_the_same(
        self,
        running_cluster: Running,
        tmp_path: Path,
        tmp_path_factory: pytest.TempPathFactory,
    ) -> None:
        merge = Merge(tmp_path, alpha=2.0, shards=24).write_inputs()
        complete = merge.undisturbed()
        running_cluster.nodes.add(2)
        gate = tmp_path_factory.mktemp("gate") / "open"
        process = gated(merge, running_cluster, gate)
        # Four workers on two nodes of two processors: with all four at it, both nodes are.
        attempts = merge.partial / "attempts"
        wait_for(lambda: merge.lines() == 5 and len(list(attempts.glob("*/model"))) == 4, process)
        running_cluster.nodes.kill(1)
        gate.touch()
        out, err = process.communicate(timeout=400)
        assert (process.returncode, out, err) == (0, b"", b"")
        assert merge.state(complete) == "complete"
        assert merge.left_over() == []

    def test_from_bucket_to_bucket_as_from_disk_to_disk(
        self, running_cluster: Running, tmp_path: Path
    ) -> None:
        original, unlearned = write_pair(tmp_path, shards=3)
        bucket = Bucket(running_cluster.port, "models")
        urls = bucket.put_tree(original, "o"), bucket.put_tree(unlearned, "u")
        done = ray_cli(running_cluster, *urls, "--alpha", 1, "-o", bucket.url("out"))
        assert done.code == 0, done
        assert done.err == ""
        assert SECRET not in done.out
        here = run_here(original, unlearned, "--alpha", 1, "-o", tmp_path / "out", "-q")
        assert here.code == 0
        expected, found = contents(tmp_path / "out"), bucket.contents("out")
        assert expected.keys() == found.keys()
        assert {name for name in found if found[name] != expected[name]} <= NAMED
        verified = run_cli("verify", bucket.url("out"), env=running_cluster.environment)
        assert verified.code == 0, verified
        left = Path(running_cluster.environment["XDG_CACHE_HOME"]) / "uipe-merge"
        assert [path for path in left.rglob("*") if path.is_file()] == []

    def test_hazard_an_error_on_a_node_arrives_as_itself(
        self, running_cluster: Running, tmp_path: Path
    ) -> None:
        merge = Merge(tmp_path, alpha=1.0, shards=2).write_inputs()
        tensors = read_tensors(merge.inputs[1])
        tensors["model.layers.0.q_proj.weight"][0, 3] = torch.nan
        write_checkpoint(merge.inputs[1], dict(sorted(tensors.items())), shards=2)
        done = ray_cli(running_cluster, *merge.command())
        assert_refused(done, 7, str(merge.inputs[1]), "tensor 'model.layers.0.q_proj.weight'")
        assert done.err.count("\n") == 1
        assert merge.left_over() == []  # nothing that could be gone on with

    @pytest.mark.sweep
    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
    def test_the_driver_ends_and_the_same_command_goes_on(
        self,
        running_cluster: Running,
        tmp_path: Path,
        tmp_path_factory: pytest.TempPathFactory,
        number: signal.Signals,
    ) -> None:
        merge = Merge(tmp_path, alpha=2.0, shards=24).write_inputs()
        complete = merge.undisturbed()
        gate = tmp_path_factory.mktemp("gate") / "open"
        process = gated(merge, running_cluster, gate)
        wait_for(lambda: merge.lines() == 5, process)
        process.send_signal(number)
        gate.touch()  # Ray lets a worker whose driver was killed end what it has in hand
        process.communicate(timeout=400)
        assert process.returncode != 0
        assert merge.state(complete) == "absent"
        done = ray_cli(running_cluster, *merge.command(), "--json")
        assert done.code == 0, done
        assert '"resumed_shards": 0' not in done.out
        assert merge.state(complete) == "complete"
        assert merge.left_over() == []

    @pytest.mark.sweep
    @pytest.mark.parametrize("steering", ["--always", "--rank=2"])
    def test_a_steered_recipe(
        self, running_cluster: Running, tmp_path: Path, steering: str
    ) -> None:
        merge = Merge(tmp_path, alpha=1.0, shards=3).write_inputs()
        words = merge.command("--away-from", "original", steering)
        assert run_here(*words).code == 0
        complete = contents(merge.output)
        merge.clear()
        done = ray_cli(running_cluster, *words)
        assert (done.code, done.err) == (0, "")
        assert merge.state(complete) == "complete"

    @pytest.mark.sweep
    def test_hazard_workers_that_die_again_and_again(
        self, running_cluster: Running, tmp_path: Path
    ) -> None:
        import ray

        from uipe_merge.errors import RemoteError
        from uipe_merge.integrations.ray import RayExecutor

        with connected(ray, running_cluster), pytest.raises(RemoteError, match="again and again"):
            list(RayExecutor(1).run(Deadly, [1]))


class Deadly:
    """A worker whose process ends."""

    def __call__(self, item: int) -> int:
        os._exit(item)

    def close(self) -> None:
        """Hold nothing."""


class connected:  # noqa: N801 - a context manager
    """This process as the driver of a cluster."""

    def __init__(self, ray: Any, cluster: Running) -> None:
        self._ray = ray
        self._address = cluster.nodes.address

    def __enter__(self) -> None:
        from uipe_merge.integrations.ray import _connect

        _connect(self._ray, self._address)

    def __exit__(self, *_: object) -> None:
        self._ray.shutdown()


class Noted(Recorder):
    """A recorder for workers in other processes: each event is a file."""

    def __init__(self, root: Path, **how: Any) -> None:
        super().__init__(**how)
        self.root = root
        del self.done, self.made

    def note(self, what: str) -> None:
        (self.root / f"{what}-{os.getpid()}-{time.monotonic_ns()}").touch()

    def noted(self, what: str) -> list[list[str]]:
        return [path.name.split("-")[1:] for path in self.root.glob(f"{what}-*")]

    def make(self) -> Squarer:
        if self.fail_making:
            raise MemoryError("no worker")
        self.note("made")
        return NotedSquarer(self)

    def __getattr__(self, name: str) -> Any:
        if name == "done":
            return [int(item) for item, *_ in self.noted("done")]
        if name == "made":
            closed = [process for process, _ in self.noted("closed")]
            return [_Was(closed.count(process)) for process, _ in self.noted("made")]
        raise AttributeError(name)


class _Was(NamedTuple):
    closed: int


class NotedSquarer(Squarer):
    """Writes down what a ``Squarer`` remembers."""

    recorder: Any

    def __call__(self, item: int) -> int:
        if item in self.recorder.fail_at:
            raise ValueError(f"item {item}")
        self.recorder.note(f"done-{item}")
        return item * item

    def close(self) -> None:
        self.recorder.note("closed")


@pytest.mark.sweep
@pytest.mark.timeout(900)
class TestRayExecutor(ExecutorContract):
    @pytest.fixture
    def executor(self, running_cluster: Running) -> Iterator[Executor]:
        import ray

        from uipe_merge.integrations.ray import RayExecutor

        with connected(ray, running_cluster):
            yield RayExecutor(2)

    @pytest.fixture
    def recording(self, tmp_path: Path) -> Callable[..., Recorder]:
        numbers = itertools.count()

        def make(**how: Any) -> Recorder:
            root = tmp_path / str(next(numbers))
            root.mkdir()
            return Noted(root, **how)

        return make


class TestWithoutACluster:
    """What is spread is the same whatever spreads it: here, threads of this process."""

    @pytest.mark.parametrize("executor", [Serial(), Threads(3)])
    @pytest.mark.parametrize("alpha", [0.0, 2.0])
    def test_shards_that_are_spread_are_the_same(
        self, tmp_path: Path, executor: Executor, alpha: float
    ) -> None:
        merge = Merge(tmp_path, alpha=alpha, shards=7).write_inputs()
        complete = merge.undisturbed()
        interrupt(merge, 2)
        plan = api.plan(*merge.inputs, merge.output, alpha=alpha)
        report = running.run(plan, Serial(), LocalFileSystem(), Silent(), executor)
        assert report.resumed == 2
        assert merge.state(complete) == "complete"
        assert merge.left_over() == []

    def test_several_plans_are_spread_together(self, tmp_path: Path) -> None:
        merge = Merge(tmp_path, shards=3).write_inputs()
        plans = [
            api.plan(*merge.inputs, tmp_path / f"out-{alpha}", alpha=alpha) for alpha in (1, 2)
        ]
        running.run_all(plans, Serial(), LocalFileSystem(), Silent(), Threads(2))
        for alpha in (1, 2):
            api.merge(*merge.inputs, tmp_path / "plain", alpha=alpha, progress=False)
            expected, found = contents(tmp_path / "plain"), contents(tmp_path / f"out-{alpha}")
            assert {name for name in found if found[name] != expected[name]} <= NAMED
            (tmp_path / "plain").rename(tmp_path / f"plain-{alpha}")

    def test_what_workers_are_given_can_be_pickled(self, tmp_path: Path) -> None:
        import pickle

        from uipe_merge.spreading import Parcel, ShardWorker, _slim

        merge = Merge(tmp_path, alpha=2.0, shards=1).write_inputs()
        job = api.plan(*merge.inputs, merge.output, alpha=2.0)
        staging = job.staging(LocalFileSystem())
        worker = ShardWorker(_slim(job.pair), [staging], LocalFileSystem())
        worker, parcel = pickle.loads(pickle.dumps((worker, Parcel([0], [job.plan]))))  # noqa: S301
        [made] = worker(parcel)
        staging.model.mkdir(parents=True)
        staging.accept(made.token, made.record, made.stamp)
        assert (staging.model / made.record.name).stat().st_size == made.record.size

    def test_hazard_a_shard_that_is_not_seen_here_is_refused(self, tmp_path: Path) -> None:
        from uipe_merge.errors import OutputError
        from uipe_merge.output.journal import ShardRecord
        from uipe_merge.output.staging import Staging

        staging = Staging(LocalFileSystem(), tmp_path / "out")
        with pytest.raises(OutputError, match="does not see it; put the output on a file system"):
            staging.accept("0123", ShardRecord("x", 1, "", []), None)
        attempt = staging.attempt("0123")
        attempt.open()
        (attempt.model / "x").write_bytes(b"")
        with pytest.raises(OutputError, match="has not the 1 bytes"):
            staging.accept("0123", ShardRecord("x", 1, "", []), None)

    def test_a_remote_folder_can_be_pickled(self) -> None:
        import pickle

        folder = RemoteFolder("memory://models/a")
        copy = pickle.loads(pickle.dumps(folder))  # noqa: S301
        assert copy.identity == folder.identity

    def test_hazard_without_the_extra(self, tmp_path: Path) -> None:
        merge = Merge(tmp_path).write_inputs()
        hidden = tmp_path / "hidden"
        hidden.mkdir()
        (hidden / "ray.py").write_text("raise ImportError('no ray')\n")
        paths = os.pathsep.join([str(hidden), os.environ.get("PYTHONPATH", "")])
        words = (*merge.command(), "--executor", "ray", "--ray-address", "127.0.0.1:1")
        done = run_cli(*words, env={"PYTHONPATH": paths})
        assert_refused(done, 2, "needs Ray", "pip install 'uipe-merge[ray]'")
        assert merge.left_over() == ["hidden"]

    @pytest.mark.parametrize(
        ("address", "message"),
        [
            ("", "--executor ray without a cluster"),
            ("ray://head:10001", "is not of the kind HOST:PORT"),
            ("head", "is not of the kind HOST:PORT"),
        ],
    )
    def test_hazard_no_cluster_is_named(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str, message: str
    ) -> None:
        pytest.importorskip("ray", reason="Ray is not installed")
        merge = Merge(tmp_path).write_inputs()
        monkeypatch.setenv("RAY_ADDRESS", address)
        assert_refused(run_here(*merge.command(), "--executor", "ray"), 2, message)
        assert merge.left_over() == []

    @pytest.mark.parametrize("port", ["1", "70000"])
    def test_hazard_nobody_listens_where_the_cluster_is_to_be(
        self, tmp_path: Path, port: str
    ) -> None:
        pytest.importorskip("ray", reason="Ray is not installed")
        merge = Merge(tmp_path).write_inputs()
        where = ("--executor", "ray", "--ray-address", f"127.0.0.1:{port}")
        assert_refused(run_here(*merge.command(), *where), 10, f"127.0.0.1:{port}: cannot be")
        assert merge.left_over() == []
