"""Which kind of device a program is made for: some forms are a CPU's alone."""

import contextlib
import contextvars

import jax

_made_for = contextvars.ContextVar('made_for', default=None)


def on_cpu() -> bool:
  """Whether what is traced now is meant for a CPU."""
  return (_made_for.get() or jax.default_backend()) == 'cpu'


@contextlib.contextmanager
def made_for(platform: str):
  """Inside, programs are traced as on that platform, whichever is here.

  Args:
    platform: 'cpu', 'cuda' or 'tpu'. What `jax.jit` has traced already stays
      as it is: build the program inside.
  """
  token = _made_for.set(platform)
  try:
    yield
  finally:
    _made_for.reset(token)
