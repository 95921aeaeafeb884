"""The planner's HTTP side: calls, access, dashboard, presence."""
