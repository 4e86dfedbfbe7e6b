"""Numbers of a station's file that must lie in a range."""

from typing import Annotated

import msgspec

# in whatever unit, still exact as nanoseconds in 64 bits
LARGEST = 1e9

Positive = Annotated[float, msgspec.Meta(gt=0, le=LARGEST)]
NotNegative = Annotated[float, msgspec.Meta(ge=0, le=LARGEST)]
Unlimited = Annotated[float, msgspec.Meta(gt=0)]  # inf: without a limit
Count = Annotated[int, msgspec.Meta(ge=0)]
AtLeastOne = Annotated[int, msgspec.Meta(ge=1)]
