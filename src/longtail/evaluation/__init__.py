"""Judging: metrics of one run, and comparison of many."""
