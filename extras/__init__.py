"""Features beyond the method, one file each: see README.md."""

import os


def check_writable(name: str, path: str) -> None:
    """Raises ValueError with `name` if a file cannot be written. An existing file keeps its
    content."""
    target = os.path.realpath(path)  # the file itself, not a link to it
    exists = os.path.exists(target)
    try:
        open(target, "ab").close()
    except OSError as error:
        raise ValueError(f"{name} {path}: {error.strerror}") from None
    if not exists:
        os.remove(target)
