"""Kill a writer at random moments, many times: python tests/store/kills.py [--directory N] [--servers N].

After every kill the store is checked: what it shows is whole. At the end it is finished and must be what a writer that
nobody disturbed has written. Prints one line of JSON for each kind of storage.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import servers  # noqa: E402
from conftest import write_known  # noqa: E402
from test_commit import SMALL, _kill_at_random, finish, whole  # noqa: E402

from actstore.store import open_storage, open_store, open_writer  # noqa: E402
from actstore.store.format.spec import GROUP_KEY  # noqa: E402


def kill(kind: str, url: str, kills: int) -> None:
    """Kill as often, start over with a fresh store when one is finished, check, and report."""
    with tempfile.TemporaryDirectory() as quiet:
        undisturbed = open_store(write_known(f"{quiet}/s", SMALL).url).fingerprint
    began, done, stores, committed = time.monotonic(), 0, 0, 0
    while done < kills:
        here, step = f"{url}/{stores}", min(10, kills - done)
        _kill_at_random(here, step, seed=stores)
        if open_storage(here).exists(GROUP_KEY):
            committed += len(open_writer(here).committed())
        finish(here)
        whole(here, SMALL, undisturbed)
        done, stores = done + step, stores + 1
    print(json.dumps({"storage": kind, "kills": done, "stores": stores, "buckets_committed_by_killed": committed,
                      "lost": 0, "partial": 0, "seconds": round(time.monotonic() - began)}), flush=True)  # fmt: skip


def main() -> None:
    """Directory, fake-gcs-server and SeaweedFS in turn."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--directory", type=int, default=1000)
    parser.add_argument("--servers", type=int, default=100)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.directory:
            kill("directory", f"{folder}/stores", options.directory)
        for name, server in (("gcs", servers.gcs), ("s3", servers.s3)):
            (Path(folder) / name).mkdir()
            with server(Path(folder) / name) as running:
                os.environ.update({**servers.AWS, running.variable: running.url})
                if options.servers:
                    kill(f"{name} ({running.scheme})", running.fresh(), options.servers)


if __name__ == "__main__":
    main()
