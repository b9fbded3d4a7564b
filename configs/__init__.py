"""Presets: facts and choices as data files, no code."""
