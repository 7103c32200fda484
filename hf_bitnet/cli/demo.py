"""`hf-bitnet demo`."""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import Any

from .common import keep_memory, quietly


@quietly
def run(arguments: argparse.Namespace) -> dict[str, Any]:
    from ..demo import run_demo

    keep_memory(arguments)
    with contextlib.redirect_stdout(sys.stderr) if arguments.json else contextlib.nullcontext():
        return dict(run_demo(Path(arguments.output), quick=arguments.quick))
