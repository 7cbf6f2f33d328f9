# SPDX-License-Identifier: AGPL-3.0-or-later
"""A package repository for the tests: real packages, a real index, served over HTTP on this machine."""

import contextlib
import hashlib
import os
import re
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.support import make_deb, program


class Archive:
    """A flat repository, for a line `deb [trusted=yes] URL ./` in sources.list.

    Args:
        directory: where its files are; an existing repository there is extended.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(exist_ok=True)
        self.asked: list[str] = []  # the paths that clients have requested
        self._build = directory.with_name(f"{directory.name}-build")
        self.index()

    def add(self, name: str, version: str = "1", **parts: Any) -> None:
        """Add a package; takes the arguments of make_deb()."""
        self._build.mkdir(exist_ok=True)
        package = make_deb(self._build, name, version, **parts)
        package.rename(self.directory / package.name)
        self.index()

    def index(self) -> None:
        """Write the index of all packages (Packages)."""
        entries = []
        for package in sorted(self.directory.glob("*.deb")):
            control = program("dpkg-deb", "--field", package).strip()
            content = package.read_bytes()
            digest = hashlib.sha256(content).hexdigest()
            entries.append(f"{control}\nFilename: ./{package.name}\nSize: {len(content)}\nSHA256: {digest}\n")
        self._publish("Packages", "\n".join(entries))

    def release(self, **fields: str) -> None:
        """Write an unsigned Release file with some fields; `_` stands for `-` in their names: Suite=, Valid_Until=."""
        packages = (self.directory / "Packages").read_bytes()
        lines = [f"{name.replace('_', '-')}: {value}" for name, value in fields.items()]
        lines += ["SHA256:", f" {hashlib.sha256(packages).hexdigest()} {len(packages)} Packages"]
        self._publish("Release", "\n".join([*lines, ""]))

    def _publish(self, name: str, text: str) -> None:
        """Write an index with a newer mtime than before, in whole seconds: If-Modified-Since has no finer resolution."""
        path = self.directory / name
        before = path.stat().st_mtime if path.exists() else 0
        path.write_text(text)
        newer = max(path.stat().st_mtime, int(before) + 1)
        os.utime(path, (newer, newer))

    @contextlib.contextmanager
    def served(self) -> Iterator[str]:
        """Serve the repository inside the block; yields its URL."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, self))
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            server.server_close()
            thread.join()

    def fetched(self, pattern: str) -> list[str]:
        """The requested paths that match a pattern; then forget all requests."""
        asked, self.asked = self.asked, []
        return [path for path in asked if re.search(pattern, path)]


class _Handler(SimpleHTTPRequestHandler):
    def __init__(self, archive: Archive, *arguments: Any) -> None:
        self.archive = archive
        super().__init__(*arguments, directory=str(archive.directory))

    def log_message(self, *_: object) -> None:
        """Log nothing; requests are kept in `asked`."""

    def do_GET(self) -> None:
        self.archive.asked.append(self.path)
        super().do_GET()


def use_only(*urls: str) -> str:
    """A shell script that makes these repositories the only ones of a root."""
    lines = "\\n".join(f"deb [trusted=yes] {url} ./" for url in urls)
    return f"rm -f /etc/apt/sources.list.d/*; printf '{lines}\\n' > /etc/apt/sources.list"
