"""A collective endpoint: where the seed's control connection listens, and the secret that admits to it.

The secret is new each time an engine opens, so it also names the epoch: a seed that closed and opened again rejects
the endpoints of before. The manifest, which contains the endpoint, travels over the seed's authenticated service.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from vllm_rfork.engines.collective.channel import SECRET_NBYTES
from vllm_rfork.errors import EngineError

NAME = "collective"
_VERSION = 1
_MAX_LENGTH = 1024


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """The description of one open engine for its peers.

    Attributes:
        backend: ``tcp``, ``nccl`` or ``hccl``.
        host, port: the control connection.
        secret: 32 random bytes of one opening of the engine.
        gpu: the GPU's UUID in hexadecimal digits; empty on other devices, and if it is unknown.
    """

    v: int = _VERSION
    backend: Annotated[str, msgspec.Meta(max_length=16)]
    host: Annotated[str, msgspec.Meta(min_length=1, max_length=255)]
    port: Annotated[int, msgspec.Meta(gt=0, lt=65536)]
    secret: Annotated[bytes, msgspec.Meta(min_length=SECRET_NBYTES, max_length=SECRET_NBYTES)]
    gpu: Annotated[str, msgspec.Meta(max_length=64)] = ""

    def __repr__(self) -> str:
        """Without the secret."""
        return f"{self.backend}://{self.host}:{self.port}"


def obstacle(seed: Endpoint, backend: str, gpu: str) -> str | None:
    """The reason why no lane leads from ``seed`` to a worker with this ``backend`` and ``gpu``; None if one may."""
    if seed.backend != backend:
        return f"the seed transfers with {seed.backend}, this worker with {backend}"
    if gpu and seed.gpu == gpu:
        # NCCL fails when the group is created: "invalid usage", for a duplicate GPU.
        return "the seed is on the same GPU, where NCCL permits one member of a group; use engine cuda_ipc"
    return None


def encode(endpoint: Endpoint) -> str:
    """JSON text of some 150 characters."""
    return msgspec.json.encode(endpoint).decode()


def decode(text: str) -> Endpoint:
    """The inverse. Errors do not quote the text, which may contain a secret.

    Raises:
        EngineError: not an endpoint of this engine.
    """
    problem: object = f"{len(text)} characters"
    if len(text) <= _MAX_LENGTH:
        try:
            endpoint = msgspec.json.decode(text.encode(), type=Endpoint)
        except (msgspec.DecodeError, UnicodeEncodeError, RecursionError) as error:
            problem = error
        else:
            if endpoint.v == _VERSION:
                return endpoint
            problem = f"version {endpoint.v}"
    raise EngineError(
        NAME, "connect", f"the seed's endpoint is not one of this engine: {problem}", retry_elsewhere=True, side="seed"
    )
