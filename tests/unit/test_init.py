# SPDX-License-Identifier: AGPL-3.0-or-later
"""Init systems: which one a root has, ash's units, and services when the files of the running system change."""

import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

import ash
from ash import INIT_SYSTEMS, Init, LiveResult, OpenRc, Services, Systemd, asked_services, init_of

pytestmark = pytest.mark.budget(5)

UNITS = "usr/lib/systemd/system"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with systemd."""
    (tmp_path / UNITS).mkdir(parents=True)
    (tmp_path / "usr/bin").mkdir()
    (tmp_path / "usr/bin/systemctl").touch()
    return tmp_path


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A running machine with systemd whose targets are active; the services that are started on it."""
    started: list[str] = []
    monkeypatch.setattr(ash, "run", lambda *_, **__: None)
    monkeypatch.setattr(Systemd, "is_running", lambda _: True)
    monkeypatch.setattr(Systemd, "is_active", lambda _, unit: unit.endswith(".target") or unit in started)
    monkeypatch.setattr(Systemd, "start", lambda _, unit, check=True: started.append(unit))  # noqa: ARG005
    monkeypatch.setattr(Systemd, "stop", lambda _, unit, check=True: started.remove(unit))  # noqa: ARG005
    return started


def test_a_root_tells_its_init_system(root: Path) -> None:
    assert init_of(root).name == "systemd"
    (root / "usr/sbin").mkdir()
    (root / "usr/sbin/openrc").touch()
    assert init_of(root).name == "openrc"
    assert init_of(root / "nothing").name == ""


@pytest.mark.parametrize("executable", ["usr/bin/ash", "usr/local/bin/ash"])
def test_units_run_ash_and_those_that_every_boot_needs_are_wanted(root: Path, executable: str) -> None:
    Systemd().install_units(root, executable)
    Systemd().install_units(root, executable)  # a second time, over the first
    recover = (root / UNITS / "ash-recover.service").read_text()
    assert f"\nExecStart=/{executable} recover\n" in recover
    assert "{" not in "".join(path.read_text() for path in (root / UNITS).glob("*.*") if path.is_file())
    wanted = {path.relative_to(root / UNITS).as_posix() for path in (root / UNITS).glob("*.wants/*")}
    assert wanted == {
        "emergency.target.wants/ash-restart.service",
        "local-fs.target.wants/ash-booted.service",
        "local-fs.target.wants/ash-machine-id.service",
        "local-fs.target.wants/ash-recover.service",
        "multi-user.target.wants/ash-bless.service",
        "rescue.target.wants/ash-restart.service",
        "sysinit.target.wants/ash-carry.service",
        "sysinit.target.wants/ash-protect.service",
        "sysinit.target.wants/ash-trial.service",
    }
    assert all((root / UNITS / name).is_file() for name in wanted)


@pytest.mark.parametrize("before", [None, "", "uninitialized\n", f"{'a' * 32}\n"])
@pytest.mark.parametrize("chosen", [None, f"{'b' * 32}\n"])
def test_a_machine_id_that_is_there_stays(root: Path, before: str | None, chosen: str | None) -> None:
    Systemd().install_units(root, "usr/bin/ash")
    unit = (root / UNITS / "ash-machine-id.service").read_text()
    script = next(line for line in unit.splitlines() if line.startswith("ExecStart=sh -c "))
    etc, run = root / "machine-id", root / "run-machine-id"
    for path, text in ((etc, before), (run, chosen)):
        if text is not None:
            path.write_text(text)
    script = script.replace("/etc/machine-id", str(etc)).replace("/run/machine-id", str(run))
    script = script.replace("systemd-machine-id-setup", f"echo made > {etc}")
    subprocess.run(shlex.split(script.removeprefix("ExecStart=")), check=True)
    assert etc.read_text() == (before if before and before[0] == "a" else chosen or "made\n")


def test_a_root_without_systemd_gets_no_units(tmp_path: Path) -> None:
    for init in INIT_SYSTEMS:
        init.install_units(tmp_path, "usr/bin/ash")
    assert not list(tmp_path.iterdir())


def test_sockets_are_started_before_services(started: list[str]) -> None:
    units = ("a.service", "b.service", "b.socket", "c.timer")
    Services(LiveResult(), running=True).start({f"etc/systemd/system/x.target.wants/{u}": "added" for u in units})
    assert started == ["b.socket", "a.service", "b.service", "c.timer"]


def test_removed_services_are_stopped_and_started_again_when_the_change_is_undone(started: list[str]) -> None:
    started += ["a.service", "other.service"]
    live = LiveResult()
    services = Services(live, running=True)
    services.stop({f"{UNITS}/a.service": "removed", f"{UNITS}/b.service": "removed", "usr/bin/x": "removed"})
    assert (started, live.stopped) == (["other.service"], ["a.service"])
    services.put_back()
    assert started == ["other.service", "a.service"]


@pytest.fixture
def programs(started: list[str], monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The programs that are run on a machine with systemd, on which a.service and b.socket are active."""
    started += ["a.service", "b.socket"]
    programs: list[list[str]] = []
    done = subprocess.CompletedProcess[str]([], 0, "", "")

    def run(argv: Sequence[str | Path], **_: object) -> subprocess.CompletedProcess[str]:
        programs.append([*map(str, argv)])
        return done

    monkeypatch.setattr(ash, "run", run)
    return programs


def test_services_are_restarted_as_the_scripts_of_packages_ask(programs: list[list[str]]) -> None:
    live = LiveResult()
    asked = "stop a.service\nstart a.service\nreload b.socket\nrestart not-active.service\nstop b.socket\n"
    Services(live, running=True).start({"usr/bin/a": "changed"}, asked)
    assert live.restarted == ["a.service", "b.socket"]
    assert [words[-2:] for words in programs if words[0] == "timeout"] == [
        ["restart", "a.service"],
        ["reload", "b.socket"],
    ]
    assert asked_services("reload x.service\nrestart x\nreload x.service\n\n", ".service") == {"x.service": "restart"}


def test_a_socket_is_restarted_with_its_service_or_not_at_all(programs: list[list[str]], started: list[str]) -> None:
    started += ["b.service", "c.socket", "c.service"]
    live = LiveResult()
    Services(live, running=True).start({}, "restart b.service\nrestart b.socket\nrestart c.socket\n")
    assert [words[3:] for words in programs if words[0] == "timeout"] == [
        ["stop", "b.service", "b.socket"],
        ["start", "b.socket", "b.service"],
    ]
    assert (live.restarted, live.outdated) == (["b.service", "b.socket"], ["c.socket"])


def test_restarted_services_are_restarted_once_more_when_the_change_is_undone(programs: list[list[str]]) -> None:
    services = Services(LiveResult(), running=True)
    services.start({}, "restart a.service\n")
    programs.clear()
    services.put_back()
    assert ["systemctl", "restart", "a.service"] in programs


def test_new_settings_are_applied(programs: list[list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = "# a comment\nnet.ipv4.ip_forward = 1\n-vm/swappiness=10\nnet.ipv6.conf.*.forwarding = 1\n"
    monkeypatch.setattr(ash, "read_text", lambda _: text)
    monkeypatch.setattr(ash, "path_inside", lambda _, path: tmp_path / path)
    kinds = {
        "usr/lib/sysusers.d/a.conf": "added",
        "etc/tmpfiles.d/a.conf": "changed",
        "usr/lib/tmpfiles.d/gone.conf": "removed",
        "usr/lib/sysctl.d/50-a.conf": "changed",
        "usr/lib/udev/rules.d/a.rules": "changed",
        "usr/lib/udev/rules.d/README": "changed",
    }
    Systemd().apply_settings(kinds)
    keys = ["net.ipv4.ip_forward", "net.ipv6.conf", "vm/swappiness"]
    assert programs == [
        ["systemd-sysusers", "a.conf"],
        ["systemd-tmpfiles", "--create", "a.conf"],
        ["/usr/lib/systemd/systemd-sysctl", *(f"--prefix={key}" for key in keys)],
        ["udevadm", "control", "--reload"],
    ]
    programs.clear()
    Systemd().apply_settings({"usr/share/x": "added"})
    assert programs == []


def test_what_still_runs_as_before_is_named(programs: list[list[str]], tmp_path: Path) -> None:
    assert not [one for one in programs if "restart" in one]
    program = tmp_path / "daemon"
    shutil.copy("/bin/sleep", program)
    with subprocess.Popen([program, "60"]) as process:
        program.unlink()
        live = LiveResult()
        paths = {str(program).lstrip("/"): "changed", f"{UNITS}/a.service": "changed", f"{UNITS}/c.service": "changed"}
        Services(live, running=True).start(paths)
        process.kill()
    assert live.outdated == ["a.service", f"daemon ({process.pid})"]
    assert "runs as before until it is restarted: a.service" in live.text()


def test_a_system_that_does_not_run_has_no_services(started: list[str]) -> None:
    services = Services(LiveResult(), running=False)
    services.start({"etc/systemd/system/x.target.wants/a.service": "added"})
    services.stop({f"{UNITS}/a.service": "removed"})
    services.put_back()
    assert not started
    assert type(services.init) is Init


# OpenRC


@pytest.fixture
def openrc(tmp_path: Path) -> Path:
    """A root with OpenRC, after sysvinit, and ash's scripts."""
    for path in ("usr/sbin/openrc", "etc/inittab", "etc/init.d/skeleton"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    OpenRc().install_units(tmp_path, "usr/bin/ash")
    return tmp_path


def test_openrc_starts_ash_with_its_runlevels(openrc: Path) -> None:
    OpenRc().install_units(openrc, "usr/local/bin/ash")  # a second time, over the first
    levels = openrc / "etc/runlevels"
    assert {path.relative_to(levels).as_posix() for path in levels.glob("*/*")} == {
        "sysinit/ash-recover",
        "sysinit/ash-protect",
        "sysinit/ash-trial",
        "default/ash-carry",
        "default/ash-bless",
    }
    for link in levels.glob("*/*"):
        script = openrc / link.readlink().relative_to("/")
        assert script.stat().st_mode & 0o777 == 0o755
        assert "@" not in script.read_text()
        subprocess.run(["sh", "-n", script], check=True)
    assert "\t/usr/local/bin/ash carry\n" in (openrc / "etc/init.d/ash-carry").read_text()
    assert (openrc / "etc/inittab.d/ash.tab").read_text() == "ash:12345:once:/etc/init.d/ash-trial start\n"


def test_a_script_that_is_out_of_its_runlevel_stays_so(openrc: Path) -> None:
    (openrc / "etc/runlevels/default/ash-carry").unlink()
    OpenRc().install_units(openrc, "usr/bin/ash")
    assert [path.name for path in (openrc / "etc/runlevels/default").iterdir()] == ["ash-bless"]


def test_a_root_with_another_init_than_sysvinit_gets_no_line_for_it(tmp_path: Path) -> None:
    for path in ("usr/sbin/openrc", "etc/init.d/skeleton"):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).touch()
    OpenRc().install_units(tmp_path, "usr/bin/ash")
    assert not (tmp_path / "etc/inittab.d").exists()


# In the place of a program that ash's scripts call: says what was called, and fails if that is $FAIL.
FAKE = '#!/bin/sh\necho ${0##*/} $*\n[ "$FAIL" != "${0##*/} $*" ]\n'
FINDMNT = "#!/bin/sh\nprintf '%s\\n' / none /var\n"


def start(root: Path, cmdline: str = "", fail: str = "", level: int = 2) -> tuple[int, list[str]]:
    """Run start() of ash-bless with fakes below a root; returns its status and what it called."""
    text = (root / "etc/init.d/ash-bless").read_text().replace("/usr/bin/ash", "ash")
    for path in ("/etc/ash", "/etc/greenboot", "/usr/lib/greenboot", "/proc/cmdline", "/run/ash-good"):
        text = text.replace(path, f"{root}{path}")
    (root / "proc").mkdir()
    (root / "proc/cmdline").write_text(f"root=x {cmdline}\n")
    (root / "fakes").mkdir()
    scripts = {"findmnt": FINDMNT, "runlevel": f"#!/bin/sh\necho 2 {level}\n"}
    for name in ("ash", "reboot", "touch", "mountpoint", "eerror", *scripts):
        (root / "fakes" / name).write_text(scripts.get(name, FAKE))
        (root / "fakes" / name).chmod(0o755)
    environment = {"FAIL": fail, "PATH": f"{root}/fakes:{os.defpath}"}
    done = subprocess.run(["sh", "-c", f"{text}\nstart"], env=environment, capture_output=True, text=True, check=False)
    assert not done.stderr
    return done.returncode, [line.replace(str(root), "") for line in done.stdout.splitlines()]


MOUNTED = ["mountpoint -q /", "mountpoint -q /var"]


@pytest.mark.parametrize(
    ("cmdline", "fail", "status", "called"),
    [
        ("", "", 0, ["ash health", "touch /run/ash-good"]),
        ("ash.trial=10", "", 0, ["ash health", "ash bless", "touch /run/ash-good"]),
        ("ash.trial=10", "ash bless", 0, ["ash health", "ash bless", "touch /run/ash-good"]),
        ("ash.fellback=1", "", 0, ["ash health", "ash bless", "touch /run/ash-good"]),
        ("", "ash health", 1, ["ash health"]),
        ("ash.fellback=1", "ash health", 1, ["ash health"]),
        ("ash.trial=10", "ash health", 0, ["ash health", "reboot -f"]),
    ],
)
def test_openrc_blesses_what_is_healthy_and_restarts_what_is_on_trial(
    openrc: Path, cmdline: str, fail: str, status: int, called: list[str]
) -> None:
    (openrc / "etc/ash/health.d").mkdir(parents=True)
    (openrc / "etc/ash/health.d/check").touch()
    assert start(openrc, cmdline, fail) == (status, [*MOUNTED, *called])


@pytest.mark.parametrize("level", [0, 6])
def test_openrc_does_not_restart_a_machine_whose_shutdown_stops_a_check(openrc: Path, level: int) -> None:
    (openrc / "etc/ash/health.d").mkdir(parents=True)
    (openrc / "etc/ash/health.d/check").touch()
    assert start(openrc, "ash.trial=10", "ash health", level) == (1, [*MOUNTED, "ash health"])


def test_openrc_does_not_start_ash_health_for_nothing(openrc: Path) -> None:
    assert start(openrc) == (0, [*MOUNTED, "touch /run/ash-good"])


@pytest.mark.parametrize(("cmdline", "status", "called"), [("", 1, []), ("ash.trial=1", 0, ["reboot -f"])])
def test_openrc_does_not_bless_what_could_not_mount_its_file_systems(
    openrc: Path, cmdline: str, status: int, called: list[str]
) -> None:
    failed = [*MOUNTED, "eerror /var is not mounted"]
    assert start(openrc, cmdline, fail="mountpoint -q /var") == (status, [*failed, *called])


def test_openrc_restarts_only_what_is_on_trial_and_not_known_to_boot(openrc: Path) -> None:
    (openrc / "run").mkdir()
    (openrc / "run/ash-good").touch()
    (openrc / "etc/ash/health.d").mkdir(parents=True)
    (openrc / "etc/ash/health.d/check").touch()
    status, called = start(openrc, "ash.trial=10", "ash health")
    assert (status, called[-1]) == (1, "ash health")


@pytest.fixture
def running(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """A running machine with OpenRC, on which "old" and "older" are started; the commands that are run there."""
    commands: list[str] = []

    def run(argv: Sequence[str | Path], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(" ".join(map(str, argv)))
        return subprocess.CompletedProcess([], 1 if "broken" in argv else 0, "", "no such program")

    state = tmp_path / "state"
    (state / "started").mkdir(parents=True)
    (state / "softlevel").touch()
    for name in ("old", "older"):
        (state / "started" / name).symlink_to(f"/etc/init.d/{name}")
    monkeypatch.setattr(OpenRc, "marker", str(state))
    monkeypatch.setattr(Systemd, "is_running", lambda _: False)
    monkeypatch.setattr(ash, "run", run)
    return commands


def test_services_of_openrc_follow_their_scripts_and_runlevels(running: list[str]) -> None:
    live = LiveResult()
    services = Services(live, running=True)
    services.stop({"etc/init.d/old": "removed", "etc/init.d/other": "removed"})
    levels = {
        f"etc/runlevels/{path}": "added" for path in ("default/b", "sysinit/a", "default/old", "off/c", "nonetwork/d")
    }
    changed = dict.fromkeys(("etc/init.d/old", "etc/init.d/older", "etc/init.d/stopped"), "changed")
    services.start({**levels, **changed, "etc/init.d/e": "added"}, "start older\nstart stopped\n")
    assert running == [
        "rc-service old stop",
        "ldconfig",
        "timeout 300 rc-service older restart",
        "timeout 300 rc-service a start",
        "timeout 300 rc-service b start",
    ]
    assert (live.stopped, live.started, live.outdated) == (["old"], ["a", "b"], ["old"])
    assert live.restarted == ["older"]


def test_a_service_of_openrc_that_does_not_start_is_named_with_what_tells_more(running: list[str]) -> None:
    with pytest.raises(ash.AshError, match="start of broken failed: no such program") as failed:
        Services(LiveResult(), running=True).start({"etc/runlevels/default/broken": "added"})
    assert failed.value.hint == "rc-service broken status"
    OpenRc().stop("broken", check=False)
    assert running[-2:] == ["rc-service broken stop", "rc-service broken zap"]


def test_a_reboot_in_a_minute_does_not_keep_ash_waiting(running: list[str]) -> None:
    assert ash.schedule_reboot("words") == "shutdown -c"
    assert running == ["start-stop-daemon --start --background --exec /sbin/shutdown -- -r +1 words"]
