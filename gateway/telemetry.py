"""What does a trace show? One span an exchange, rendered from its Decision, by the one module that knows OpenTelemetry.

Only the API is needed: without an SDK in the process every call here is empty.
"""

from __future__ import annotations

from collections.abc import Mapping

from opentelemetry import propagate, trace

from gateway.decision import Decision

_NS_PER_S = 1_000_000_000


class Tracing:
    """Writes spans through the tracer provider of the process."""

    def __init__(self) -> None:
        self._tracer = trace.get_tracer("tierway")

    def decided(self, decision: Decision, carrier: Mapping[str, str]) -> None:
        """Write the span of an exchange as a child of the client's `traceparent`."""
        started_ns = int(decision.created_at * _NS_PER_S)
        span = self._tracer.start_span(
            f"chat {decision.route}"
            if decision.endpoint == "chat/completions"
            else f"text_completion {decision.route}",
            context=propagate.extract(dict(carrier)),
            kind=trace.SpanKind.SERVER,
            start_time=started_ns,
        )
        if span.is_recording():
            usage = decision.usage
            span.set_attributes(
                {
                    "gen_ai.request.model": decision.asked,
                    "gen_ai.response.model": decision.model or "",
                    "gen_ai.usage.input_tokens": usage.prompt_tokens,
                    "gen_ai.usage.output_tokens": usage.completion_tokens,
                    "tierway.exchange_id": decision.exchange_id,
                    "tierway.tier": decision.tier or "",
                    "tierway.ending": decision.ending,
                    "tierway.attempts": len(decision.attempts),
                    "tierway.cost_nusd": decision.cost_nusd,
                }
            )
        span.end(end_time=started_ns + int(decision.total_s * _NS_PER_S))
