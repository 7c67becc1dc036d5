"""`FUZZ_EXAMPLES` sets the number of inputs per target; CI tries a few dozen."""

import os

from hypothesis import HealthCheck, settings

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "40"))

settings.register_profile(
    "fuzz",
    max_examples=EXAMPLES,
    deadline=None,  # `bounds.outcome` has its own, which also ends a hang
    suppress_health_check=list(HealthCheck),
    derandomize="FUZZ_EXAMPLES" not in os.environ,
    print_blob=True,
)
settings.load_profile("fuzz")
