"""What several tests need: models, oracles, tolerances, and engines that only pretend."""

import pytest

# Assertions in these tell what they compared. The zoo's models assert as a user's do.
for name in ("convertible", "nets", "tolerance"):
    pytest.register_assert_rewrite(f"{__name__}.{name}")
