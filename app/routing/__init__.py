"""Routing: which workers may serve a request, best first, and why. Pure."""
