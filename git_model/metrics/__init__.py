"""Strings and arrays to numbers; no model, no torch in here."""
