# SPDX-License-Identifier: AGPL-3.0-or-later
"""How the tests with random sequences of steps on a real system are run."""

import os

from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test


def run_sequences(model: type[RuleBasedStateMachine], sequences: int, steps: int, *, shrink: bool) -> None:
    """Run a state machine; with `shrink` a sequence that fails is made as short as possible first, which takes long.

    The sequences are the same each time, unless ASH_TEST_SEQUENCES asks for others.
    """
    phases = list(Phase) if shrink else [Phase.generate]
    chosen = settings(
        max_examples=sequences,
        stateful_step_count=steps,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
        derandomize="ASH_TEST_SEQUENCES" not in os.environ,
        phases=phases,
    )
    run_state_machine_as_test(model, settings=chosen)
