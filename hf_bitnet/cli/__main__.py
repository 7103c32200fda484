"""`python -m hf_bitnet.cli`, where the command is not installed."""

import sys

from . import main

sys.exit(main())
