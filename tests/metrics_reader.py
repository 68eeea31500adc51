"""Metrics without an exporter."""

from nanoserve_gateway.refusals import Refusals
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from nanoserve.observability.metrics import Metrics


class Read:
    """Reads what a Metrics keeps."""

    def __init__(self):
        self._reader = InMemoryMetricReader()
        provider = MeterProvider([self._reader])
        self.metrics = Metrics(provider)
        # Of the gateway.
        self.refusals = Refusals(provider)

    def all(self):
        data = self._reader.get_metrics_data()
        if data is None:
            return {}
        return {m.name: m for r in data.resource_metrics for s in r.scope_metrics for m in s.metrics}

    def points(self, name):
        """(attributes, value) of each series; of a histogram, the count."""
        metric = self.all().get(name)
        points = metric.data.data_points if metric else []
        return [(dict(p.attributes), getattr(p, "value", None) if hasattr(p, "value") else p.count) for p in points]

    def value(self, name, **attributes):
        wanted = {key.replace("__", "."): value for key, value in attributes.items()}
        return sum(value for found, value in self.points(name) if wanted.items() <= found.items())

    def blocks(self):
        return {found["nanoserve.kv.block.state"]: count for found, count in self.points("nanoserve.kv.blocks")}
