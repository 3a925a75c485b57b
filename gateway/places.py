"""Whether files can be kept where an operator wants them, asked before anything is made there. Changes nothing."""

from __future__ import annotations

import os
from pathlib import Path


def folder_fault(path: Path) -> str | None:
    """Why this folder cannot be made, or files not be made in it; None: both can."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass  # it may be made; by what is there already
    except OSError as error:
        return f"{path} cannot be used: {error.strerror}"
    there = next(place for place in (path, *path.parents) if os.path.lexists(place))
    if not there.is_dir():
        return f"{there} is not a folder"
    if not os.access(there, os.W_OK | os.X_OK, effective_ids=True):
        return f"{there} cannot be written to"
    return None


def file_fault(path: Path) -> str | None:
    """Why this file cannot be made with others beside it, or not be written to; None: it can."""
    try:
        if path.is_dir():
            return f"{path} is a folder, and should be a file"
    except OSError as error:
        return f"{path} cannot be used: {error.strerror}"
    if (fault := folder_fault(path.parent)) is not None:
        return fault
    if path.exists() and not os.access(path, os.R_OK | os.W_OK, effective_ids=True):
        return f"{path} cannot be written to"
    return None
