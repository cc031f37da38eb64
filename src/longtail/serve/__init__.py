"""A local page to drop images on."""

from longtail.serve.app import build_app, serve

__all__ = ["build_app", "serve"]
