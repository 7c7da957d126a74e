"""Kernels: the packed cross-encoder, its attention, and the ranking losses.

transformers imports Hugging Face's package of the same name where that is installed: both are had
under the one name.
"""

from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pkgutil import extend_path

__path__ = extend_path(__path__, __name__)


def __getattr__(name):
    """The installed package's, which is run once a name is asked for that is not here; its modules
    are on __path__."""
    from importlib.metadata import distributions

    if not name.startswith("__") and not find_spec(f"{__name__}.{name}"):
        for package in distributions(name=__name__):
            module = module_from_spec(spec_from_file_location(__name__,
                                                              package.locate_file(
                "kernels/__init__.py")))
            module.__spec__.loader.exec_module(module)
            globals().update(vars(module) | globals())
            return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
