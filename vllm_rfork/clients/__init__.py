"""Clients of the planner and of the seed service.

Every call is bounded in time and in bytes, and fails with an error of the package's tree.
"""

from vllm_rfork.clients.answers import Attendance, Attended, Outcome
from vllm_rfork.clients.lease import LeaseKeeper
from vllm_rfork.clients.planner import PlannerClient
from vllm_rfork.clients.seed import SeedClient

__all__ = ["Attendance", "Attended", "LeaseKeeper", "Outcome", "PlannerClient", "SeedClient"]
