"""`duq-lerobot-server`: LeRobot's asynchronous policy server, which then also serves plans.

Takes the options of `python -m lerobot.async_inference.policy_server`. It differs in two things: the list of policy types
that it accepts has "duq" in it, and a reply is sent when it is there, not after 1/30 s (unless --inference_latency says so).
LeRobot's protocol unpickles what clients send: whoever reaches the port can run code. Bind it to a trusted network alone.
"""

from __future__ import annotations

import sys

from lerobot.async_inference import policy_server

from . import DuqConfig

LATENCY = "--inference_latency"


def main() -> None:
    """Serves until it is stopped."""
    accept(DuqConfig.get_choice_name(DuqConfig))
    if not any(argument.split("=")[0] == LATENCY for argument in sys.argv[1:]):
        sys.argv.append(f"{LATENCY}=0")
    policy_server.serve()


def accept(policy_type: str) -> None:
    """Adds a type to those that the server loads."""
    types = policy_server.SUPPORTED_POLICIES
    if policy_type not in types:
        policy_server.SUPPORTED_POLICIES = [*types, policy_type]


if __name__ == "__main__":
    main()
