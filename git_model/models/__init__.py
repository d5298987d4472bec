"""Batches to loss or text."""
