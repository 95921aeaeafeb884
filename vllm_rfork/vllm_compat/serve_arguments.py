"""vLLM's configuration for the arguments of ``vllm serve``, without starting a server."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any, NoReturn

from vllm_rfork.errors import ConfigError


def with_configuration(arguments: Sequence[str], load_format: str, use: Callable[[Any], NoReturn]) -> NoReturn:
    """Call ``use`` with the configuration that ``vllm serve`` makes of ``arguments``; it must end the process.

    vLLM's own command parses them, in this process, up to the moment when its front end has made the configuration: no
    engine has been started then. It listens on a free port of its own for that time.

    Raises:
        ConfigError: they do not name ``load_format``; vLLM has no command, or ended without a configuration.
        SystemExit: vLLM rejected an argument, and printed why.
    """
    from vllm.engine import arg_utils

    original = arg_utils.EngineArgs.create_engine_config

    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> NoReturn:
        given = str(getattr(self, "load_format", "")).lower()
        if given != load_format:
            raise ConfigError("--load-format", f"is {given}", load_format)
        use(original(self, *args, **kwargs))

    commands = list(metadata.entry_points(group="console_scripts", name="vllm"))
    if not commands:
        raise ConfigError("vllm", "the command is not installed", "an installation with the script vllm")
    arg_utils.EngineArgs.create_engine_config = create_engine_config
    sys.argv = ["vllm", "serve", *arguments, "--port", "0"]
    commands[0].load()()
    raise ConfigError("vllm serve", "ended before it had a configuration", "arguments that start a server")
