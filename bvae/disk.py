"""How much room a disk has, in words."""

import os
import shutil
from pathlib import Path


def free(folder: Path) -> str:
    """What is free where a folder is: "1,000 bytes are free", or that only its inodes have run out."""
    text = f"{shutil.disk_usage(folder).free:,} bytes"
    if hasattr(os, "statvfs"):
        status = os.statvfs(folder)
        if status.f_files and not status.f_favail:  # f_files is 0 where the file system has no fixed number
            return f"{text} but no inodes are free: delete some files"
    return f"{text} are free"
