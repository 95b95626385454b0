"""DistillFSS on Nucleus (Data Science Bowl 2018), few shots of nuclei.

    python -m distillfss_jax.prepare --dataset nucleus --raw stage1_train.zip
    python -m distillfss_jax.main --config configs/nucleus.py:shots=5

Arguments after the colon, separated by commas:

    method=distill|transfer|bam|hdmnet|ifa  shots=5|10|25|50
    backbone=swin_b|resnet50  student=full|light|attention  seed=0  smoke
    teacher=dcama|bam|hdmnet|ifa  data=nucleus|synthetic  recipe=paper|ours|unet
    model_shots=1|5, that the model of bam and hdmnet takes at once
    unlabelled=train|DIR, images without labels that ours and unet learn from

Published test mIoU (the best of a grid, selected on the test set), 5/10/25/50
shots: DistillFSS Swin-B 69.6/71.2/68.2/80.0, ResNet-50 12.8/20.7/25.2/21.1;
TransferFSS Swin-B 73.1/79.0/69.5/79.4. Those start from DCAMA weights trained
on PASCAL; from random weights see docs/weights.md.
"""

from configs import common


def get_config(arg=None):
  """The paper's settings; see the module's docstring for `arg`."""
  config, arg = common.benchmark(arg, 'nucleus', steps=2500)
  with config.unlocked():
    config.data.args.split = 'frozen'
  return common.done(config, arg)


def sweep():
  """The grid behind the paper's row."""
  return common.grid(shots=(5, 10, 25, 50))
