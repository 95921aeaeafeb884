"""A worker's settings. Option names are those of the user's guide."""

from vllm_rfork.config.parsing import ENVIRONMENT, ExaminedConfig, ParsedConfig, examine_config, parse_config
from vllm_rfork.config.settings import NEEDED, Settings
from vllm_rfork.config.urls import base_url, planner_urls

__all__ = [
    "ENVIRONMENT",
    "NEEDED",
    "ExaminedConfig",
    "ParsedConfig",
    "Settings",
    "base_url",
    "examine_config",
    "parse_config",
    "planner_urls",
]
