"""Finds which layers of a model to adapt, replaces them, and merges or removes the adaptation."""
