"""The peers, their pinned packages, and virtual environments made of these on first use."""

import hashlib
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

TORCH = "torch==2.13.0"
"""Installed first and alone: a peer's own requirement could take another build."""
MADE = "actstore-pins"
"""File in an environment that says what it was made of, once it is complete."""
INSTALL_SECONDS = 1800


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A loader to compare with."""

    name: str
    title: str
    pins: tuple[str, ...]

    @property
    def script(self) -> Path:
        """What measures it."""
        return Path(__file__).parent / f"peer_{self.name}.py"


PEERS = (
    Peer(name="mosaic", title="MosaicML Streaming", pins=(TORCH, "mosaicml-streaming==0.13.0", "numpy==2.1.3")),
    Peer(name="litdata", title="LitData", pins=(TORCH, "litdata==0.2.76", "numpy==2.4.6")),
    Peer(name="webdataset", title="WebDataset", pins=(TORCH, "webdataset==1.0.2", "numpy==2.4.6")),
    Peer(name="zarr", title="zarr-python + DataLoader", pins=(TORCH, "zarr==3.1.6", "numpy==2.4.6")),
    Peer(name="saelens", title="SAELens cache", pins=(TORCH, "sae-lens==6.54.12")),
    Peer(
        name="datasets",
        title="HF datasets",
        pins=(TORCH, "datasets==5.2.0", "pyarrow==26.0.1", "numpy==2.4.6"),
    ),
)


class NotInstalledError(Exception):
    """Why a peer has no environment."""


def python_of(peer: Peer, folder: Path, *, install: bool) -> Path:
    """The interpreter of a peer's environment `folder/bench-NAME`, which is made if `install` and it is not there."""
    where = folder / f"bench-{peer.name}"
    python, made = where / "bin" / "python", where / MADE
    if made.is_file() and made.read_text() == _digest(peer):
        return python
    if not install:
        raise NotInstalledError("not installed; `actstore bench peers` does it")
    folder.mkdir(parents=True, exist_ok=True)
    ignore = folder / ".gitignore"
    if not ignore.exists():
        ignore.write_text("*\n")
    print(f"{peer.title}: making {where}, once", file=sys.stderr)
    _run([sys.executable, "-m", "venv", "--clear", str(where)])
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    _run([*pip, TORCH])
    _run([*pip, *peer.pins])
    made.write_text(_digest(peer))
    return python


def _digest(peer: Peer) -> str:
    return hashlib.sha256("\n".join(peer.pins).encode()).hexdigest()


def _run(command: list[str]) -> None:
    """Run a step of an installation; `NotInstalledError` says how it ended."""
    try:
        subprocess.run(
            command, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            text=True, timeout=INSTALL_SECONDS, env={**os.environ, "PIP_NO_INPUT": "1"},
        )  # fmt: skip
    except subprocess.TimeoutExpired as e:
        raise NotInstalledError(f"installing took more than {INSTALL_SECONDS} s") from e
    except subprocess.CalledProcessError as e:
        lines = [line for line in e.stderr.splitlines() if line.startswith("ERROR")] or e.stderr.splitlines() or ["?"]
        raise NotInstalledError(f"could not be installed: {lines[-1][:200]}") from e
