"""Sluice: one fair queue in front of vLLM workers that serve compressed models."""
