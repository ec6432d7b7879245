"""Recorded routing: what was routed where, in files. docs/traces.md."""
