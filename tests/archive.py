# SPDX-License-Identifier: AGPL-3.0-or-later
"""A package archive of the tests' own: real packages, a real index, served over HTTP on this machine."""

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
    """A flat archive, as `deb [trusted=yes] URL ./` names it.

    Args:
        directory: where its files are; another archive that is there is gone on with.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(exist_ok=True)
        self.asked: list[str] = []  # the files that were fetched from it
        self._build = directory.with_name(f"{directory.name}-build")
        self.index()

    def add(self, name: str, version: str = "1", **parts: Any) -> None:
        """Put a package into it; what make_deb() takes."""
        self._build.mkdir(exist_ok=True)
        package = make_deb(self._build, name, version, **parts)
        package.rename(self.directory / package.name)
        self.index()

    def index(self) -> None:
        """Write down what there is, as apt reads it."""
        entries = []
        for package in sorted(self.directory.glob("*.deb")):
            control = program("dpkg-deb", "--field", package).strip()
            content = package.read_bytes()
            digest = hashlib.sha256(content).hexdigest()
            entries.append(f"{control}\nFilename: ./{package.name}\nSize: {len(content)}\nSHA256: {digest}\n")
        self._publish("Packages", "\n".join(entries))

    def release(self, **fields: str) -> None:
        """Write a Release file, which nobody signed; `_` in the name of a field is `-`: Suite=, Valid_Until=."""
        packages = (self.directory / "Packages").read_bytes()
        lines = [f"{name.replace('_', '-')}: {value}" for name, value in fields.items()]
        lines += ["SHA256:", f" {hashlib.sha256(packages).hexdigest()} {len(packages)} Packages"]
        self._publish("Release", "\n".join([*lines, ""]))

    def _publish(self, name: str, text: str) -> None:
        """Write an index, newer than the one before: HTTP asks whether it is by whole seconds."""
        path = self.directory / name
        before = path.stat().st_mtime if path.exists() else 0
        path.write_text(text)
        newer = max(path.stat().st_mtime, int(before) + 1)
        os.utime(path, (newer, newer))

    @contextlib.contextmanager
    def served(self) -> Iterator[str]:
        """Serve it, for as long as the block lasts; gives its URL."""
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
        """The files that were fetched and that match a pattern; forgets all."""
        asked, self.asked = self.asked, []
        return [path for path in asked if re.search(pattern, path)]


class _Handler(SimpleHTTPRequestHandler):
    def __init__(self, archive: Archive, *arguments: Any) -> None:
        self.archive = archive
        super().__init__(*arguments, directory=str(archive.directory))

    def log_message(self, *_: object) -> None:
        """Keep no log, but of what was fetched."""

    def do_GET(self) -> None:
        self.archive.asked.append(self.path)
        super().do_GET()


def use_only(*urls: str) -> str:
    """A script that has a root take its packages from these archives alone."""
    lines = "\\n".join(f"deb [trusted=yes] {url} ./" for url in urls)
    return f"rm -f /etc/apt/sources.list.d/*; printf '{lines}\\n' > /etc/apt/sources.list"
