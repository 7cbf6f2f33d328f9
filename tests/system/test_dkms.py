# SPDX-License-Identifier: AGPL-3.0-or-later
"""dkms modules are built for the kernels of the snapshot, not for the running one; a failed build changes nothing."""

import platform
from pathlib import Path

import pytest

from tests.support import FAILED, make_deb
from tests.system.disk_system import System

pytestmark = [pytest.mark.system, pytest.mark.budget(90)]

GOOD = '#include <linux/module.h>\nMODULE_LICENSE("GPL");\nMODULE_DESCRIPTION("hello, world");\n'
BAD = '#include <linux/module.h>\n#error "this was not written for your kernel"\n'
NO_RECOMMENDS = "echo 'APT::Install-Recommends \"false\";' > /etc/apt/apt.conf.d/99test"


@pytest.fixture(scope="module")
def without_headers(system: System, tmp_path_factory: pytest.TempPathFactory) -> int:
    """A snapshot with dkms and a module, but without headers for its kernel."""
    number = system.clone()
    system.shell(number, NO_RECOMMENDS)
    system.ash("install", number, "dkms", module(tmp_path_factory.mktemp("first"), "ashfirst"))
    return number


@pytest.fixture(scope="module")
def with_headers(system: System, without_headers: int) -> int:
    number = system.branch(without_headers)
    system.ash("install", number, "linux-headers-amd64")
    return number


@pytest.fixture
def snapshot(system: System, with_headers: int) -> int:
    """A fresh snapshot with dkms and headers."""
    return system.branch(with_headers)


@pytest.fixture
def beside_the_running_kernel(system: System, snapshot: int) -> int:
    """A snapshot where dkms' own scripts look no further than at a kernel of the name of the one that runs here.

    So they do on a real machine, with dkms as Debian 12 has it, where the snapshot's kernel is an older one.
    """
    directory = f"/lib/modules/{platform.release()}"
    system.shell(
        snapshot,
        f"rm -f /etc/dkms/framework.conf.d/autoinstall*; mkdir {directory}; ln -s /usr/src/gone {directory}/build",
    )
    return snapshot


def module(directory: Path, name: str, source: str = GOOD, conf: str = "") -> Path:
    """Build a package with a module's source, as Debian does: its scripts call dkms."""
    place = f"usr/src/{name}-1"
    config = f'PACKAGE_NAME="{name}"\nPACKAGE_VERSION="1"\nBUILT_MODULE_NAME[0]="{name}"\n'
    config += f'DEST_MODULE_LOCATION[0]="/updates"\nAUTOINSTALL="yes"\n{conf}'
    return make_deb(
        directory,
        f"{name}-dkms",
        depends="dkms",
        files={
            f"{place}/dkms.conf": config,
            f"{place}/Makefile": f"obj-m += {name}.o\n",
            f"{place}/{name}.c": source,
        },
        postinst=f'if [ "$1" = configure ]; then /usr/lib/dkms/common.postinst {name} 1 /usr/share/{name} "" "$2"; fi',
        prerm=f"dkms remove -m {name} -v 1 --all",
    )


def kernel_of(system: System, snapshot: int) -> str:
    """The only kernel of a snapshot."""
    (image,) = (system.root(snapshot) / "boot").glob("vmlinuz-*")
    return image.name.removeprefix("vmlinuz-")


def built(system: System, snapshot: int, name: str) -> list[str]:
    """The kernels of a snapshot for which a module is installed."""
    modules = system.root(snapshot) / "usr/lib/modules"
    return sorted(path.relative_to(modules).parts[0] for path in modules.glob(f"*/updates/**/{name}.ko*"))


def test_a_module_is_built_for_the_kernel_of_its_snapshot(
    system: System, with_headers: int, snapshot: int, tmp_path: Path
) -> None:
    kernel = kernel_of(system, snapshot)
    system.ash("install", snapshot, module(tmp_path, "ashgood"))
    assert built(system, snapshot, "ashgood") == [kernel]
    said = system.shell(
        snapshot, f"modinfo -k {kernel} -F description ashgood; modinfo -k {kernel} -F vermagic ashgood"
    )
    assert said.stdout.startswith(f"hello, world\n{kernel} ")
    assert built(system, with_headers, "ashgood") == []
    system.ash("remove", snapshot, "ashgood-dkms")
    assert built(system, snapshot, "ashgood") == []


def test_without_headers_modules_are_built_when_they_are_installed(
    system: System, without_headers: int, with_headers: int
) -> None:
    assert built(system, without_headers, "ashfirst") == []
    assert built(system, with_headers, "ashfirst") == [kernel_of(system, with_headers)]


def test_the_running_kernel_does_not_matter(system: System, beside_the_running_kernel: int, tmp_path: Path) -> None:
    system.ash("install", beside_the_running_kernel, module(tmp_path, "ashgood"))
    assert built(system, beside_the_running_kernel, "ashgood") == [kernel_of(system, beside_the_running_kernel)]


def test_a_module_that_excludes_the_kernel_is_skipped(system: System, snapshot: int, tmp_path: Path) -> None:
    other = module(tmp_path, "ashother", conf='BUILD_EXCLUSIVE_KERNEL="^2[.]4"\n')
    system.ash("install", snapshot, other)
    assert built(system, snapshot, "ashother") == []


def test_a_failed_module_build_changes_nothing(system: System, snapshot: int, tmp_path: Path) -> None:
    with system.nothing_changes():
        outcome = system.ash("install", snapshot, module(tmp_path, "ashbad", BAD), status=FAILED)
    assert "this was not written for your kernel" in outcome.stderr  # dkms' log goes with the transaction


def test_a_failed_module_build_by_ash_changes_nothing(
    system: System, beside_the_running_kernel: int, tmp_path: Path
) -> None:
    kernel = kernel_of(system, beside_the_running_kernel)
    with system.nothing_changes():
        outcome = system.ash("install", beside_the_running_kernel, module(tmp_path, "ashbad", BAD), status=FAILED)
    assert kernel in outcome.stderr.splitlines()[-1]
    assert "this was not written for your kernel" in outcome.stderr
