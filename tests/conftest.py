"""Shared by all tests: the repository root on sys.path, Triton's interpreter where there is no GPU, the real data."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():  # read by triton when a kernel is decorated: it must be set before the first import
    os.environ.setdefault("TRITON_INTERPRET", "1")
    import triton
    from triton.runtime import interpreter

    if triton.__version__.startswith("3.6"):  # its interpreter takes int() of one-element arrays: not with numpy 2.4
        patch_tensor = interpreter._patch_lang_tensor

        def with_index(tensor, scope):
            patch_tensor(tensor, scope)
            scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

        interpreter._patch_lang_tensor = with_index


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real collections, $SHARED_DATA or ../shared/data; tests that need it skip where it is absent."""
    folder = Path(os.environ.get("SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("real test collections not found: set SHARED_DATA")
    return folder
