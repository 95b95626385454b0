# Makes the virtual environment the other files here run in; they source it.
#
#   PYTHON=/usr/bin/python3.12   the interpreter; by default one is looked for
#   VENV=/somewhere/venv         the environment; by default .venv
#
# What is installed is remembered in the environment: until a requirements file
# changes, pip is not run again and no network is needed.

_fail() {
  echo "error: $*" >&2
  exit 1
}

# Whether $1 runs, is recent enough and can make virtual environments. A name
# on the path is not enough: pyenv has one for every version ever installed.
_usable() {
  "$1" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' \
    >/dev/null 2>&1
}

# Prints the first usable Python of the versions given; fails without one.
find_python() {
  local version python
  for version in "$@"; do
    for python in "python$version" \
      "${PYENV_ROOT:-$HOME/.pyenv}/versions/$version".*/bin/python; do
      if _usable "$python"; then
        command -v "$python"
        return
      fi
    done
  done
  return 1
}

# Sets `python` to that of an environment with the requirements files given.
prepare_python() {
  local venv=${VENV:-.venv} key stamp file files=()
  python=$venv/bin/python
  key=$(cat requirements*.txt | cksum | tr ' ' '-')
  stamp=$venv/.installed-$key-$(echo "$*" | tr ' /' '--')
  if [[ -e $stamp ]] && _usable "$python"; then
    return
  fi
  for file in "$@"; do
    [[ -e $file ]] || _fail "no requirements file $file; there are:" \
      "$(echo requirements*.txt)"
    files+=(-r "$file")
  done
  _usable "$python" || _make_venv "$venv"
  echo "installing $* into $venv: about 1 GB, once" >&2
  "$python" -m pip install --disable-pip-version-check "${files[@]}" >&2 ||
    _fail "pip could not install $* (see above)"
  touch "$stamp"
}

_make_venv() {
  local given=${PYTHON:-}
  if [[ -z $given ]]; then
    given=$(find_python 3.12 3.11 3.13 3) || _fail "this needs Python 3.11 or \
newer with its venv module (3.11 and 3.12 are tested), and found none. Install \
one (Debian, Ubuntu: apt install python3.12-venv), or name one: \
PYTHON=/path/to/python3.12 bash $0"
  elif ! _usable "$given"; then
    _fail "PYTHON=$given does not run, is older than Python 3.11, or lacks its \
venv module (Debian, Ubuntu: apt install python3.12-venv)"
  fi
  if [[ -e $1 && ! -e $1/pyvenv.cfg && -n $(ls -A "$1") ]]; then
    _fail "VENV=$1 exists and is no virtual environment; give another folder"
  fi
  "$given" -m venv --clear "$1" || _fail "$given cannot make $1 (see above)"
}
