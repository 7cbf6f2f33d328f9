# SPDX-License-Identifier: AGPL-3.0-or-later
"""Init systems: which one a root has, ash's units, and services when the files of the running system change."""

from pathlib import Path

import pytest

import ash
from ash import INIT_SYSTEMS, Init, LiveResult, Services, Systemd, init_of

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
        "local-fs.target.wants/ash-booted.service",
        "local-fs.target.wants/ash-recover.service",
        "sysinit.target.wants/ash-carry.service",
        "sysinit.target.wants/ash-protect.service",
    }
    assert all((root / UNITS / name).is_file() for name in wanted)


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


def test_a_system_that_does_not_run_has_no_services(started: list[str]) -> None:
    services = Services(LiveResult(), running=False)
    services.start({"etc/systemd/system/x.target.wants/a.service": "added"})
    services.stop({f"{UNITS}/a.service": "removed"})
    services.put_back()
    assert not started
    assert type(services.init) is Init
