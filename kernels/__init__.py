"""Ops on arrays: nothing here knows a model or a mesh."""
