# The planner: neither torch nor vLLM. From the repository's root:
#   docker build -f deploy/images/planner.Dockerfile -t vllm-rfork-planner:0.1.0 .
ARG PYTHON=3.13-slim-bookworm

FROM python:${PYTHON} AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY vllm_rfork vllm_rfork
COPY requirements/lock.txt requirements/lock.txt
# The versions that the tests of this release ran with.
RUN python -m venv /opt/rfork \
    && /opt/rfork/bin/pip install --no-cache-dir --constraint requirements/lock.txt '.[planner]' \
    && /opt/rfork/bin/pip uninstall --yes pip

FROM python:${PYTHON}
LABEL org.opencontainers.image.title="vllm-rfork planner" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /opt/rfork /opt/rfork
ENV PATH=/opt/rfork/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    RFORK_PLANNER_HOST=0.0.0.0
# A number, so that Kubernetes can verify runAsNonRoot; the chart uses the same.
USER 65532:65532
EXPOSE 1223
ENTRYPOINT ["vllm-rfork"]
CMD ["planner"]
