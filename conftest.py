"""Names that tests shared before tests/support: for imports that have not moved yet."""

from tests.support.backends import BACKENDS, INTERPRET
from tests.support.specs import SPECS, shaped
from tests.support.tolerance import assert_as_good_as

__all__ = ["BACKENDS", "INTERPRET", "SPECS", "assert_as_good_as", "shaped"]
