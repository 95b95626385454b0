"""Trained segmenters at work: images in, masks and what comes of them out.

A segmenter knows its answer for images of one size (`segmenter.py`), whether
that comes of a run's folder or of an exported file (`sources.py`); images of
any size, tiles, and all that is written of them are the same for both.
"""
