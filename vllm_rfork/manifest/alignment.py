"""The alignment of registered regions that routes of HIXL, the data plane of newer YuanRong engines, require."""

from __future__ import annotations

#: Regions begin at multiples of this number of bytes, on these routes.
HIXL_ALIGNMENT = 2 * 1024 * 1024
ALIGNED_ROUTES = frozenset({"auto", "hccs"})
#: The variable of the newest YuanRong generation that selects the route; ``roce`` if it is not set.
ROUTE_VARIABLE = "YR_TE_HIXL_ROUTE"
