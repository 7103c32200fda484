"""`hf-bitnet push`: a folder of this library's to the Hub."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .common import quietly, say


@quietly
def run(arguments: argparse.Namespace) -> dict[str, Any]:
    if not Path(arguments.folder).is_dir():
        raise ValueError(f"there is no folder {arguments.folder!r}; hf-bitnet quantize, train and export make one")
    from ..publish.pushing import push_to_hub  # pyright: ignore[reportMissingImports]

    pushed = push_to_hub(
        arguments.folder,
        arguments.repo_id,
        # None leaves a repository that is there as it is
        private=True if arguments.private else None,
        dry_run=arguments.dry_run,
        commit_message=arguments.message,
    )
    files = [str(file) for file in pushed.files]
    if arguments.dry_run:
        say(arguments, f"would push {len(files)} files to {arguments.repo_id}:", *(f"  {file}" for file in files))
    else:
        say(arguments, f"pushed {len(files)} files: {pushed.url}")
    return {
        "folder": arguments.folder,
        "repo_id": arguments.repo_id,
        "dry_run": arguments.dry_run,
        "url": None if pushed.url is None else str(pushed.url),
        "files": files,
    }
