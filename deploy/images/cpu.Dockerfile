# vLLM on CPUs with this package, to try it without a GPU: compose.yaml uses it. No extra: `collective` needs none.
#   docker build -f deploy/images/cpu.Dockerfile -t vllm-rfork-cpu:0.1.0 .
ARG VLLM=v0.26.0

FROM python:3.13-slim-bookworm AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY vllm_rfork vllm_rfork
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM public.ecr.aws/q9t5s3a7/vllm-cpu-release-repo:${VLLM}
LABEL org.opencontainers.image.title="vLLM with vllm-rfork, CPU" \
      org.opencontainers.image.licenses="Apache-2.0"
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# As in cuda.Dockerfile, the image's own versions are constraints.
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    python3 -m pip freeze | grep -E '^[A-Za-z0-9._-]+==' > /tmp/constraints.txt \
    && python3 -m pip install --no-cache-dir --constraint /tmp/constraints.txt /wheels/vllm_rfork-*.whl \
    && rm /tmp/constraints.txt
