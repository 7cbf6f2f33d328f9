# SPDX-License-Identifier: AGPL-3.0-or-later
"""upself: a newer ash is fetched from a real server, verified with real keys, and installed atomically."""

import contextlib
import functools
import http.server
import json
import os
import re
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import ash
from installer.executable import build
from tests.support import DISTRIBUTION, DONE, FAILED, LOCKED, REFUSED, RUN_WITH_HOOKS, USAGE, Disk, Outcome, program
from tests.system.disk_system import System

pytestmark = [pytest.mark.system, pytest.mark.budget(180)]

OLD, NEW = "0.0.9", "99.1"
DOES_NOT_START = "#!/bin/sh\necho no Python here >&2\nexit 1\n"
SAYS_NOTHING = "#!/bin/sh\nexit 0\n"


@functools.cache
def executable(version: str) -> str:
    """The executable of ash with another version."""
    return build(DISTRIBUTION).replace(f'ASH_VERSION = "{ash.ASH_VERSION}"', f'ASH_VERSION = "{version}"')


class Signer:
    """A person with a key.

    Args:
        home: the directory of the keys.
        expires: when the key ends, as gpg has it.
        algorithm: its kind.
    """

    def __init__(self, home: Path, expires: str = "never") -> None:
        self.home = home
        home.mkdir(mode=0o700)
        self.gpg("--passphrase", "", "--quick-gen-key", "nobody@localhost", "ed25519", "sign", expires)

    def gpg(self, *words: str | Path) -> None:
        program("gpg", "--batch", "--quiet", "--homedir", self.home, *words)

    def close(self) -> None:
        """Stop the agent that gpg started."""
        program("gpgconf", "--homedir", self.home, "--kill", "gpg-agent")

    def keyring(self) -> bytes:
        """The public key in the format of gpgv."""
        self.gpg("--yes", "--output", self.home / "public", "--export")
        return (self.home / "public").read_bytes()

    def sign(self, content: bytes, *how: str) -> bytes:
        """A detached signature, or the output of gpg with other options."""
        (self.home / "content").write_bytes(content)
        output = self.home / "signed"
        self.gpg("--yes", "--output", output, *(how or ("--detach-sign",)), self.home / "content")
        return output.read_bytes()


class Server:
    """A web server on the loopback interface, with content or a handler function for each path."""

    def __init__(self) -> None:
        self.files: dict[str, bytes | Callable[[http.server.BaseHTTPRequestHandler], None]] = {}
        self.asked: list[str] = []
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.asked.append(self.path)
                found = server.files.get(self.path)
                if found is None:
                    self.send_error(404)
                elif callable(found):
                    with contextlib.suppress(OSError):  # the client has disconnected
                        found(self)
                else:
                    self.send_response(200)
                    self.send_header("Content-Length", str(len(found)))
                    self.end_headers()
                    self.wfile.write(found)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def encrypt(self, key: Path, certificate: Path) -> None:
        """Switch to TLS."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Signer]:
    """The signer that the system trusts."""
    with contextlib.closing(Signer(tmp_path_factory.mktemp("signer") / "gnupg")) as signer:
        yield signer


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Signer]:
    """A signer that the system does not trust."""
    with contextlib.closing(Signer(tmp_path_factory.mktemp("other") / "gnupg")) as signer:
        yield signer


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server, reached without any proxy of this machine."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server()
    yield server
    server.close()


class Place:
    """A system whose ash is configured to take newer versions from a server."""

    def __init__(self, system: System, server: Server, signer: Signer) -> None:
        self.system = system
        self.server = server
        self.signer = signer
        self.state = system.files.state
        self.url = f"{server.url}/ash"
        self.keyring = self.state / "keyring.gpg"
        self.keyring.write_bytes(signer.keyring())
        menu = json.loads((self.state / "menu").read_text())
        self.conf = system.root(menu["last_booted"] or menu["default"]) / "etc/ash.conf"
        self.set_url(self.url)
        self.put("ash", executable(ash.ASH_VERSION))
        for name in ("ash.new", "ash.old"):
            (self.state / name).unlink(missing_ok=True)

    def set_url(self, url: str) -> None:
        self.conf.write_text(f"# of the machine\nupself::{url}\n")

    def put(self, name: str, text: str) -> None:
        (self.state / name).write_text(text)
        (self.state / name).chmod(0o755)

    def publish(self, text: str, path: str = "/ash") -> None:
        """Put a file on the server, with a valid signature."""
        self.server.files[path] = text.encode()
        self.server.files[f"{path}.sig"] = self.signer.sign(text.encode())

    def text(self, name: str = "ash") -> str:
        return (self.state / name).read_text()

    def upself(self, *words: str, status: int = DONE) -> Outcome:
        return self.system.ash("--json", "upself", *words, status=status)

    @contextlib.contextmanager
    def refused(self, message: str, status: int = FAILED, *words: str) -> Iterator[None]:
        """Assert that upself fails with this message after the block, and changes nothing."""
        yield
        before = {**self.system.small_files(), "ash": self.text()}
        outcome = self.system.ash("upself", *words, status=status)
        assert re.search(message, outcome.error), outcome.error
        assert {**self.system.small_files(), "ash": self.text()} == before
        assert self.system.processes() == []


@pytest.fixture
def place(system: System, server: Server, signer: Signer) -> Place:
    system.ash("recover")
    lock = system.files.state / "work/upself/lock"
    lock.parent.mkdir(exist_ok=True)
    lock.touch()
    return Place(system, server, signer)


def started(path: Path) -> str:
    """The version that an executable prints."""
    return program("sh", path, "-q", "version").strip()


def test_a_newer_ash_is_put_in_place_and_the_old_one_kept(place: Place) -> None:
    was, new = place.text(), executable(NEW)
    place.publish(new)
    with (place.state / "ash").open() as opened:
        answer = place.upself().json
        assert opened.read() == was, "what reads the old one, such as the shell that starts it, has it whole"
    told = {"changed": True, "from": ash.ASH_VERSION, "to": NEW}
    assert answer == {"version": 1, "command": "upself", **told}
    assert told.keys() == (ash.find_command("upself").answer or {}).keys()
    assert (place.text(), place.text("ash.old")) == (new, was)
    assert (place.state / "ash").stat().st_mode & 0o7777 == 0o755
    assert os.readlink(place.state / "lib/ash.py") == "../ash"
    assert started(place.state / "ash") == NEW
    assert started(place.state / "ash.old") == ash.ASH_VERSION, "the old one runs, not the bytecode of the new one"
    assert not (place.state / "ash.new").exists()
    history = place.system.ash("--json", "log").json["history"][-1]
    assert (history["command"], history["result"], history["to"]) == ("upself", "done", NEW)
    assert place.system.ash("--json", "fsck").json["damage"] == []


def test_the_boot_menu_is_written_as_the_new_ash_does(place: Place) -> None:
    new = executable(NEW).replace("# Made by ash at every deploy.", "# Made by a newer ash.")
    place.publish(new)
    place.upself()
    assert place.system.files.grub_cfg.read_text().startswith("# Made by a newer ash.")
    assert "no problems" in program("sh", place.state / "ash", "--image", place.system.image, "fsck")
    place.put("ash", executable(ash.ASH_VERSION))
    place.system.ash("recover")


def test_the_old_executable_runs_again_once_it_is_renamed_back(place: Place) -> None:
    place.publish(executable("9.9.9"))
    place.upself()
    assert started(place.state / "ash") == "9.9.9"
    (place.state / "ash.old").rename(place.state / "ash")
    assert started(place.state / "ash") == ash.ASH_VERSION


def test_the_bytecode_is_of_the_new_executable(place: Place) -> None:
    """Bytecode of the old executable, with the same size and mtime, would count as valid."""
    compiled = place.state / f"lib/__pycache__/ash.{sys.implementation.cache_tag}.pyc"
    place.publish(executable("9.9.9"))
    place.upself()
    before = compiled.read_bytes()
    place.publish(executable("9.9.8"))
    place.upself("--force")
    assert b"9.9.9" in before
    assert b"9.9.8" in compiled.read_bytes()
    assert before.count(b"/.snapshots/ash/lib/ash.py") > 0


def test_the_same_version_is_up_to_date(place: Place) -> None:
    place.publish(place.text())
    answer = place.upself().json
    assert (answer["changed"], answer["to"]) == (False, ash.ASH_VERSION)
    assert not (place.state / "ash.old").exists()
    place.publish(place.text().replace("\n", "\n# another build\n", 1))
    assert place.system.ash("upself").stdout == f"ash is up to date ({ash.ASH_VERSION})\n"
    assert place.upself("--force").json["changed"] is True
    assert "# another build\n" in place.text()
    assert place.upself("--force").json["changed"] is False, "the old one would be lost"


def test_an_older_version_needs_force(place: Place) -> None:
    place.publish(executable(OLD))
    with place.refused(f"ash {OLD} at .* is older than the installed {ash.ASH_VERSION} .--force", REFUSED):
        pass
    assert place.upself("-f").json["to"] == OLD
    assert started(place.state / "ash") == OLD


def test_versions_are_compared_numerically() -> None:
    ordered = ["", "0.9", "0.9.1", "0.10", "1", "1.0.1", "1.2", "10.0"]
    assert sorted(["10.0", *ordered[:-1]], key=ash.version_order) == ordered
    assert ash.version_order("next") == ash.version_order("1..2") == ash.version_order("1" * 5000) == []


def test_a_damaged_executable_is_replaced(place: Place) -> None:
    place.put("ash", "\0" * 1000)
    place.publish(executable(OLD))
    answer = place.upself().json
    assert (answer["from"], answer["to"]) == ("", OLD)
    (place.state / "ash").unlink()
    assert place.upself().json["changed"] is True
    assert started(place.state / "ash") == OLD


def test_download_only_does_not_install(place: Place) -> None:
    was, new = place.text(), executable(NEW)
    place.publish(new)
    for option in ("--download-only", "-d", "-t"):
        said = place.system.ash("upself", option).stdout
        assert said == f"ash {NEW} is in /.snapshots/ash/ash.new\n"
        assert (place.text(), place.text("ash.new")) == (was, new)
        assert not (place.state / "ash.old").exists()
        (place.state / "ash.new").unlink()


def test_a_dry_run_says_what_would_be_fetched(place: Place) -> None:
    place.publish(executable(NEW))
    with place.system.nothing_changes():
        answer = place.system.ash("--json", "--dry-run", "upself").json
    assert answer["changed"] is False
    assert f"fetch {place.url} and {place.url}.sig" in answer["would"]
    assert place.server.asked == []


@pytest.mark.parametrize("how", ["--detach-sign", "armoured"])
def test_a_signature_may_be_armoured(place: Place, how: str) -> None:
    place.publish(executable(NEW))
    options = ["--armor", "--detach-sign"] if how == "armoured" else [how]
    place.server.files["/ash.sig"] = place.signer.sign(executable(NEW).encode(), *options)
    assert place.upself().json["to"] == NEW


def test_a_file_url_works(place: Place, tmp_path: Path) -> None:
    (tmp_path / "ash").write_text(executable(NEW))
    (tmp_path / "ash.sig").write_bytes(place.signer.sign(executable(NEW).encode()))
    place.set_url(f"file://{tmp_path}/ash")
    assert place.upself().json["to"] == NEW


def test_the_certificate_of_the_server_is_checked(
    place: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    key, certificate = tmp_path / "key", tmp_path / "certificate"
    of_itself = [
        "-x509",
        "-nodes",
        "-newkey",
        "rsa:2048",
        "-subj",
        "/CN=127.0.0.1",
        "-addext",
        "subjectAltName=IP:127.0.0.1",
    ]
    program("openssl", "req", *of_itself, "-keyout", key, "-out", certificate)
    place.publish(executable(NEW))
    place.set_url(place.url.replace("http:", "https:"))
    place.server.encrypt(key, certificate)
    with place.refused("cannot fetch .*/ash: .*certificate verify failed"):
        pass
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    assert place.upself().json["to"] == NEW


def test_redirections_are_followed(place: Place) -> None:
    def elsewhere(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(302)
        handler.send_header("Location", handler.path.replace("/latest/", "/v2/"))
        handler.end_headers()

    place.publish(executable(NEW), "/v2/ash")
    place.server.files |= {"/latest/ash": elsewhere, "/latest/ash.sig": elsewhere}
    place.set_url(f"{place.server.url}/latest/ash")
    assert place.upself().json["to"] == NEW


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/ash", "/ash"])
def test_bad_redirections_are_refused(place: Place, target: str) -> None:
    def elsewhere(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(302)
        handler.send_header("Location", target)
        handler.end_headers()

    with place.refused("cannot fetch .*/ash: "):
        place.server.files["/ash"] = elsewhere


# Signatures


def test_a_tampered_executable_is_refused(place: Place) -> None:
    with place.refused("/ash is not signed by a key that this system trusts: BAD signature"):
        place.publish(executable(NEW))
        place.server.files["/ash"] = executable(NEW).replace("0o755", "0o777").encode()


def test_a_foreign_signature_is_refused(place: Place, other: Signer) -> None:
    with place.refused("/ash is not signed by a key that this system trusts: .*No public key"):
        place.publish(executable(NEW))
        place.server.files["/ash.sig"] = other.sign(executable(NEW).encode())


def test_a_missing_signature_is_refused(place: Place) -> None:
    with place.refused(r"cannot fetch .*/ash.sig: HTTP Error 404"):
        place.publish(executable(NEW))
        del place.server.files["/ash.sig"]


@pytest.mark.parametrize("how", ["nothing", "noise", "whole message", "clear text", "keys"])
def test_an_invalid_signature_file_is_refused(place: Place, how: str) -> None:
    new = executable(NEW).encode()
    with place.refused("/ash is not signed by a key that this system trusts: "):
        place.publish(executable(NEW))
        place.server.files["/ash.sig"] = {
            "nothing": lambda: b"",
            "noise": lambda: os.urandom(500),
            "whole message": lambda: place.signer.sign(b"x", "--sign"),
            "clear text": lambda: place.signer.sign(b"x\n", "--clear-sign"),
            "keys": place.signer.keyring,
        }[how]() or new[:0]


def test_a_weak_signature_is_refused(place: Place) -> None:
    with place.refused("/ash is not signed by a key that this system trusts: "):
        place.publish(executable(NEW))
        weak = ("--allow-weak-digest-algos", "--digest-algo", "SHA1", "--detach-sign")
        place.server.files["/ash.sig"] = place.signer.sign(executable(NEW).encode(), *weak)


def test_an_expired_key_is_refused(place: Place, tmp_path: Path) -> None:
    home = tmp_path / "gnupg"
    home.mkdir(mode=0o700)
    long_ago = ["gpg", "--batch", "--quiet", "--homedir", str(home), "--faked-system-time", "20200101T000000"]
    program(*long_ago, "--passphrase", "", "--quick-gen-key", "nobody@localhost", "ed25519", "sign", "2d")
    (tmp_path / "content").write_text(executable(NEW))
    program(*long_ago, "--output", tmp_path / "sig", "--detach-sign", tmp_path / "content")
    program(*long_ago, "--output", tmp_path / "public", "--export")
    program("gpgconf", "--homedir", home, "--kill", "gpg-agent")
    with place.refused("/ash is not signed by a key that this system trusts: "):
        place.publish(executable(NEW))
        place.keyring.write_bytes((tmp_path / "public").read_bytes())
        place.server.files["/ash.sig"] = (tmp_path / "sig").read_bytes()


def test_without_a_keyring_nothing_is_fetched(place: Place) -> None:
    with place.refused(r"no keyring .*/\.snapshots/ash/keyring\.gpg \(gpg --export", REFUSED):
        place.publish(executable(NEW))
        place.keyring.unlink()
    assert place.server.asked == []


@pytest.mark.parametrize("content", [b"", b"no keys\n"])
def test_a_keyring_without_keys_trusts_nobody(place: Place, content: bytes) -> None:
    with place.refused("/ash is not signed by a key that this system trusts: "):
        place.publish(executable(NEW))
        place.keyring.write_bytes(content)


# Downloads that fail


def test_a_truncated_download_is_refused(place: Place) -> None:
    def half(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(executable(NEW))))
        handler.end_headers()
        handler.wfile.write(executable(NEW).encode()[:100_000])

    with place.refused("cannot fetch .*/ash: the connection was cut off after 100000 of "):
        place.publish(executable(NEW))
        place.server.files["/ash"] = half


def test_a_truncated_download_without_a_length_fails_verification(place: Place) -> None:
    def half(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(executable(NEW).encode()[:100_000])

    with place.refused("/ash is not signed by a key that this system trusts: BAD signature"):
        place.publish(executable(NEW))
        place.server.files["/ash"] = half


@pytest.mark.parametrize("path", ["/ash", "/ash.sig"])
def test_an_endless_download_is_refused(place: Place, path: str) -> None:
    def endless(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        while True:
            handler.wfile.write(b"#" * (1 << 16))

    with place.refused(f"{path} is too large for ash: more than "):
        place.publish(executable(NEW))
        place.server.files[path] = endless


def test_a_silent_server_times_out(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    done = threading.Event()

    def silent(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(b"#")
        handler.wfile.flush()
        done.wait(60)

    place.server.files["/ash"] = silent
    monkeypatch.setattr(ash, "ANSWER_SECONDS", 0.2)
    with pytest.raises(ash.AshError, match=r"cannot fetch .*/ash: timed out"):
        ash.download(place.url, 1000)
    done.set()


def test_a_slow_server_times_out(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def drip(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        for _ in range(100):
            handler.wfile.write(b"#")
            time.sleep(0.05)

    place.server.files["/ash"] = drip
    monkeypatch.setattr(ash, "FETCH_SECONDS", 0.3)
    with pytest.raises(ash.AshError, match=r"cannot fetch .*/ash: the download takes too long"):
        ash.download(place.url, 1000)


def test_an_invalid_http_answer_is_refused(place: Place) -> None:
    with place.refused("cannot fetch .*/ash: "):
        place.server.files["/ash"] = lambda handler: handler.connection.sendall(b"\x1b[2Jno HTTP at all\r\n\r\n")


def test_an_unreachable_server_is_an_error(place: Place) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with place.refused("cannot fetch .*: .*Connection refused"):
            place.set_url(f"http://127.0.0.1:{unused.getsockname()[1]}/ash")


@pytest.mark.parametrize(
    "url", ["http://user:word@127.0.0.1/ash", "http://127.0.0.1:x/", "http:///ash", "file:///nowhere"]
)
def test_a_missing_file_on_the_server_is_an_error(place: Place, url: str) -> None:
    with place.refused("cannot fetch .*: "):
        place.set_url(url)


@pytest.mark.parametrize("url", ["ftp://localhost/ash", "/usr/bin/ash", "data:,x", "--help"])
def test_only_https_http_and_file_urls_are_accepted(place: Place, url: str) -> None:
    with place.refused(f"cannot fetch ash from {url}", USAGE):
        place.set_url(url)


@pytest.mark.parametrize("text", [None, "", "upself::\n", "# upself::http://127.0.0.1/ash\n"])
def test_without_a_url_the_hint_says_how_to_set_one(place: Place, text: str | None) -> None:
    with place.refused(r"/etc/ash.conf has no URL .*upself::https://.*ash edit-conf", USAGE):
        place.conf.unlink()
        if text is not None:
            place.conf.write_text(text)


def test_an_invalid_configuration_is_reported_with_its_line(place: Place) -> None:
    with place.refused("line 1 of ash.conf is wrong", USAGE):
        place.conf.write_text("upself=http://127.0.0.1/ash\n")


# Signed executables that do not work


@pytest.mark.parametrize("text", [DOES_NOT_START, SAYS_NOTHING, "", "#!/bin/sh\necho '{\"ash\": 1}'\n"])
def test_an_executable_that_does_not_start_is_refused(place: Place, text: str) -> None:
    with place.refused("the new ash does not start: "):
        place.publish(text)


@pytest.mark.parametrize("where", [-20_000, -40, "\n\n\ndef database("])
def test_an_executable_without_its_last_line_is_refused(place: Place, where: int | str) -> None:
    text = executable(NEW)
    with place.refused("the new ash does not start: "):
        place.publish(text[: text.index(where) if isinstance(where, str) else where])


def test_the_new_executable_is_tested_without_the_old_ones_bytecode(place: Place) -> None:
    """The old executable's bytecode must not run instead."""
    with place.refused("the new ash does not start: .*broken"):
        place.publish(executable(NEW).replace("import contextlib\n", "import contextlib, broken\n", 1))


def test_an_executable_for_another_distribution_is_refused(place: Place) -> None:
    with place.refused(f"the new ash does not start: .*does not know the distribution {DISTRIBUTION}"):
        place.publish(executable(NEW).replace(f'id = "{DISTRIBUTION}"', 'id = "another"'))


def test_the_new_executable_is_tested_in_a_clean_environment(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.publish(executable(NEW).replace("\nexec ", '\n[ -z "$HOSTILE" ] || exit 1\nexec ', 1))
    monkeypatch.setenv("HOSTILE", "yes")
    assert place.upself().json["to"] == NEW


# Concurrency and kills


def test_only_one_upself_runs_at_a_time(place: Place) -> None:
    place.publish(executable(NEW))
    release = threading.Event()

    def slowly(handler: http.server.BaseHTTPRequestHandler) -> None:
        release.wait(60)
        handler.send_error(503)

    place.server.files["/ash"] = slowly
    first = place.system.start("upself")
    with contextlib.ExitStack() as stack:
        stack.callback(first.wait)
        stack.callback(release.set)
        while not place.server.asked:
            assert first.poll() is None
        assert "is locked by pid" in place.upself(status=LOCKED).stdout
    assert first.returncode == FAILED


def test_a_kill_at_any_step_leaves_a_complete_executable(place: Place) -> None:
    new = executable(NEW)
    place.publish(new)
    seen = []
    for _ in place.system.each_step_of("upself", "--force"):
        assert place.text() in (executable(ash.ASH_VERSION), new)
        seen.append(place.text() == new)
        assert started(place.state / "ash") == (NEW if seen[-1] else ash.ASH_VERSION)
        place.put("ash", executable(ash.ASH_VERSION))
    assert set(seen) == {False, True}
    assert place.text() == new
    assert place.upself().json["changed"] is False
    place.system.is_sound()


def test_a_power_cut_at_any_step_leaves_a_complete_executable(
    image: Path, reflinks: Path, server: Server, signer: Signer
) -> None:
    disk = Disk(reflinks / "disk.img")
    program("cp", "--sparse=always", image, disk.image)
    old, new = executable(ash.ASH_VERSION), executable(NEW)
    server.files |= {"/ash": new.encode(), "/ash.sig": signer.sign(new.encode())}
    with disk.files() as files:
        (files.state / "keyring.gpg").write_bytes(signer.keyring())
        (files.state / "ash").write_text(old)
        (files.root(files.default_slot()) / "etc/ash.conf").write_text(f"upself::{server.url}/ash\n")
    copies = reflinks / "copies"
    copies.mkdir()
    program(*RUN_WITH_HOOKS, json.dumps({"copies": str(copies)}), "--image", disk.image, "upself")
    program("cp", "--reflink=always", disk.image, copies / "after.img")
    seen = set()
    for copy in copies.iterdir():
        with Disk(copy).files() as files:
            there = (files.state / "ash").read_text()
            kept = files.state / "ash.old"
            assert there in (old, new), copy.name
            assert not kept.exists() or kept.read_text() == old, copy.name
            assert there == old or kept.exists(), copy.name
            assert there == new or copy.name != "after.img"
            seen.add(there)
    assert seen == {old, new}
