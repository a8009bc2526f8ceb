"""VGG with BatchNorm for 32x32 images, with a single linear layer on top.

Simonyan and Zisserman, Very Deep Convolutional Networks for Large-Scale Image
Recognition (ICLR 2015), table 1; VGG-8 has one convolution per block.
"""

import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax

from kd_jax.models import base, layers
from kd_jax.models.entry import Entry

_WIDTHS = (64, 128, 256, 512, 512)


class VGG(base.Classifier):
  """Five blocks of 3x3 convolutions, with max-pools between the first four.

  Features: stem_preact, stem (the first block), then stageN_preact, stageN,
  with relu(x_preact) = x. The reference's initialisers: He normal over the
  fan-out for convolutions, N(0, 0.01^2) for the classifier, zero biases.

  Attributes:
    convs: convolutions of each block.
  """

  convs: tuple[int, int, int, int, int] = (1, 1, 1, 1, 1)

  head: ClassVar[str] = "classifier"

  @nn.compact
  def __call__(
    self, images: jax.Array, *, train: bool = False
  ) -> layers.ModelOutputs:
    """See `Classifier`."""
    conv = self.make_conv(
      use_bias=True,
      kernel_init=layers.kaiming_normal_fan_out,
      bias_init=nn.initializers.zeros,
    )
    norm = self.make_norm()
    features = {}
    x = self.prepare(images)
    # The reference pools before the last block at 64x64 pixels, not at 32x32.
    pools = 4 if x.shape[1] >= 64 else 3
    for block, (convs, width) in enumerate(zip(self.convs, _WIDTHS)):
      if 1 <= block <= pools:
        x = layers.max_pool(x, 2, strides=2)
      for i in range(convs):
        # The reference counts each convolution, BatchNorm and ReLU as one.
        x = conv(x, width, 3, padding=1, name=f"block{block}_{3 * i}")
        preact = norm(name=f"block{block}_{3 * i + 1}")(x, train=train)
        x = layers.relu(preact)
      name = f"stage{block}" if block else "stem"
      features[f"{name}_preact"] = preact
      features[name] = x
    return self.finish(
      features,
      x,
      kernel_init=nn.initializers.normal(0.01),
      bias_init=nn.initializers.zeros,
    )

  @nn.nowrap
  def stage_norms(
    self, params: Mapping[str, Any]
  ) -> list[tuple[jax.Array, jax.Array]]:
    """See `Classifier`."""
    return [
      layers.norm_parameters(params, f"block{block}_{3 * count - 2}")
      for block, count in enumerate(self.convs)
      if block
    ]


ENTRIES = {
  name: Entry(functools.partial(VGG, convs=convs))
  for name, convs in {
    "vgg8": (1, 1, 1, 1, 1),
    "vgg11": (1, 1, 2, 2, 2),
    "vgg13": (2, 2, 2, 2, 2),
    "vgg16": (2, 2, 3, 3, 3),
    "vgg19": (2, 2, 4, 4, 4),
  }.items()
}
