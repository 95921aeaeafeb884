# vLLM on CUDA with this package. The image of vLLM stays as it is: its torch, its entry point, its user.
#   docker build -f deploy/images/cuda.Dockerfile -t vllm-rfork-cuda:0.1.0 .
# EXTRA: nixl for images with CUDA 13, nixl-cu12 for CUDA 12. `vllm-rfork doctor` in the container names a mismatch.
ARG VLLM=v0.26.0

FROM python:3.13-slim-bookworm AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY vllm_rfork vllm_rfork
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM vllm/vllm-openai:${VLLM}
ARG EXTRA=nixl
LABEL org.opencontainers.image.title="vLLM with vllm-rfork, CUDA" \
      org.opencontainers.image.licenses="Apache-2.0"
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# The user-space side of RDMA NICs, in the versions of the image's own distribution.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ibverbs-providers libibverbs1 \
    && rm -rf /var/lib/apt/lists/*
# The image's own versions are constraints, so that no package that vLLM was built with is replaced. pip names a conflict,
# such as an older NIXL; --build-arg EXTRA= builds without one. A distribution from a local file is frozen as "name @ file:…",
# which a constraint cannot be.
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    python3 -m pip freeze | grep -E '^[A-Za-z0-9._-]+==' > /tmp/constraints.txt \
    && python3 -m pip install --no-cache-dir --constraint /tmp/constraints.txt \
        "vllm-rfork[${EXTRA}] @ file://$(echo /wheels/vllm_rfork-*.whl)" \
    && rm /tmp/constraints.txt
