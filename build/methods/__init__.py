"""The methods of the literature. Each is a small value; the rest of the house does not know them by name."""

from collections.abc import Callable

from stpm.build.methods.base import Method
from stpm.build.methods.stpm import Stpm

METHODS: dict[str, Callable[..., Method]] = {"stpm": Stpm}  # each takes backbone and taps
