# SPDX-License-Identifier: AGPL-3.0-or-later
"""Run the ash.py of this checkout from its cached bytecode: `start_ash.py ARGUMENTS`.

Python compiles a program at each start, but not a module that it imports. `tests.support.ASH` is the whole command line:
it keeps the bytecode out of the checkout by -X pycache_prefix.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ash import main

sys.exit(main())
