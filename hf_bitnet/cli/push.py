"""`hf-bitnet push`: a model in one form or several, with its card, to the Hub.

A token is taken from `hf auth login` or HF_TOKEN, never from the command line, which other users of a machine can read.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from .. import push_to_hub
from ..export import ParityError
from .common import quietly, say
from .options import DIFFERENT, Failed


@quietly
def run(arguments: argparse.Namespace) -> dict[str, Any]:
    if not Path(arguments.folder).is_dir():
        raise ValueError(f"there is no folder {arguments.folder!r}; hf-bitnet quantize, train and export make one")
    try:
        report = push_to_hub(
            arguments.folder,
            arguments.repo_id,
            forms=arguments.forms,
            base_model=arguments.base_model,
            card=not arguments.no_card,
            remote_code=arguments.remote_code,
            # None leaves a repository that is there as it is
            private=True if arguments.private else None,
            revision=arguments.revision,
            commit_message=arguments.message,
            dry_run=arguments.dry_run,
        )
    except ParityError as error:
        checks = [dataclasses.asdict(check) for check in error.checks]
        say(arguments, *(f"parity: {check}" for check in error.checks))
        raise Failed(str(error), DIFFERENT, {"folder": arguments.folder, "error": str(error), "checks": checks}) from error
    say(arguments, report)
    return {
        "folder": arguments.folder,
        "dry_run": arguments.dry_run,
        "url": report.url,
        "repos": [dataclasses.asdict(repo) for repo in report.repos],
    }
