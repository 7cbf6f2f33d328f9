# SPDX-License-Identifier: AGPL-3.0-or-later
"""The hardware of this machine, as far as a new system needs other packages for it."""

import re
import shutil
from pathlib import Path
from typing import NamedTuple, Self

from ash import read_text, run


class Hardware(NamedTuple):
    """What a machine has.

    Args:
        drivers: those that devices are bound to, and the loaded modules; with _ for -.
        processor: the vendor id of the processor, such as "GenuineIntel"; empty if it has none.
        wireless: whether it has a wireless network interface.
    """

    drivers: frozenset[str] = frozenset()
    processor: str = ""
    wireless: bool = False

    @classmethod
    def here(cls, sys: Path = Path("/sys"), proc: Path = Path("/proc")) -> Self:
        """That of this machine, as the kernel shows it in sysfs and procfs."""
        bound = {link.readlink().name for link in (sys / "bus").glob("*/devices/*/driver")}
        modules = {line.split()[0] for line in read_text(proc / "modules").splitlines()}
        found = re.search(r"^vendor_id\s*: (\S+)", read_text(proc / "cpuinfo"), re.MULTILINE)
        interfaces = sys / "class/net"
        wireless = [*interfaces.glob("*/wireless"), *interfaces.glob("*/phy80211")]
        drivers = frozenset(name.replace("-", "_") for name in bound | modules)
        return cls(drivers, found[1] if found else "", bool(wireless))


def is_virtual() -> bool:
    """Whether this machine is a virtual one or a container, whose devices need no firmware."""
    program = "systemd-detect-virt"
    return shutil.which(program) is not None and run([program], check=False).stdout.strip() != "none"
