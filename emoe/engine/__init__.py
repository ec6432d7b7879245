"""Many requests at once: who runs (scheduler), what a step costs (costs). docs/serving.md."""
