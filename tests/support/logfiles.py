"""What people and programs do to log files."""

from pathlib import Path


def append(path: Path, content: bytes) -> None:
    """As a writer does it."""
    with path.open("ab") as out:
        out.write(content)


def overwrite(path: Path, at: int, content: bytes) -> None:
    """In place, from an offset on, which may lie behind the end."""
    with path.open("r+b") as out:
        out.seek(at)
        out.write(content)


def replaced(log: Path, content: bytes) -> None:
    """Another file takes the name, as rsync, `sed -i` and editors do it."""
    (log.parent / ".new").write_bytes(content)
    (log.parent / ".new").rename(log)
