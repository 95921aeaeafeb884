"""A worker's metrics on the page that vLLM's own code makes, and the spans of its load. Starts no engine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from vllm_rfork.fork.stage_times import StageTimes
from vllm_rfork.load.metering import LoadMeter, Weights
from vllm_rfork.metrics import front_end
from vllm_rfork.metrics.front_end import OWN_DIRECTORY, VLLMS_DIRECTORY

pytestmark = pytest.mark.vllm

WORKER = """
from vllm_rfork.metrics import worker

worker.loaded("seed", nbytes=7, seconds=0.7, lane="mooncake/efa")
worker.fell_back("excluded")
"""


@pytest.mark.parametrize("servers", [1, 2])
def test_metrics_survive_several_api_servers(servers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM sets its variable if there are several; another process writes, as a worker does."""
    from fastapi import FastAPI
    from fastapi.testclient import TestClient
    from vllm.entrypoints.serve.instrumentator.metrics import attach_router
    from vllm.v1.metrics.prometheus import unregister_vllm_metrics

    monkeypatch.delenv(VLLMS_DIRECTORY, raising=False)
    if servers > 1:
        monkeypatch.setenv(VLLMS_DIRECTORY, str(tmp_path))
    elif not front_end._Shown.tried:
        monkeypatch.setenv(OWN_DIRECTORY, "")  # is set again below, and undone with the test
        front_end.show_workers()
    subprocess.run([sys.executable, "-c", WORKER], check=True)
    unregister_vllm_metrics()
    app = FastAPI()
    attach_router(app)
    page = TestClient(app).get("/metrics").text
    assert 'rfork_loads_total{engine="mooncake",lane="mooncake/efa",outcome="ok",source="seed"} 1.0' in page
    assert 'rfork_fallbacks_total{reason="excluded"} 1.0' in page
    assert page.count("# TYPE rfork_loads_total counter") == 1


def test_a_load_is_in_vllms_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
    times = StageTimes()
    session = SimpleNamespace(
        engine="nixl", lane="nixl/rdma", seed="10.0.0.1:5000:0", storage_s=None, leased=True, times=times
    )
    with provider.get_tracer("vllm").start_as_current_span("vLLM's own"):
        meter = LoadMeter(cast("Any", session), ineligible=False)
        for stage in ("planner", "first metadata", "read"):
            with times.stage(stage):
                pass
        meter.ended(Weights("seed", 70, 0.5))
    spans = {span.name: span for span in exporter.get_finished_spans()}
    assert spans.keys() == {"vLLM's own", "rfork.load", "rfork.planner", "rfork.first_metadata", "rfork.read"}
    whole = spans["rfork.load"]
    assert whole.attributes == {
        "rfork.source": "seed",
        "rfork.bytes": 70,
        "rfork.engine": "nixl",
        "rfork.lane": "nixl/rdma",
        "rfork.seed": "10.0.0.1:5000:0",
    }
    assert whole.parent is not None
    assert whole.parent.span_id == spans.pop("vLLM's own").context.span_id
    for span in spans.values():
        if span is whole:
            continue
        assert span.parent is not None
        assert span.parent.span_id == whole.context.span_id
        assert (whole.start_time or 0) <= (span.start_time or 0) <= (span.end_time or 0) <= (whole.end_time or 0)
