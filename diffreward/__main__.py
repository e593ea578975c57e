"""``python -m diffreward``."""

import sys

from diffreward.cli import main

sys.exit(main())
