"""A real Ray cluster on loopback: its nodes are processes, started by a process of its own."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from uipe_merge.output.filesystem import LocalFile, LocalFileSystem

ROOT = Path(__file__).resolve().parent.parent

# Reads what to do from its standard input and ends with it, so with its parent. Of each node only
# what runs tasks is started: the agents for dashboards, metrics and environments, five processes of
# Python, have nothing to do here, and a node that waits for them dies on a busy machine.
_NODES = """
import re, sys
import ray._raylet
from ray._private import services
from ray._private.node import Node
from ray.cluster_utils import Cluster

start_raylet, start_process = Node.start_raylet, services.start_ray_process

def start_without_waiting(node, *arguments):
    for agent in ("DASHBOARD_AGENT_LISTEN", "METRICS_AGENT", "METRICS_EXPORT", "RUNTIME_ENV_AGENT"):
        name = getattr(ray._raylet, f"{agent}_PORT_NAME")
        ray._raylet.persist_port(node._session_dir, node._node_id, name, -1)  # not in use
    start_raylet(node, *arguments)

def start_without_agents(command, *arguments, **named):
    agent = re.compile("^(--[a-z_]*agent_command=).*")
    idle = 'sh -c "exec tail -f /dev/null --pid=$PPID"'  # as long as the node
    command = [agent.sub(lambda found: found[1] + idle, word) for word in command]
    return start_process(command, *arguments, **named)

Node.start_raylet = start_without_waiting
Node.start_api_server = lambda node, **named: None
services.start_ray_process = start_without_agents

def add(cpus):
    return cluster.add_node(
        num_cpus=cpus,
        node_ip_address="127.0.0.1",
        include_log_monitor=False,
        no_monitor=True,
        object_store_memory=80 * 2**20,
    )

cluster = Cluster()
nodes = []
for line in sys.stdin:
    what, number = line.split()
    if what == "add":
        nodes.append(add(int(number)))
    else:
        cluster.remove_node(nodes[int(number)], allow_graceful=False)
    print(cluster.address, flush=True)
for node in cluster.list_all_nodes():
    node.kill_all_processes(check_alive=False, allow_graceful=False)
"""


class Nodes:
    """The nodes of one cluster, numbered from 0 as they are added.

    Attributes:
        address: Where a driver connects.
    """

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        self.address = ""

    def add(self, cpus: int) -> None:
        """Start a node."""
        # Ray takes the loopback by its usual name for another address of this machine.
        self.address = self._tell(f"add {cpus}").replace("127.0.0.1", "[::ffff:127.0.0.1]")

    def kill(self, number: int) -> None:
        """End a node with all its processes, as a power cut does."""
        self._tell(f"kill {number}")

    def _tell(self, what: str) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline().strip()
        assert answer, f"the cluster ended at '{what}'"
        return answer


@contextmanager
def ray_cluster(cpus: int, environment: Mapping[str, str]) -> Iterator[Nodes]:
    """Run a cluster of one node; its workers get ``environment`` and find what tests import."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    fixed = {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", _NODES],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **environment, **fixed},
        text=True,
        start_new_session=True,
    )
    assert process.stdin is not None
    try:
        nodes = Nodes(process)
        nodes.add(cpus)
        yield nodes
    finally:
        process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=20)
        with suppress(ProcessLookupError):  # its nodes too, if they are still there
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


class GatedFileSystem(LocalFileSystem):
    """The local file system, in which most shards wait until a file appears.

    Those of the first numbers do not. What waits is in the hands of a worker, for a test to see.
    """

    def __init__(self, gate: str, free: int) -> None:
        self._gate = Path(gate)
        self._free = free

    def create(self, path: Path) -> LocalFile:
        """Create a file."""
        shard = re.match(r"model-(\d+)-of-", path.name)
        end = time.monotonic() + 600
        while shard and int(shard[1]) > self._free and not self._gate.exists():
            assert time.monotonic() < end
            time.sleep(0.01)
        return super().create(path)
