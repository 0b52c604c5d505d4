"""`python -m hpctrain`."""

from __future__ import annotations

import sys

from hpctrain.cli import main

sys.exit(main())
