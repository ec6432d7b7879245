"""The demo model: a real Mixture-of-Experts model, carved from SmolLM2-135M-Instruct (docs/quality.md)."""

from emoe.demo.builder import VERSION, build, encoded, facts

__all__ = ["VERSION", "build", "encoded", "facts"]
