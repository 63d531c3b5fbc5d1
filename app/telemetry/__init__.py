"""Telemetry: metrics, logs and traces. Nothing of a prompt or a key ever reaches this package."""
