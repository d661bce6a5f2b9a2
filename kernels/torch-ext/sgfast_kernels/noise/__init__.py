"""Seeded noise: standard normals, and their application to embeddings."""
