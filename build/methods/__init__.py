"""The methods of the literature. Each is a small object; the rest of the house does not know them by name."""

from stpm.build.methods.base import Method
from stpm.build.methods.stpm import Stpm

METHODS: dict[str, Method] = {method.name: method for method in (Stpm(),)}
