"""What is kept from one command to the next, and the stamps by which it is known again."""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from data.command import BadInput

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cross-encoder-study"


def cached(kind: str, made_of: str, make: Callable[[Path], None]) -> Path:
    """The folder of the cache for `made_of`, the text of all that decides what is in it.

    make: fills an empty folder, called where there is none yet. The folder takes its name when it
    is whole; where another process was faster, that one's stays.
    """
    key = hashlib.sha256(made_of.encode()).hexdigest()[:16]
    folder = CACHE / f"{kind}-{key}"
    if not folder.is_dir():
        temporary = Path(f"{folder}.{os.getpid()}")
        shutil.rmtree(temporary, ignore_errors=True)  # of a process of this number that was killed
        temporary.mkdir(parents=True)
        try:
            make(temporary)
            with contextlib.suppress(OSError):
                temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


@contextlib.contextmanager
def from_cache(path: Path) -> Iterator[None]:
    """Inside, a file or folder of the cache is read; BadInput where it is damaged."""
    try:
        yield
    except Exception as e:  # whatever numpy and bm25s make of it
        raise BadInput(f"{path}: damaged ({str(e)[:100]}); remove it: it is made anew") from e


def sha256_of(path: str | Path) -> str:
    """Of a file's content, which is not taken into memory."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def model_stamp(name: str) -> str:
    """A model folder's files by size and time: a retrained model, or another tokenizer, is another
    to a resumed run. What rerank.py notes beside runs that lie in the folder is none of the
    model's."""
    kinds = (".safetensors", ".bin", ".pt", ".json", ".txt", ".model", ".jinja")
    ours = ("args.json", "checkpoint.pt")  # of train.py: no part of the model
    files = sorted(f for depth in ("*", "*/*") for f in Path(name).glob(depth)
                   if f.suffix in kinds and f.name not in ours and ".run" not in f.suffixes
                   and f.is_file())
    stamps = [f"{f.relative_to(name)}:{f.stat().st_size}:{f.stat().st_mtime_ns}" for f in files]
    return " ".join([name, *stamps])
