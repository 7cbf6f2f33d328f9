# SPDX-License-Identifier: AGPL-3.0-or-later
"""LUKS2 on the partition of the root. One passphrase is asked for, by GRUB, which reads menu and kernel in there.

Later the initramfs, which is in there too, opens the partition with a key file that it contains.
"""

import re
import secrets
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ash import REFUSED, USAGE, AshError, run
from installer import host

TOOLS: host.Tools = {"cryptsetup": "cryptsetup-bin"}
FILE_SYSTEM = "crypto_LUKS"  # what lsblk calls it
# GRUB 2.12 has no Argon2. It makes about 7,000 iterations of PBKDF2 where OpenSSL makes 142,000 (measured in an
# emulated machine), so what takes cryptsetup 250 ms takes GRUB some seconds.
PBKDF = ("--pbkdf", "pbkdf2", "--hash", "sha512")
FOR_PASSPHRASE = (*PBKDF, "--iter-time", "250")
FOR_KEY = (*PBKDF, "--pbkdf-force-iterations", "1000")  # the least that cryptsetup accepts: the key is random
KEY_SIZE = 64  # bytes
LONGEST = 255  # characters of a passphrase that GRUB reads
# GRUB's own loops do not work in a core image.
ATTEMPTS = 10
WRONG = 2  # cryptsetup's exit status if no key slot is opened by a passphrase


def check_passphrase(text: str) -> None:
    """Raise AshError (USAGE) if GRUB could not read a passphrase."""
    if not re.fullmatch(rf"[ -~]{{1,{LONGEST}}}", text):
        hint = f"use 1 to {LONGEST} letters, digits and signs of the US keyboard, which GRUB assumes"
        raise AshError("GRUB could not read this passphrase", hint, USAGE)


@dataclass(frozen=True)
class Luks:
    """An encrypted partition.

    Args:
        partition: its node.
        passphrase: opens it.
        uuid: in its header.
    """

    partition: Path
    passphrase: str = field(repr=False)
    uuid: str = field(default_factory=lambda: str(uuid.uuid4()))

    @property
    def name(self) -> str:
        """What the device is called that shows what is in the partition."""
        return f"luks-{self.uuid}"

    @property
    def node(self) -> Path:
        """The node of that device."""
        return Path("/dev/mapper", self.name)

    def format_commands(self) -> list[list[str | Path]]:
        """The commands that write a new header, and open the partition; both read the passphrase."""
        new = ["--batch-mode", "--type", "luks2", *FOR_PASSPHRASE, "--uuid", self.uuid]
        return [["cryptsetup", "luksFormat", *new, "--key-file", "-", self.partition], self._open_command()]

    def _open_command(self) -> list[str | Path]:
        return ["cryptsetup", "open", "--type", "luks", "--key-file", "-", self.partition, self.name]

    def open(self) -> None:
        """Open the partition; AshError (REFUSED) if the passphrase is wrong."""
        if run(self._open_command(), input=self.passphrase, ok=(0, WRONG)).returncode:
            raise AshError(f"the passphrase does not open {self.partition}", "type it as GRUB gets it", REFUSED)

    def close(self) -> None:
        """Close the partition, or have Linux do so when what is in there is not mounted any more."""
        if self.node.exists():
            run(["cryptsetup", "close", "--deferred", self.name])

    def add_key(self, file: Path) -> None:
        """Make a key file that opens the partition too."""
        file.touch(mode=0o600, exist_ok=False)
        file.write_bytes(secrets.token_bytes(KEY_SIZE))
        file.chmod(0)
        add: list[str | Path] = ["cryptsetup", "luksAddKey", *FOR_KEY, "--key-file", "-", self.partition, file]
        run(add, input=self.passphrase)

    @property
    def for_grub(self) -> list[str]:
        """GRUB's commands to open the partition: if a passphrase is wrong, the next one asks again."""
        return [f"cryptomount -u {self.uuid.replace('-', '')}"] * ATTEMPTS


@contextmanager
def unlocked(partition: Path, passphrase: str | None) -> Iterator[Luks]:
    """Open an encrypted partition, for the block.

    Raises:
        AshError: there is no passphrase (USAGE), or it is wrong (REFUSED).
    """
    host.require(TOOLS)
    if passphrase is None:
        raise AshError(f"{partition} is encrypted", "--luks asks for its passphrase", USAGE)
    found = run(["cryptsetup", "luksUUID", partition]).stdout.strip()
    luks = Luks(partition, passphrase, found)
    luks.open()
    try:
        yield luks
    finally:
        luks.close()
