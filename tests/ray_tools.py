"""A real Ray cluster on loopback: its nodes are processes, started by a process of its own."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from uipe_merge.output.filesystem import LocalFile, LocalFileSystem

ROOT = Path(__file__).resolve().parent.parent

# Reads what to do from its standard input and ends with it, so with its parent. A node waits a
# quarter of a minute for its agents to say their ports, which a busy machine may not have; they
# serve no dashboard and no environments here, so the ports are said for them.
_NODES = """
import socket, sys
import ray._raylet
from ray._private.node import Node
from ray.cluster_utils import Cluster

start_raylet = Node.start_raylet

def start(node, *arguments):
    name = ray._raylet.DASHBOARD_AGENT_LISTEN_PORT_NAME
    ray._raylet.persist_port(node._session_dir, node._node_id, name, port())
    start_raylet(node, *arguments)

Node.start_raylet = start

def port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]

def add(cpus):
    agents = ("metrics_agent", "metrics_export", "dashboard_agent_listen", "runtime_env_agent")
    return cluster.add_node(
        num_cpus=cpus,
        node_ip_address="127.0.0.1",
        include_dashboard=False,
        include_log_monitor=False,
        no_monitor=True,
        object_store_memory=80 * 2**20,
        **{f"{agent}_port": port() for agent in agents},
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


class SlowFileSystem(LocalFileSystem):
    """The local file system, in which it takes a while to create a shard."""

    def create(self, path: Path) -> LocalFile:
        """Create a file."""
        if path.name.endswith(".safetensors.tmp"):
            time.sleep(0.5)
        return super().create(path)
