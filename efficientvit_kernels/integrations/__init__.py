"""Swapping the fused modules into models of other libraries, and back."""

from ._accelerate import Left as Left
from ._accelerate import Report as Report
from ._accelerate import Swapped as Swapped
from ._accelerate import accelerate as accelerate
from ._accelerate import restore as restore
