"""Metrics and traces of a load that need names of vLLM's: its version, and the trace in which it loads a model.

If tracing is enabled, vLLM loads models inside a span, of this process or of the one that started it, which it names in
the environment. The spans of a load become its children.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from vllm_rfork import __version__
from vllm_rfork.metrics import worker as metrics
from vllm_rfork.vllm_compat.storage_loader import target_device

#: Name of a span, its beginning and its end in nanoseconds since the epoch.
Interval = tuple[str, int, int]


@metrics.harmless
def begin_metrics(vllm_config: Any) -> None:
    """Begin the metrics of the worker of this configuration."""
    import vllm

    metrics.started(
        version=__version__,
        vllm_version=str(vllm.__version__),
        torch_version=str(torch.__version__),
        device=target_device(vllm_config).type,
    )


@metrics.harmless
def trace_load(whole: Interval, stages: Sequence[Interval], attributes: Mapping[str, str | int]) -> None:
    """Add the span of a load to vLLM's trace, with the spans of its stages; does nothing if tracing is off."""
    try:
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
    except ImportError:  # vLLM works without it
        return
    tracer = trace.get_tracer("vllm_rfork", __version__)
    context = None
    if not trace.get_current_span().get_span_context().is_valid:
        names = ("traceparent", "tracestate")
        carrier = {name: value for name in names if (value := os.environ.get(name) or os.environ.get(name.upper()))}
        context = TraceContextTextMapPropagator().extract(carrier)
    name, began_ns, ended_ns = whole
    span = tracer.start_span(name, context, start_time=began_ns, attributes=dict(attributes))
    if span.is_recording():
        inside = trace.set_span_in_context(span, context)
        for stage, stage_began_ns, stage_ended_ns in stages:
            tracer.start_span(stage, inside, start_time=stage_began_ns).end(stage_ended_ns)
    span.end(ended_ns)
