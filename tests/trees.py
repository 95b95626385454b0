"""Raw downloads that tests make: {name: bytes}, as a folder or as a zip."""

import zipfile


def put(files, folder, top=''):
  """Writes the files below a folder; returns it."""
  for name, contents in files.items():
    path = folder / f'{top}{name}'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(contents)
  return folder


def pack(files, path, top=''):
  """Writes the files into a zip, with what a Mac adds; returns its path."""
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr(f'__MACOSX/{top}images/._x.jpg', b'')
    for name, contents in files.items():
      archive.writestr(f'{top}{name}', contents)
  return path
