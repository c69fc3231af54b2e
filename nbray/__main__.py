"""``python -m nbray``: the command ``nbray`` where its script is not on PATH."""

import sys

from nbray.cli import main

sys.exit(main())
