"""Engines that generate and score: one heavy package per file."""
