"""What Prometheus reads at /metrics."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from glm.serving.request import Request, RequestQueue

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Counters of one server."""

    def __init__(self, engine: RequestQueue) -> None:
        self.registry = CollectorRegistry()
        self.responses = Counter("glmflow_http_responses", "Responses", ["path", "status"], registry=self.registry)
        self.answers = Counter("glmflow_answers", "Answers", ["finish_reason"], registry=self.registry)
        self.prompt_tokens = Counter("glmflow_prompt_tokens", "Tokens read", registry=self.registry)
        self.completion_tokens = Counter("glmflow_completion_tokens", "Tokens written", registry=self.registry)
        self.first_token = Histogram(
            "glmflow_time_to_first_token_seconds", "Until the first token", buckets=SECONDS, registry=self.registry
        )
        self.duration = Histogram(
            "glmflow_answer_seconds", "Until an answer's end", buckets=SECONDS, registry=self.registry
        )
        running = Gauge("glmflow_requests_running", "Requests that are being answered", registry=self.registry)
        running.set_function(lambda: len(engine.running))
        waiting = Gauge("glmflow_requests_waiting", "Requests that wait for a place", registry=self.registry)
        waiting.set_function(lambda: len(engine.waiting))

    def count(self, request: Request, finish_reason: str) -> None:
        """Take an ended request into account."""
        self.answers.labels(finish_reason).inc()
        self.prompt_tokens.inc(len(request.prompt))
        self.completion_tokens.inc(request.completion_tokens)
        if request.first_token is not None:
            self.first_token.observe(request.first_token - request.submitted)
        if request.finished is not None:
            self.duration.observe(request.finished - request.submitted)
