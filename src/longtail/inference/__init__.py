"""Trained models: saving, loading, prediction, export."""
