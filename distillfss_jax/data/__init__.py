"""Datasets, support sets, episodes and the grain pipelines that feed them."""
