"""Few-shot segmentation distillation in JAX and Flax NNX."""

__version__ = '0.1.0'


def load(source, *, batch_size=0):
  """The segmenter of a finished run's folder, or of an exported file.

      model = distillfss_jax.load('runs/nucleus')
      labels = model.predict('cell.png')         # uint8 [H, W]
      model.classes, model.palette               # of labels 1..n, of 0..n
      shares = model.probabilities('cell.png')   # float32 [H, W, 1+n]
      confidence = shares.max(-1)

  Args:
    source: path of the folder or file.
    batch_size: parts of a large image that are answered at once; 0 chooses.

  Returns:
    A `distillfss_jax.inference.segmenter.Segmenter`.

  Raises:
    ValueError: it is neither, unfinished, or damaged; in one line.
    OSError: it cannot be read.
  """
  # Importing it takes seconds, which not all need who import the package.
  from distillfss_jax.inference import sources

  return sources.load(source, batch_size=batch_size)
