"""Clients of the two HTTP services: the planner (acquire, renew, release, announce, withdraw) and the seed.

Every call is bounded in time and in bytes and fails with an error of the package's tree. Must not import torch,
vLLM or anything beside the plain data modules.
"""

from vllm_rfork.clients.lease import LeaseKeeper
from vllm_rfork.clients.planner import Attendance, Attended, Outcome, PlannerClient
from vllm_rfork.clients.seed import SeedClient

__all__ = ["Attendance", "Attended", "LeaseKeeper", "Outcome", "PlannerClient", "SeedClient"]
