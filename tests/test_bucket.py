"""A bucket of a real S3 server as input and as output, with everything that goes wrong between."""

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from bucket_tools import SECRET, Bucket, free_port, proxy, refusal, s3_server
from helpers import (
    Result,
    assert_refused,
    contents,
    run_cli,
    run_here,
    write_checkpoint,
    write_pair,
)
from s3fs import S3FileSystem
from test_storage import FolderContract

from uipe_merge.checkpoint.urls import RemoteFolder

NAMED = {"README.md", "uipe_merge.json"}  # they say where the inputs were
WEIGHTS = "model-00001-of-00003.safetensors"


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with s3_server() as number:
        yield number


_numbers = itertools.count()


class Case(NamedTuple):
    """A pair of three shards, here and in a bucket of its own."""

    root: Path
    bucket: Bucket
    original: str
    unlearned: str

    @property
    def output(self) -> str:
        return self.bucket.url("out")

    def run(
        self, *extra: object, port: int | None = None, output: object = None, timeout: float = 120
    ) -> Result:
        """Merge from bucket to bucket, which must not show the secret."""
        words = (self.original, self.unlearned, "--alpha", 1, "-q", "-o", output or self.output)
        result = self.cli(*words, *extra, port=port, timeout=timeout)
        assert SECRET not in result.err + result.out
        return result

    def cli(self, *words: object, port: int | None = None, timeout: float = 120) -> Result:
        """Run the command line; what meets failures (at ``port``) in a process of its own."""
        environment = self.bucket.environment(self.root, port)
        if port is not None:
            return run_cli(*words, cwd=self.root, env=environment, timeout=timeout)
        S3FileSystem.clear_instance_cache()  # one holds the credentials it began with
        return run_here(*words, cwd=self.root, env=environment)

    def expected(self) -> dict[str, bytes]:
        """The output of a merge that is left alone; it is removed again."""
        assert self.run().code == 0
        found = self.bucket.contents("out")
        self.clear()
        return found

    def clear(self) -> None:
        for key in self.bucket.objects("out/"):
            self.bucket.delete(key)

    def left_here(self) -> list[Path]:
        """What is left of interrupted runs on this machine."""
        return list((self.root / "cache" / "uipe-merge").iterdir())


@pytest.fixture
def case(tmp_path: Path, port: int) -> Case:
    original, unlearned = write_pair(tmp_path, shards=3)
    bucket = Bucket(port, f"models-{next(_numbers)}")
    return Case(tmp_path, bucket, bucket.put_tree(original, "o"), bucket.put_tree(unlearned, "u"))


def merge_locally(case: Case) -> dict[str, bytes]:
    done = run_here("original", "unlearned", "--alpha", 1, "-o", "out", "-q", cwd=case.root)
    assert done.code == 0, done
    return contents(case.root / "out")


def differing(one: dict[str, bytes], two: dict[str, bytes]) -> set[str]:
    return {name for name in one | two if one.get(name) != two.get(name)}


class TestBucketFolder(FolderContract):
    @pytest.fixture(autouse=True)
    def _server(self, port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bucket = Bucket(port, f"models-{next(_numbers)}")
        for name, value in self.bucket.environment(tmp_path).items():
            monkeypatch.setenv(name, value)

    def make(self, root: Path, files: dict[str, bytes]) -> RemoteFolder:
        for name, content in files.items():
            self.bucket.put(f"model/{name}", content)
        self.bucket.put("model-2/x", b"")
        return RemoteFolder(self.bucket.url("model"))


class TestMerging:
    def test_a_step_along_and_away_from_what_is_in_the_bucket(self, case: Case) -> None:
        steering = ("--alpha", 1, "--away-from", "{0}", "--always", "--add", "{0}=0.5", "--rank", 2)
        found = []
        for original, unlearned, out in (
            (case.original, case.unlearned, case.output),
            ("original", "unlearned", case.root / "here"),
        ):
            words = [str(word).format(unlearned) for word in steering]
            done = case.cli(original, unlearned, "-o", out, "-q", "--rank-all", *words)
            assert done.code == 0, done
            found.append(contents(out) if isinstance(out, Path) else case.bucket.contents("out"))
        assert differing(*found) <= NAMED

    def test_from_bucket_to_bucket_as_from_disk_to_disk(self, case: Case) -> None:
        assert case.run().code == 0
        found = case.bucket.contents("out")
        assert differing(found, merge_locally(case)) == NAMED
        assert case.left_here() == []
        assert case.cli("verify", case.output).code == 0
        inspected = case.cli("inspect", case.original, case.unlearned, "--json")
        here = run_here("inspect", "original", "unlearned", "--json", cwd=case.root)
        assert json.loads(inspected.out)["total"] == json.loads(here.out)["total"]

    @pytest.mark.parametrize("remote", ["original", "unlearned", "output"])
    def test_one_side_by_url(self, case: Case, remote: str) -> None:
        original = case.original if remote == "original" else "original"
        unlearned = case.unlearned if remote == "unlearned" else "unlearned"
        output = case.output if remote == "output" else "mixed"
        done = case.cli(original, unlearned, "--alpha", 1, "-q", "-o", output)
        assert done.code == 0, done
        found = case.bucket.contents("out") if remote == "output" else contents(case.root / "mixed")
        assert differing(found, merge_locally(case)) <= NAMED

    @pytest.mark.parametrize("form", ["adapter", "both", "local model"])
    def test_an_adapter_by_url(self, case: Case, form: str) -> None:
        factors = {
            f"base_model.model.model.layers.0.self_attn.q_proj.lora_{side}.weight": torch.full(
                shape, 0.1
            )
            for side, shape in {"A": (2, 16), "B": (16, 2)}.items()
        }
        adapter = write_checkpoint(case.root / "ad", factors, config=None)
        (adapter / "model.safetensors").rename(adapter / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
        (adapter / "adapter_config.json").write_text(json.dumps(config))
        url = case.bucket.put_tree(adapter, "a+d")  # a plus of its own
        named = {"adapter": url, "both": f"{case.original}+{url}", "local model": f"original+{url}"}
        done = case.cli(case.original, named[form], "--alpha", 1, "-q", "-o", case.output)
        assert done.code == 0, done
        here = run_here("original", "ad", "--alpha", 1, "-q", "-o", "out", cwd=case.root)
        assert here.code == 0, here
        assert differing(case.bucket.contents("out"), contents(case.root / "out")) == NAMED


class TestTheWayThere:
    """What a network does: cut, refuse, fall silent."""

    def test_hazard_bodies_cut_half_way(self, case: Case) -> None:
        expected = case.expected()
        cut: dict[bytes, int] = {}

        def halve(head: bytes, answer: bytes) -> bytes:
            kind = head.split(b"?")[0][:80]
            if not head.startswith(b"GET") or cut.get(kind, 0) >= 2:
                return answer
            cut[kind] = cut.get(kind, 0) + 1
            start = answer.index(b"\r\n\r\n") + 4
            return answer[: start + (len(answer) - start) // 2]

        with proxy(case.bucket.port, response=halve) as between:
            assert case.run(port=between.port).code == 0
        assert cut
        assert case.bucket.contents("out") == expected

    @pytest.mark.parametrize("status", [429, 500, 503])
    def test_hazard_a_server_that_is_busy(self, case: Case, status: int) -> None:
        expected = case.expected()
        count = itertools.count()

        def refuse(head: bytes, answer: bytes) -> bytes:
            busy = {429: "TooManyRequests", 500: "InternalError", 503: "SlowDown"}[status]
            return refusal(status, busy) if next(count) % 4 == 0 else answer

        with proxy(case.bucket.port, response=refuse) as between:
            result = case.run(port=between.port)
        assert result.code == 0, result
        assert case.bucket.contents("out") == expected

    @pytest.mark.parametrize("words", ["merge", "verify"])
    def test_hazard_no_server(self, case: Case, words: str) -> None:
        dead = free_port()
        if words == "merge":
            result = case.run(port=dead, timeout=90)
        else:
            result = case.cli("verify", case.output, port=dead, timeout=90)
        assert_refused(result, 10, "s3://", "check the connection")

    def test_hazard_the_server_dies_in_the_middle_and_the_rest_follows(self, case: Case) -> None:
        expected = case.expected()
        dead = threading.Event()

        def die(request: bytes) -> bytes:
            if request.startswith(b"PUT") and b"00003-of" in request.split(b"\r\n")[0]:
                dead.set()
            if dead.is_set():
                raise ConnectionError
            return request

        with proxy(case.bucket.port, request=die) as between:
            result = case.run("--threads", 1, port=between.port, timeout=90)
        assert_refused(result, 10, case.output, "run the same command again")
        assert "out/uipe_merge.json" not in case.bucket.objects()
        assert case.run().code == 0
        assert case.bucket.contents("out") == expected
        assert case.left_here() == []

    def test_hazard_access_denied(self, case: Case) -> None:
        with proxy(case.bucket.port, response=lambda *_: refusal(403, "AccessDenied")) as between:
            result = case.run(port=between.port)
            asked = len(between.heads)
        assert_refused(result, 10, case.original, "access denied", "credentials")
        assert asked == 1

    def test_hazard_an_output_that_may_not_be_written(self, case: Case) -> None:
        def deny(head: bytes, answer: bytes) -> bytes:
            return refusal(403, "AccessDenied") if head.startswith(b"PUT") else answer

        with proxy(case.bucket.port, response=deny) as between:
            result = case.run(port=between.port)
        assert_refused(result, 10, case.output, "access denied")

    def test_hazard_missing(self, case: Case) -> None:
        words = (case.unlearned, "--alpha", 1, "-o", case.output)
        for url in ("s3://no-such-bucket/model", case.bucket.url("none")):
            assert_refused(case.cli(url, *words), 2, url, "does not exist")
        result = case.run(output="s3://no-such-bucket/model")
        assert_refused(result, 10, "s3://no-such-bucket/model", "create the bucket")
        case.bucket.delete(f"u/{WEIGHTS}")
        assert_refused(case.run(), 4, f"{case.unlearned}/{WEIGHTS}", "no such file")


class TestChanges:
    """Objects that change under the program's feet."""

    def merge_while(
        self, case: Case, sign: bytes, act: Callable[[], None], *extra: object
    ) -> Result:
        """Merge, and do something just before the first request that begins so."""
        waiting = [act]

        def watch(request: bytes) -> bytes:
            if waiting and request.startswith(sign):
                waiting.pop()()
            return request

        with proxy(case.bucket.port, request=watch) as between:
            result = case.run(*extra, port=between.port)
        assert not waiting
        return result

    def test_hazard_replaced_between_planning_and_reading(self, case: Case) -> None:
        key = f"u/{WEIGHTS}"
        other = bytearray(case.bucket.get(key))
        other[-1] ^= 1
        # The configuration is looked at after all headers, and before any tensor.
        sign = f"GET /{case.bucket.name}/u/config.json".encode()
        result = self.merge_while(case, sign, lambda: case.bucket.put(key, bytes(other)))
        assert_refused(result, 4, f"{case.unlearned}/{WEIGHTS}", "changed since")
        assert case.bucket.objects("out/") == []
        assert case.left_here() == []

    def test_hazard_replaced_after_it_was_read(self, case: Case) -> None:
        key = f"o/{WEIGHTS}"
        other = bytearray(case.bucket.get(key))
        other[-1] ^= 1
        sign = f"PUT /{case.bucket.name}/out/model-00003".encode()
        act = lambda: case.bucket.put(key, bytes(other))  # noqa: E731 - named for the next line
        result = self.merge_while(case, sign, act, "--threads", 1)
        assert_refused(result, 4, f"{case.original}/{WEIGHTS}", "changed since")
        assert case.bucket.objects("out/") == []

    def test_hazard_the_output_changed_behind_our_back(self, case: Case) -> None:
        expected = case.expected()
        key = f"out/{WEIGHTS}"

        def spoil() -> None:
            other = bytearray(case.bucket.get(key))
            other[-1] ^= 1
            case.bucket.put(key, bytes(other))

        sign = f"PUT /{case.bucket.name}/out/README.md".encode()
        assert_refused(self.merge_while(case, sign, spoil), 10, case.output, "changed while")
        assert "out/uipe_merge.json" not in case.bucket.objects()
        assert case.run().code == 0
        assert case.bucket.contents("out") == expected

    @pytest.mark.parametrize("always", [False, True])
    @pytest.mark.parametrize("name", [WEIGHTS, "config.json", "uipe_merge.json"])
    def test_hazard_other_bytes_are_stored_than_were_sent(
        self, case: Case, name: str, always: bool
    ) -> None:
        expected = case.expected()
        spoilt = itertools.count()

        def spoil(answer_to: bytes, answer: bytes) -> bytes:
            first = answer_to.split(b"\r\n")[0]
            key = f"out/{name}"
            if first.startswith(f"PUT /{case.bucket.name}/{key}".encode()) and (
                next(spoilt) == 0 or always
            ):
                content = bytearray(case.bucket.get(key))
                content[len(content) // 2] ^= 1
                case.bucket.put(key, bytes(content))
            return answer

        with proxy(case.bucket.port, response=spoil) as between:
            result = case.run(port=between.port)
        if always:
            assert_refused(result, 10, f"{case.output}/{name}", "read back with other bytes")
        else:
            assert result.code == 0, result
            assert case.bucket.contents("out") == expected

    def test_verify_finds_right_sizes_and_wrong_bytes(self, case: Case) -> None:
        assert case.run().code == 0
        content = bytearray(case.bucket.get(f"out/{WEIGHTS}"))
        content[-1] ^= 1
        case.bucket.put(f"out/{WEIGHTS}", bytes(content))
        case.bucket.delete("out/config.json")
        fragments = (f"'{WEIGHTS}' has the right size and other bytes", "'config.json' is missing")
        assert_refused(case.cli("verify", case.output), 4, *fragments)


class TestKills:
    @pytest.mark.parametrize("stored", [False, True], ids=["before", "after"])
    @pytest.mark.parametrize(
        "name", ["model-00001-of", "model-00002-of", "README.md", "uipe_merge.json"]
    )
    def test_hazard_killed_and_run_again(self, case: Case, name: str, stored: bool) -> None:
        expected = case.expected()
        self.kill(case, f"PUT /{case.bucket.name}/out/{name}".encode(), stored=stored)
        published = name == "uipe_merge.json" and stored
        assert ("out/uipe_merge.json" in case.bucket.objects()) == published
        words = (case.original, case.unlearned, "--alpha", 1, "-o", case.output, "--json")
        again = case.cli(*words)
        assert again.code == 0, again
        # One thread works on two shards at a time and delivers the first one first.
        assert json.loads(again.out)["resumed_shards"] == {
            "model-00001-of": 0,
            "model-00002-of": 1,
        }.get(name, 3)
        assert case.bucket.contents("out") == expected
        assert case.left_here() == []

    def kill(self, case: Case, sign: bytes, *extra: object, stored: bool) -> None:
        """Start the program and kill it at the first request that begins so."""
        process: list[subprocess.Popen[bytes]] = []

        def die() -> None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process[0].pid, signal.SIGKILL)
            process[0].wait(timeout=30)

        def before(request: bytes) -> bytes:
            if not stored and request.startswith(sign):
                die()
                raise ConnectionError
            return request

        def after(head: bytes, answer: bytes) -> bytes:
            if stored and head.startswith(sign):
                die()
            return answer

        with proxy(case.bucket.port, request=before, response=after) as between:
            words = [case.original, case.unlearned, "--alpha", "1", "--threads", "1"]
            words += ["-q", "-o", case.output, *map(str, extra)]
            environment = {**os.environ, **case.bucket.environment(case.root, between.port)}
            process.append(
                subprocess.Popen(
                    [sys.executable, "-m", "uipe_merge", *words],
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
            )
            process[0].wait(timeout=120)
        assert process[0].returncode == -signal.SIGKILL


class TestOverwriting:
    def test_hazard_something_is_there(self, case: Case) -> None:
        case.bucket.put("out/notes.txt", b"mine")
        for extra in ((), ("--overwrite",)):
            assert_refused(case.run(*extra), 8, case.output, "exists and is not empty")
        assert case.bucket.contents("out") == {"notes.txt": b"mine"}

    def test_a_model_of_ours(self, case: Case) -> None:
        expected = case.expected()
        assert case.run("--max-shard-size", 3000).code == 0
        before = case.bucket.contents("out")
        assert before.keys() - expected.keys()
        assert_refused(case.run(), 8, case.output, "exists and is not empty")
        assert case.bucket.contents("out") == before
        assert case.run("--overwrite").code == 0
        assert case.bucket.contents("out") == expected

    def test_hazard_something_else_beside_a_model_of_ours(self, case: Case) -> None:
        assert case.run().code == 0
        case.bucket.put("out/notes.txt", b"mine")
        before = case.bucket.contents("out")
        assert_refused(case.run("--overwrite"), 8, case.output, "notes.txt")
        assert case.bucket.contents("out") == before

    @pytest.mark.parametrize("when", ["DELETE /{}/out", "PUT /{}/out/model-00002"])
    def test_hazard_killed_while_replacing(self, case: Case, when: str) -> None:
        expected = case.expected()
        assert case.run("--max-shard-size", 3000).code == 0
        sign = when.format(case.bucket.name).encode()
        TestKills().kill(case, sign, "--overwrite", stored=True)
        assert "out/uipe_merge.json" not in case.bucket.objects()
        again = case.run("--overwrite")
        assert again.code == 0, again
        assert case.bucket.contents("out") == expected
        assert case.left_here() == []

    def test_hazard_an_interrupted_run_of_another_command(self, case: Case) -> None:
        sign = f"PUT /{case.bucket.name}/out/model-00002".encode()
        TestKills().kill(case, sign, stored=True)
        words = (case.original, case.unlearned, "--alpha", 2, "-q", "-o", case.output)
        assert_refused(case.cli(*words), 8, "differs in", "alpha")
        assert case.cli(*words, "--overwrite").code == 0
        assert case.cli("verify", case.output).code == 0


@pytest.mark.sweep
@pytest.mark.timeout(1800)
def test_a_gigabyte_from_bucket_to_bucket_in_512_mib(tmp_path: Path, port: int) -> None:
    bucket = Bucket(port, "gigabyte")
    generator = torch.Generator().manual_seed(0)
    for side in ("o", "u"):
        folder = tmp_path / side
        tensors = {
            f"model.layers.{number}.mlp.down_proj.weight": torch.randn(
                (4096, 8192), generator=generator
            ).bfloat16()
            for number in range(16)
        }
        bucket.put_tree(write_checkpoint(folder, tensors, shards=4), side)
        del tensors
        for path in folder.iterdir():
            path.unlink()
    words = [bucket.url("o"), bucket.url("u"), "--alpha", "1", "-q", "-o", bucket.url("out")]
    # A child begins with the peak of its parent, so one that is small starts it.
    starter = (
        "import resource, subprocess, sys\n"
        "done = subprocess.run([sys.executable, '-m', 'uipe_merge', *sys.argv[1:]])\n"
        "print(done.returncode, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)\n"
    )
    finished = subprocess.run(
        [sys.executable, "-c", starter, *words],
        env={**os.environ, **bucket.environment(tmp_path)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
    )
    code, peak = map(int, finished.stdout.split())
    assert code == 0, finished.stderr
    assert peak <= 512 * 1024, f"{peak / 1024:.0f} MiB"
