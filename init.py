#!/usr/bin/env python3
# SPDX-License-Identifier: AGPL-3.0-or-later
"""Makes a disk image with a system that ash manages, boots it, and shows what ash does: `python3 init.py --help`.

It needs Python and nothing else; what it uses of the host's packages it installs, after saying what.
"""

import signal
import sys

sys.dont_write_bytecode = True  # root shall leave nothing in somebody's checkout
if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until there is something to undo, Ctrl-C ends it without a word
if sys.version_info < (3, 11):  # noqa: UP036 (this file must run on old ones too, to say so)
    sys.exit("init.py: Python 3.11 or newer is needed")

from installer.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
