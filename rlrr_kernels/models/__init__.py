"""Adapts whole models: selects their layers, replaces them, and merges or removes the adapters again."""
