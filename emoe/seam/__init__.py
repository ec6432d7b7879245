"""The seam to Transformers: a model without its experts, loaded, saved and put back. docs/checkpoints.md."""
