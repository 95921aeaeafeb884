# vLLM-Ascend with this package and YuanRong TransferEngine. Not run on an NPU: docs/ascend.md says what was shown.
#   docker build -f deploy/images/ascend.Dockerfile -t vllm-rfork-ascend:0.1.0 .                                  (Atlas A2)
#   docker build -f deploy/images/ascend.Dockerfile --build-arg VLLM_ASCEND=v0.23.0-a3 -t vllm-rfork-ascend:0.1.0-a3 .  (A3)
ARG VLLM_ASCEND=v0.23.0

FROM python:3.13-slim-bookworm AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY vllm_rfork vllm_rfork
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM quay.io/ascend/vllm-ascend:${VLLM_ASCEND}
LABEL org.opencontainers.image.title="vLLM-Ascend with vllm-rfork" \
      org.opencontainers.image.licenses="Apache-2.0"
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# YuanRong's library needs it.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends libunwind8 \
    && rm -rf /var/lib/apt/lists/*
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    python3 -m pip freeze | grep -E '^[A-Za-z0-9._-]+==' > /tmp/constraints.txt \
    && python3 -m pip install --no-cache-dir --constraint /tmp/constraints.txt \
        "vllm-rfork[ascend] @ file://$(echo /wheels/vllm_rfork-*.whl)" \
    && rm /tmp/constraints.txt
