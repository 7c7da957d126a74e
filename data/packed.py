"""Files that may be packed, read as a stream: gzip and zstd are known by what they begin with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from data.command import FULL, BadInput
from data.runs import PACKED


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Inside, a file that cannot be read is BadInput; a full disk is not the file's fault."""
    try:
        yield
    except (pa.ArrowException, OSError) as e:
        number = getattr(e, "errno", None)
        if number in FULL:
            raise
        why = " ".join(str(e).split())[:160]
        if isinstance(e, OSError) and number is None:  # what pyarrow unpacks is damaged
            raise BadInput(f"{path}: damaged gzip or zstd data ({why}); fetch it again") from None
        raise BadInput(f"{path}: cannot be read ({why})") from None


def unpacked(file: pa.NativeFile) -> pa.NativeFile:
    """The content of an open file: the file itself where it is not packed."""
    head = file.read(4)
    file.seek(0)
    for name, (magic, _) in PACKED.items():
        if head.startswith(magic):
            return pa.CompressedInputStream(file, name)
    return file
