"""Small members of all families, and variables that look trained."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax.models import (
  mobilenetv2,
  resnet,
  resnet_cifar,
  shufflenetv1,
  shufflenetv2,
  vgg,
  wrn,
)

_SHUFFLE = {"widths": (16, 32, 64), "blocks": (1, 1, 1), "last_width": 80}
_RESNET = {"widths": (4, 8), "factor": 2, "stem_width": 4}
SMALL = {
  "resnet": resnet_cifar.ResNetCifar(10, depth=8, widths=(4, 8, 8, 16)),
  "bottleneck": resnet_cifar.BottleneckResNetCifar(
    10, blocks=(2, 1), widths=(4, 8)
  ),
  "wrn": wrn.WideResNet(10, depth=10, widen=1),
  "vgg": vgg.VGG(10, convs=(1, 2, 1, 1, 1)),
  "mobilenetv2": mobilenetv2.MobileNetV2Classifier(10, width_multiplier=0.25),
  "shufflenetv1": shufflenetv1.ShuffleNetV1(
    10, widths=(48, 96, 192), blocks=(2, 1, 1)
  ),
  "shufflenetv2": shufflenetv2.ShuffleNetV2(10, **_SHUFFLE),
  "resnet_imagenet": resnet.ResNet(10, blocks=(1, 1), **_RESNET),
  "resnext": resnet.ResNet(
    10, blocks=(2, 1), bottleneck=True, groups=4, **_RESNET
  ),
  "shufflenetv2_imagenet": shufflenetv2.ShuffleNetV2(
    10, imagenet=True, **_SHUFFLE
  ),
}


def draw(model, seed=0):
  """Draws a model's variables, without compiling its initialisers."""
  rng = np.random.default_rng(seed)

  def value(path, leaf):
    name = path[-1].key
    if name == "kernel":
      fan_in = np.prod(leaf.shape[:-1])
      values = rng.standard_normal(leaf.shape) * np.sqrt(2 / fan_in)
    elif name in ("scale", "var"):
      values = rng.uniform(0.8, 1.2, leaf.shape)
    else:
      values = 0.1 * rng.standard_normal(leaf.shape)
    return values.astype(leaf.dtype)

  init = functools.partial(model.init, train=False)
  images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
  shapes = jax.eval_shape(init, jax.random.key(0), images)
  return jax.tree_util.tree_map_with_path(value, shapes)


@pytest.fixture(scope="session", name="draw")
def _draw():
  return draw


@pytest.fixture(scope="session", params=SMALL)
def family(request):
  """A small member, its output in evaluation mode, and its gradients there."""
  model = SMALL[request.param]
  images = jax.random.normal(jax.random.key(1), (4, 16, 16, 3))
  variables = draw(model)

  def objective(params):
    output = model.apply({**variables, "params": params}, images, train=False)
    return jnp.sum(output.logits * jnp.cos(jnp.arange(10.0))), output

  run = jax.jit(jax.grad(objective, has_aux=True))
  grads, output = run(variables["params"])
  return types.SimpleNamespace(
    name=request.param,
    model=model,
    variables=variables,
    images=images,
    run=run,
    output=output,
    grads=grads,
  )


@pytest.fixture(params=["cpu", "default"])
def branch(request, monkeypatch):
  """Takes every choice between platforms as on a CPU, and as elsewhere."""

  def choose(*args, cpu, default):
    return (cpu if request.param == "cpu" else default)(*args)

  monkeypatch.setattr(jax.lax, "platform_dependent", choose)
  return request.param
