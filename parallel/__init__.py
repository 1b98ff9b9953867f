"""Meshes, placements and collectives: nothing here knows a model."""
