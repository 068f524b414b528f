"""How hard Hypothesis looks: few fixed examples by default, many random ones with INLAY_HYPOTHESIS=long."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, Phase, settings

NAME = os.environ.get("INLAY_HYPOTHESIS", "default")
PHASES = [Phase.explicit, Phase.generate, Phase.shrink]
QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]

settings.register_profile("inlay-default", max_examples=2, deadline=None, derandomize=True, database=None,
                          phases=PHASES, suppress_health_check=QUIET)  # fmt: skip
settings.register_profile("inlay-quick", settings.get_profile("inlay-default"))  # what `inlay check` runs
settings.register_profile("inlay-long", max_examples=30, deadline=None, database=None, print_blob=True,
                          phases=PHASES, suppress_health_check=QUIET)  # fmt: skip


def profile(share: float = 1.0) -> settings:
    """Return the chosen profile with `share` of its examples (at least one)."""
    chosen = settings.get_profile(f"inlay-{NAME}")
    return settings(chosen, max_examples=max(1, round(chosen.max_examples * share)))
