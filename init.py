#!/usr/bin/env python3
# SPDX-License-Identifier: AGPL-3.0-or-later
"""Makes a disk image with a system that ash manages, boots it, and shows what ash does: `python3 init.py --help`.

It needs only Python; missing tools are installed from the host's packages, and named before.
"""

import signal
import sys

sys.dont_write_bytecode = True  # leave no files of root in a user's checkout
if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until there is something to undo, Ctrl-C just kills it
if sys.version_info < (3, 11):  # noqa: UP036 (old versions run this file too)
    sys.exit("init.py: needs Python 3.11 or newer")

from installer.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
