"""The demo model: a real Mixture-of-Experts model, carved from SmolLM2-135M-Instruct (docs/quality.md)."""

from emoe.demo.builder import VERSION, build, facts

__all__ = ["VERSION", "build", "facts"]
