"""Storage on a real S3 server and on folders, with faults injected between client and server."""

import hashlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec  # noqa: F401
import pytest

import ft_dist.storage.files as files_module
import ft_dist.storage.storage as storage_module
from ft_dist.errors import ConfigError, MissingFileError, StorageError, UserError
from ft_dist.storage import Storage, is_remote_folder, is_url, open_storage, retry
from tests.object_store import ObjectStore, Proxy, Rule, fault_proxy, object_store


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    with object_store(tmp_path_factory.mktemp("s3")) as store:
        yield store


@pytest.fixture
def proxy(server: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    with fault_proxy(server.port) as proxy:
        for name, value in proxy.environment.items():
            monkeypatch.setenv(name, value)
        yield proxy


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_DELAY_S", 0.01)
    monkeypatch.setattr(retry, "LONGEST_DELAY_S", 0.1)


@pytest.fixture(params=["s3", "folder"])
def place(request: pytest.FixtureRequest, proxy: Proxy, tmp_path: Path) -> str:
    return f"s3://bucket/{tmp_path.name}" if request.param == "s3" else str(tmp_path / "store")


@pytest.mark.parametrize(
    "path, url, remote_folder",
    [
        ("s3://bucket/set", True, True),
        ("hf://datasets/me/mails/sets/train-0", True, True),
        ("hf://datasets/me/mails/", True, False),
        ("hf://me/mails", True, False),
        ("file:///sets/train-0", True, False),
        ("me/mails", False, False),
    ],
)
def test_every_remote_folder_is_a_url_but_not_the_reverse(path: str, url: bool, remote_folder: bool) -> None:
    assert (is_url(path), is_remote_folder(path)) == (url, remote_folder)


def test_files_are_read_back_unchanged(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_module, "PART_BYTES", 1000)
    storage = open_storage(place)
    content = os.urandom(4321)
    (tmp_path / "large").write_bytes(content)
    assert storage.list() == []
    storage.write("a/b.bin", content)
    storage.write("c.bin", tmp_path / "large")
    storage.write("empty", b"")
    assert storage.list() == ["a/b.bin", "c.bin", "empty"]
    assert storage.list("a") == ["a/b.bin"]
    assert storage.read_bytes("a/b.bin") == storage.read_bytes("c.bin") == content
    assert storage.read_range("c.bin", 4000, 4321) == content[4000:]
    assert storage.size("c.bin") == 4321
    digest = hashlib.blake2b(digest_size=16)
    storage.fetch("c.bin", tmp_path / "fetched", digest=digest)
    assert (tmp_path / "fetched").read_bytes() == content
    assert digest.digest() == hashlib.blake2b(content, digest_size=16).digest()
    storage.write("c.bin", b"another")
    assert storage.read_bytes("c.bin") == b"another"
    storage.delete("c.bin")
    storage.delete("c.bin")
    assert not storage.exists("c.bin")
    assert storage.exists("empty")
    assert storage.read_bytes("empty") == b""


def test_a_missing_or_short_file_fails_without_retries(place: str) -> None:
    storage = open_storage(place)
    storage.write("short", b"12345")
    with pytest.raises(MissingFileError, match="nothing: not found"):
        storage.read_bytes("nothing")
    with pytest.raises(StorageError, match="5 bytes, fewer than 9"):
        storage.read_range("short", 0, 9)
    with pytest.raises(MissingFileError):
        storage.fetch("nothing", Path("unused"))


@pytest.mark.parametrize("answer", [500, 503, 429, "partial", "reset"])
@pytest.mark.usefixtures("quick")
def test_transient_failures_are_retried(proxy: Proxy, answer: int | str) -> None:
    """Twelve consecutive failures: more than the driver and its HTTP library retry."""
    lines: list[str] = []
    storage = open_storage("s3://bucket/passing", log=lines.append)
    content = os.urandom(5000)
    storage.write("x", content)
    proxy.rules = [Rule("GET /bucket/passing/x", answer, times=12)]  # type: ignore[arg-type]
    assert storage.read_bytes("x") == content
    assert proxy.rules[0].seen == 12
    assert len(lines) == 2, lines
    assert "s3://bucket/passing/x: read failed" in lines[0]
    assert "answers again" in lines[1]


@pytest.mark.parametrize("answer", [500, 503, "reset", "lose"])
@pytest.mark.usefixtures("quick")
def test_a_failed_upload_is_retried_in_full(proxy: Proxy, answer: int | str, tmp_path: Path) -> None:
    storage = open_storage("s3://bucket/uploads")
    content = os.urandom(100_000)
    (tmp_path / "file").write_bytes(content)
    proxy.rules = [Rule("PUT /bucket/uploads/x", answer, times=2)]  # type: ignore[arg-type]
    storage.write("x", tmp_path / "file")
    assert storage.read_bytes("x") == content
    assert proxy.rules[0].seen == 2


@pytest.mark.usefixtures("quick")
def test_a_damaged_upload_is_detected(proxy: Proxy) -> None:
    """The first read-back differs, so the object is uploaded again."""
    storage = open_storage("s3://bucket/damaged")
    proxy.rules = [Rule("GET /bucket/damaged/x", "flip")]
    storage.write("x", os.urandom(1000))
    assert len([request for request in proxy.requests if request.startswith("PUT /bucket/damaged/x")]) == 2


@pytest.mark.usefixtures("quick")
def test_a_hanging_request_times_out_and_is_retried(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = open_storage("s3://bucket/hanging")
    storage.write("x", b"content")
    monkeypatch.setattr(storage._files, "_timeout_s", 0.5)
    monkeypatch.setattr(files_module, "SLOWEST_BYTES_S", 2**40)
    proxy.rules = [Rule("GET /bucket/hanging/x", "hang", times=2)]
    assert storage.read_bytes("x") == b"content"
    assert proxy.rules[0].seen == 2


@pytest.mark.parametrize("wait_s, timeout_s", [(15.0, 15.0), (1800.0, 60.0), (0.0, 5.0)])
def test_one_request_takes_no_longer_than_the_caller_waits(wait_s: float, timeout_s: float) -> None:
    files = open_storage("s3://bucket/x", wait_s=wait_s)._files
    assert files._timeout(0) == {"timeout": timeout_s}
    assert files._files.config_kwargs["read_timeout"] == timeout_s


@pytest.mark.usefixtures("quick")
def test_a_fetch_resumes_at_the_failed_range(proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_module, "PART_BYTES", 1000)
    storage = open_storage("s3://bucket/parts")
    content = os.urandom(10_000)
    storage.write("x", content)
    proxy.requests.clear()
    proxy.rules = [Rule("GET /bucket/parts/x", "partial", times=4)]
    storage.fetch("x", tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == content
    assert len([request for request in proxy.requests if request.startswith("GET /bucket/parts/x")]) == 10 + 4


@pytest.mark.usefixtures("quick")
def test_the_limit_ends_retries_and_the_error_names_the_fix(proxy: Proxy, tmp_path: Path) -> None:
    lines: list[str] = []
    storage = open_storage("s3://bucket/down", wait_s=3.0, log=lines.append)
    assert not storage.exists("x"), "the first call creates the client, which is slow on a busy machine"
    proxy.rules = [Rule(".", 503, times=10**6)]
    with pytest.raises(
        StorageError, match=r"s3://bucket/down/x: cannot read: \d+ attempts failed within \d+ s .*remote_wait_s \(3\)"
    ):
        storage.fetch("x", tmp_path / "x")
    assert len(lines) == 1, "one line, not one per attempt"
    assert list(tmp_path.iterdir()) == []


def test_closing_cancels_retries_in_another_thread(proxy: Proxy) -> None:
    proxy.rules = [Rule(".", 503, times=10**6)]
    storage = open_storage("s3://bucket/down")
    raised: list[Exception] = []

    def read() -> None:
        try:
            storage.read_bytes("x")
        except UserError as error:
            raised.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    time.sleep(0.3)
    storage.close()
    thread.join(timeout=5)
    assert not thread.is_alive()
    assert "closed" in str(raised[0])


def test_wrong_credentials_and_buckets_are_not_retried(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StorageError, match=r"s3://no-such-bucket/x"):
        open_storage("s3://no-such-bucket").write("x", b"1")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StorageError, match=r"not allowed to read .*credentials"):
        open_storage("s3://bucket").read_bytes("x")


def test_the_error_for_a_missing_driver_names_the_extra_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    with pytest.raises(ConfigError, match=r"pip install 'ft-dist\[s3\]'"):
        open_storage("s3://bucket/x")
    with pytest.raises(ConfigError, match="unknown storage protocol nope://"):
        open_storage("nope://bucket/x")


def test_a_write_into_a_folder_leaves_no_partial_file(tmp_path: Path) -> None:
    storage: Storage = open_storage(f"file://{tmp_path}/new")
    storage.write("deep/x", b"1")
    assert [path.name for path in (tmp_path / "new" / "deep").iterdir()] == ["x"]
    assert storage.local == tmp_path / "new"


@pytest.mark.parametrize("name", ["/etc/passwd", "../x", "a/../../x", "", "a//b", "x" * 300, "a\nb"])
def test_a_name_that_leaves_the_folder_is_refused(place: str, tmp_path: Path, name: str) -> None:
    storage = open_storage(place)
    calls = [
        lambda: storage.write(name, b"x"),
        lambda: storage.read_bytes(name),
        lambda: storage.read_range(name, 0, 1),
        lambda: storage.size(name),
        lambda: storage.delete(name),
        lambda: storage.fetch(name, tmp_path / "to"),
    ]
    for call in calls:
        with pytest.raises(StorageError, match="names the file"):
            call()
    assert not (tmp_path / "x").exists()
