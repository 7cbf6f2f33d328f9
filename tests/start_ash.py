# SPDX-License-Identifier: AGPL-3.0-or-later
"""ash.py of this checkout as a program: `start_ash.py ARGUMENTS`, which Python need not compile at each start.

Run it as `tests.support.ASH` does: -X pycache_prefix keeps the compiled text out of the checkout.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ash import main

sys.exit(main())
