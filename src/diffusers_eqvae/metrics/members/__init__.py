"""One file a metric; its name is the metric's. `metrics.base` says what belongs into it."""
