"""The methods. Each is a small value; the rest of the house does not know them by name."""

from collections.abc import Callable

from stpm.build.methods.base import Method
from stpm.build.methods.etstpm import EtStpm
from stpm.build.methods.reverse import Reverse
from stpm.build.methods.rstpm import Rstpm
from stpm.build.methods.stpm import Stpm

# each takes backbone, taps and what is its own
METHODS: dict[str, Callable[..., Method]] = {"stpm": Stpm, "rstpm": Rstpm, "etstpm": EtStpm, "reverse": Reverse}
