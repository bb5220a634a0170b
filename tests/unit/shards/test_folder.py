"""The folder in which parts come together, with any number of threads and processes in it."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import loratool
from loratool.errors import FileFormatError, OutputError, OutputExistsError
from loratool.shards import folder as module
from loratool.shards.dealing import Share
from loratool.shards.folder import Claim, PartsFolder, is_inside, worker_name
from loratool.shards.job import Job, Part, Settings, Task, carry_out
from loratool.shards.records import all_records, differing_workers, missing_parts
from loratool.shards.status import status


def document(digest: str = "d", parts: int = 2) -> dict[str, Any]:
    return {
        "plan": 1,
        "loratool": loratool.__version__,
        "verb": "merge",
        "digest": digest,
        "folder": True,
        "begun": 1.0,
        "parts": [[f"part {number}", 100] for number in range(1, parts + 1)],
        "closing": None,
        "told": {},
    }


@pytest.fixture
def folder(tmp_path: Path) -> PartsFolder:
    """Return a folder that was begun."""
    found = PartsFolder(tmp_path / "out")
    assert found.begin(document())
    return found


@pytest.fixture(params=["links", "no links"])
def links(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Have a file system without links, too."""

    def refuse(*arguments: Any) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    if request.param == "no links":
        monkeypatch.setattr(os, "link", refuse)
        monkeypatch.setattr(module, "PAUSE", 0.01)
    return str(request.param)


@pytest.mark.usefixtures("links")
@pytest.mark.parametrize("attempt", range(5))
def test_many_threads_make_one_plan(attempt: int, tmp_path: Path) -> None:
    barrier = threading.Barrier(8)

    def begin(number: int) -> bool:
        barrier.wait()
        return PartsFolder(tmp_path / "out").begin({**document(), "begun": float(number)})

    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(begin, range(8)))
    assert sum(made) == 1
    assert PartsFolder(tmp_path / "out").plan()["begun"] == float(made.index(True))
    assert not [each for each in PartsFolder(tmp_path / "out").work.iterdir() if each.is_dir()]


def test_many_processes_make_one_plan(tmp_path: Path) -> None:
    code = (
        "import sys, json, time; from pathlib import Path\n"
        "from loratool.shards.folder import PartsFolder\n"
        "folder = PartsFolder(Path(sys.argv[1]))\n"
        "while time.time() < float(sys.argv[2]): pass\n"
        "print(folder.begin(json.loads(sys.argv[3])))\n"
    )
    line = [sys.executable, "-c", code, str(tmp_path / "out"), str(time.time() + 1)]
    workers = [
        subprocess.Popen([*line, json.dumps(document())], stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    assert sorted(worker.communicate()[0].strip() for worker in workers) == 3 * ["False"] + ["True"]


@pytest.mark.usefixtures("links")
def test_another_plan_is_refused(tmp_path: Path) -> None:
    folder = PartsFolder(tmp_path / "a b")
    assert folder.begin(document())
    assert not folder.begin(document())
    with pytest.raises(OutputExistsError, match="other inputs or options") as caught:
        folder.begin(document("other"))
    assert f"rm -r '{folder.path}'" in str(caught.value.hint)
    old = json.loads(folder.plan_path.read_text()) | {"loratool": "0.0.1"}
    folder.plan_path.write_text(json.dumps(old))
    with pytest.raises(OutputExistsError, match=r"version '0\.0\.1' of loratool"):
        folder.begin(document("other"))


def test_a_worker_that_died_where_there_are_no_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", lambda *_: Path("/nowhere/at/all").stat())
    monkeypatch.setattr(module, "PAUSE", 0.001)
    folder = PartsFolder(tmp_path / "out")
    folder.work.mkdir(parents=True)
    (folder.work / "plan.json.begun").touch()
    assert folder.begin(document())


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "{",
        '{"plan": 2}',
        '{"plan": 1}',
        '{"plan": 1, "digest": 3, "verb": "merge", "parts": []}',
        '{"plan": 1, "digest": "d", "verb": null, "parts": []}',
        '{"plan": 1, "digest": "d", "verb": "merge", "parts": 7}',
        '{"plan": 1, "digest": "d", "verb": "merge", "parts": [["a"]]}',
        '{"plan": 1, "digest": "d", "verb": "merge", "parts": [["a", "b"]]}',
        '{"plan": 1, "digest": "d", "verb": "merge", "parts": [["a", -1]]}',
        '{"plan": 1, "digest": "d", "verb": "merge", "parts": [["a", 1e5]]}',
        '{"plan": 1, "digest": "d", "verb": "merge", "parts": [["a", 1]]}',
        "[" * 100_000,
        '{"plan": ' + "9" * 5000 + "}",
        "\x00\xff",
    ],
    ids=range(17),
)
def test_a_plan_that_is_damaged(text: str, folder: PartsFolder) -> None:
    folder.plan_path.write_text(text)
    with pytest.raises(FileFormatError) as caught:
        status(folder.output)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[1]",
        '{"plan": "d"}',
        '{"plan": "d", "files": 3}',
        '{"plan": "d", "files": {"a": 3}}',
        '{"plan": "other", "files": {}}',
        '{"plan": "d", "files": {"../../plan.json": 1}}',
        '{"plan": "d", "files": {"/etc/hostname": 1}}',
        '{"plan": "d", "files": {"a\\u0000b": 1}}',
        '{"plan": "d", "files": {"' + "x" * 5000 + '": 1}}',
    ],
)
def test_a_record_that_is_damaged_counts_as_none(text: str, folder: PartsFolder) -> None:
    folder.write_record(1, {"plan": "d", "files": {}})
    assert folder.record(1, "d") is not None
    (folder.path / "records" / "0001.json").write_text(text)
    assert folder.record(1, "d") is None
    assert missing_parts(folder, document()) == [1, 2]
    with pytest.raises(OutputError, match="2 of 2 parts are missing: part 1, part 2"):
        all_records(folder, document())


def test_a_record_is_of_files_that_are_there(folder: PartsFolder) -> None:
    (folder.made / "a").write_bytes(b"12")
    (folder.work / "b").write_bytes(b"123")
    folder.write_record(1, {"plan": "d", "files": {"a": 2, "b": 3}})
    assert folder.record(1, "d")
    assert folder.record(1, "other") is None
    (folder.made / "a").write_bytes(b"1")
    assert folder.record(1, "d") is None


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\n",
        b"{}\n",
        b"[]\n1\n",
        b'{"host": 3}\n',
        b"\xff\n",
        b'{"host": "h", "pid": "x"}\n',
        b'{"host": "h", "pid": 1}\n' + b"9" * 5000 + b"\n",
        b'{"host": "h", "pid": 1}\n-3\nx\n5\n',
        json.dumps({"host": socket.gethostname(), "pid": 10**30}).encode() + b"\n",
        json.dumps({"host": socket.gethostname(), "pid": 1e300}).encode() + b"\n",
        b'{"host": "h", "pid": 1e999}\n',
    ],
    ids=range(12),
)
def test_claims_that_are_damaged(text: bytes, folder: PartsFolder) -> None:
    path = folder.path / "claims" / "0001"
    path.write_bytes(text)
    claim = folder.claimed(1)
    assert claim is not None and not claim.is_dead and claim.size == len(text)
    assert folder.claim(1) is None
    folder.take_over(1)
    assert folder.claim(1) is not None


def test_one_process_has_a_claim(folder: PartsFolder) -> None:
    with ThreadPoolExecutor(8) as threads:
        found = [claim for claim in threads.map(lambda _: folder.claim(1), range(32)) if claim]
    assert len(found) == 1
    other = folder.claimed(1)
    assert other is not None and not other.is_dead
    assert (other.host, other.pid) == (socket.gethostname(), os.getpid())
    folder.release(found[0])
    assert folder.claimed(1) is None
    assert folder.claim(1) is not None


def test_a_claim_grows_as_long_as_somebody_works(
    folder: PartsFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BEAT", 0.0)
    claim = folder.claim(1)
    assert claim is not None
    sizes = []
    for done in (0, 50, 100):
        claim.beat(done)
        seen = folder.claimed(1)
        assert seen is not None and seen.done == done
        sizes.append(seen.size)
    assert sizes == sorted(set(sizes))
    folder.release(claim)
    claim.beat(7)  # of what was taken away, too
    assert folder.claimed(1) is None


def test_who_has_died_is_known_on_this_machine_only(folder: PartsFolder) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    path = folder.path / "claims" / "0001"
    for host, pid, is_dead in (
        (socket.gethostname(), process.pid, True),
        (socket.gethostname(), 1, False),
        ("elsewhere", process.pid, False),
        (socket.gethostname(), os.getpid(), True),  # of an earlier container with the same number
    ):
        path.write_text(json.dumps({"host": host, "pid": pid}) + "\n")
        claim = Claim.read(path)
        assert claim is not None and claim.is_dead is is_dead


def test_of_several_who_take_over_one_gets_it(folder: PartsFolder) -> None:
    (folder.path / "claims" / "0001").touch()
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda _: folder.take_over(1), range(8)))
    assert folder.claimed(1) is None


def test_one_at_a_time_finishes(folder: PartsFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAUSE", 0.001)
    (folder.made / "model.safetensors").write_bytes(b"x")

    def finish(_: int) -> bool:
        with folder.finishing() as claim:
            if claim is None:
                return False
            folder.publish(folder=True, force=False)
            folder.remove()
            return True

    with ThreadPoolExecutor(6) as threads:
        assert sorted(threads.map(finish, range(6))) == [False] * 5 + [True]
    assert (folder.output / "model.safetensors").read_bytes() == b"x"
    assert [path.name for path in folder.output.parent.iterdir()] == ["out"]


def test_who_was_killed_while_finishing_is_followed(
    folder: PartsFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PAUSE", 0.001)
    monkeypatch.setattr(module, "STALE", 0.1)
    (folder.path / "claims" / "0000").write_text('{"host": "elsewhere", "pid": 3}\n')
    begun = time.monotonic()
    with folder.finishing() as claim:
        assert claim is not None
    assert time.monotonic() - begun > 0.1
    assert not folder.is_published(folder=True)
    folder.publish(folder=True, force=False)
    assert folder.is_published(folder=True)


def test_what_is_left_of_a_folder_goes_away(folder: PartsFolder, tmp_path: Path) -> None:
    names = []
    rename = Path.rename

    def killed(self: Path, target: Path) -> Path:
        names.append(Path(target).name)
        rename(self, target)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            folder.remove()
    assert [path.name for path in tmp_path.iterdir()] == names
    (tmp_path / ".other.loratool-parts.loratool-gone-1").mkdir()
    folder.begin(document())
    found = sorted(path.name for path in tmp_path.iterdir())
    assert found == [".other.loratool-parts.loratool-gone-1", "out.loratool-parts"]


@pytest.mark.parametrize("name", ["a", "a/b.safetensors", "...", "..a", "a b"])
def test_names_inside(name: str) -> None:
    assert is_inside(name)


@pytest.mark.parametrize("name", ["", ".", "..", "/a", "a/", "a/../b", "../a", "a//b", "a\0"])
def test_names_that_lead_out(name: str) -> None:
    assert not is_inside(name)


def test_the_name_of_a_worker_is_one_of_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "a/../b c" * 30)
    assert "/" not in worker_name() and len(worker_name()) < 80


# -- parts ----------------------------------------------------------------------------------------


def job_of(output: Path, work: Any, parts: int = 3) -> Job:
    made = tuple(Part(f"part {number}", 10 * number, number) for number in range(1, parts + 1))
    return Job("merge", output, made, None, {}, work)


def test_a_part_is_done_once(tmp_path: Path) -> None:
    done: list[int] = []

    def work(task: Task) -> dict[str, Any]:
        done.append(task.number)
        return {"files": {}, "value": int(task.text)}

    job = job_of(tmp_path / "out", work)
    folder = PartsFolder(job.output)
    folder.begin(job.document)
    tasks = [job.task(index, Settings()) for index in (0, 1, 1, 2, 0)]
    with ThreadPoolExecutor(5) as threads:
        records = list(threads.map(lambda task: carry_out(work, task, alone=True), tasks))
    assert sorted(done) == [1, 2, 3]
    again = [carry_out(work, task) for task in tasks]
    assert sorted(done) == [1, 2, 3]
    assert [each["value"] for each in again if each] == [1, 2, 2, 3, 1]
    assert {each["part"] for each in records if each} == {1, 2, 3}
    assert not missing_parts(folder, job.document)
    assert not list((folder.path / "claims").iterdir())


def test_a_failure_is_told_and_forgotten_once_it_goes_well(tmp_path: Path) -> None:
    fails = [True]

    def work(task: Task) -> dict[str, Any]:
        if fails:
            raise FileFormatError("base", "was changed", hint="wait")
        return {"files": {}}

    job = job_of(tmp_path / "out", work)
    folder = PartsFolder(job.output)
    folder.begin(job.document)
    with pytest.raises(FileFormatError):
        carry_out(work, job.task(1, Settings()))
    with pytest.raises(OutputError, match="one failed: base: was changed"):
        all_records(folder, job.document)
    found = status(job.output)
    assert (found.count("failed"), found.count("waiting")) == (1, 2)
    assert "was changed" in str(found)
    fails.clear()
    carry_out(work, job.task(1, Settings()))
    assert folder.failure(2) is None
    assert status(job.output).count("done") == 1


def test_a_part_that_does_not_stay_is_told(tmp_path: Path) -> None:
    from loratool.shards.course import do_share

    def work(task: Task) -> dict[str, Any]:
        return {"files": {"a": 1}}  # which is never there

    job = job_of(tmp_path / "out", work, parts=1)
    PartsFolder(job.output).begin(job.document)
    with pytest.raises(OutputError, match="part 1 was done, and is not there any more"):
        do_share(job, Share(), Settings())


def test_the_digest_is_of_all_that_decides(tmp_path: Path) -> None:
    def work(task: Task) -> dict[str, Any]:
        raise NotImplementedError

    job = job_of(tmp_path / "out", work)
    others = [
        job_of(tmp_path / "out", work, parts=2),
        Job("verify", job.output, job.parts, None, {}, work),
        Job("merge", job.output, job.parts, 1, {}, work),
        Job("merge", job.output, (Part("x", 10, 1), *job.parts[1:]), None, {}, work),
        Job("merge", job.output, (Part("part 1", 10, 2), *job.parts[1:]), None, {}, work),
    ]
    assert len({job.digest, *(each.digest for each in others)}) == 6
    same = Job("merge", tmp_path / "b", job.parts, None, {"base": "/x"}, work, told={"a": 1})
    assert same.digest == job.digest


def test_workers_that_differ_are_told() -> None:
    one = {"blas": "openblas 1", "core": "Zen", "processor": "x86_64", "device": "cpu"}
    assert not differing_workers([one, one])
    (note,) = differing_workers([one, {**one, "core": "Haswell"}])
    assert "Haswell, Zen" in note and "last bits" in note
    assert "openblas" not in note


def test_a_folder_that_cannot_be_written(
    folder: PartsFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "x")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(OutputError):
        folder.claim(1)
    folder.write_failure(1, {"error": {}})
    monkeypatch.undo()
    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(OutputError):
        PartsFolder(folder.output).begin(document())
