"""Layouts that servers load, made of an artifact's files."""
