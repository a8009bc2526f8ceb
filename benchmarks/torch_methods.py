"""Distillation methods in PyTorch, for `benchmarks.step`.

The names of all modules are those of kd_jax's distillers.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import work as work_lib
from benchmarks.torch_networks import Output, conv

# CRD's reference adds it to the denominators.
_EPSILON = 1e-7


class Projector(nn.Module):
  """1x1, 3x3, 1x1 convolutions with BatchNorm and ReLU between them."""

  def __init__(self, inputs: int, middle: int, outputs: int, *, end: bool):
    super().__init__()
    self.conv1 = conv(inputs, middle, 1)
    self.bn1 = nn.BatchNorm2d(middle)
    self.conv2 = conv(middle, middle, 3)
    self.bn2 = nn.BatchNorm2d(middle)
    self.conv3 = conv(middle, outputs, 1)
    if end:
      self.bn3 = nn.BatchNorm2d(outputs)
    self._end = end

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    """[B, C, H, W] -> [B, outputs, H, W]."""
    x = F.relu(self.bn1(self.conv1(x)))
    x = F.relu(self.bn2(self.conv2(x)))
    x = self.conv3(x)
    return F.relu(self.bn3(x)) if self._end else x


class Embedding(nn.Module):
  """CRD's: a linear layer onto the unit sphere."""

  def __init__(self, inputs: int, outputs: int):
    super().__init__()
    self.linear = nn.Linear(inputs, outputs)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    """[B, C] -> [B, outputs]."""
    return F.normalize(self.linear(x).float())


class SimilarityEmbedding(nn.Module):
  """SemCKD's query or key of rows of the batch's similarities."""

  def __init__(self, width: int):
    super().__init__()
    self.linear1 = nn.Linear(width, 2 * (width // 4))
    self.linear2 = nn.Linear(2 * (width // 4), width // 4)

  def forward(self, rows: torch.Tensor) -> torch.Tensor:
    """[B, width] -> [B, width // 4]."""
    return F.normalize(self.linear2(F.relu(self.linear1(rows))).float())


def _pool(x: torch.Tensor, size: int) -> torch.Tensor:
  return x if x.shape[2] == size else F.adaptive_avg_pool2d(x, size)


class Method(nn.Module):
  """The terms that all methods share; the methods add theirs."""

  def __init__(self, work: work_lib.Work):
    super().__init__()
    self._weights = work.weights
    self._temperature = work.settings.get("temperature", 4.0)

  def forward(
    self,
    student: Output,
    teacher: Output | None,
    teacher_head: nn.Module | None,
    labels: torch.Tensor,
    index: torch.Tensor,
    negatives: torch.Tensor | None,
  ) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """The loss, the logits of the prediction, and what `remember` takes."""
    del teacher_head, index, negatives
    return self.logit_loss(student, teacher, labels), student.logits, None

  def logit_loss(
    self, student: Output, teacher: Output | None, labels: torch.Tensor
  ) -> torch.Tensor:
    """The weighted cross-entropy and the teacher's softened logits."""
    logits = student.logits.float()
    loss = self._weights["ce"] * F.cross_entropy(logits, labels)
    if teacher is not None and self._weights["kd"]:
      t = self._temperature
      divergence = F.kl_div(
        F.log_softmax(logits / t, dim=1),
        F.softmax(teacher.logits.float() / t, dim=1),
        reduction="batchmean",
      )
      loss = loss + self._weights["kd"] * t**2 * divergence
    return loss

  def remember(self, found: Any) -> None:
    """Moves what the method remembers, after the gradient."""


class SimKD(Method):
  """The teacher's last map, projected onto; and its classifier, reused."""

  def __init__(self, work: work_lib.Work, student: Output, teacher: Output):
    super().__init__(work)
    channels = teacher.last.shape[1]
    self.projector = Projector(
      student.stages[-1].shape[1],
      channels // work.settings["factor"],
      channels,
      end=True,
    )

  def forward(self, student, teacher, teacher_head, labels, index, negatives):
    """See `Method`."""
    del labels, index, negatives
    size = min(student.stages[-1].shape[2], teacher.last.shape[2])
    projected = self.projector(_pool(student.stages[-1], size))
    target = _pool(teacher.last, size)
    loss = F.mse_loss(projected.float(), target.float())
    with torch.no_grad():  # it serves the count of hits alone
      logits = teacher_head(projected.mean(dim=(2, 3)))
    return self._weights["simkd"] * loss, logits, None


class SemCKD(Method):
  """Every student stage learns from every teacher stage, by attention."""

  def __init__(self, work: work_lib.Work, student: Output, teacher: Output):
    super().__init__(work)
    for word, stages in (("query", student.stages), ("key", teacher.stages)):
      for i in range(1, len(stages) + 1):
        self.add_module(f"{word}{i}", SimilarityEmbedding(work.batch))
    for i, map_s in enumerate(student.stages, start=1):
      for j, map_t in enumerate(teacher.stages, start=1):
        inputs, channels = map_s.shape[1], map_t.shape[1]
        self.add_module(
          f"project{i}_{j}",
          Projector(inputs, 2 * channels, channels, end=False),
        )
    self._soft = work.settings["soft"]

  def _embed(self, maps: list[torch.Tensor], word: str) -> torch.Tensor:
    rows = []
    for i, x in enumerate(maps, start=1):
      flat = x.flatten(1).float()
      rows.append(getattr(self, f"{word}{i}")(flat @ flat.T))
    return torch.stack(rows, dim=1)

  def forward(self, student, teacher, teacher_head, labels, index, negatives):
    """See `Method`."""
    del teacher_head, index, negatives
    queries = self._embed(student.stages, "query")
    keys = self._embed(teacher.stages, "key")
    attention = F.softmax(queries @ keys.mT / self._soft, dim=-1)
    rows = []
    for i, map_s in enumerate(student.stages, start=1):
      errors = []
      for j, map_t in enumerate(teacher.stages, start=1):
        size = min(map_s.shape[2], map_t.shape[2])
        made = getattr(self, f"project{i}_{j}")(_pool(map_s, size))
        error = made.float() - _pool(map_t, size).float()
        errors.append(error.square().mean(dim=(1, 2, 3)))
      rows.append(torch.stack(errors, dim=-1))
    term = (attention * torch.stack(rows, dim=1)).sum(dim=(1, 2))
    term = term.mean() / len(rows)
    loss = self.logit_loss(student, teacher, labels)
    return loss + self._weights["semckd"] * term, student.logits, None


class CRD(Method):
  """Embeddings of one image together, those of other classes apart."""

  def __init__(self, work: work_lib.Work, student: Output, teacher: Output):
    super().__init__(work)
    fields = work.settings
    dim = fields["feat_dim"]
    self._examples, self._classes = work.examples, work.classes
    self._k, self._momentum = fields["k"], fields["momentum"]
    self._tau = fields["nce_temperature"]
    self.embed_s = Embedding(student.pooled.shape[1], dim)
    self.embed_t = Embedding(teacher.pooled.shape[1], dim)
    for name in ("bank_s", "bank_t"):
      self.register_buffer(name, torch.zeros(work.examples, dim))
    for name in ("z_s", "z_t"):
      self.register_buffer(name, torch.zeros(()))
    for name in ("order", "class_start", "class_count"):
      size = work.examples if name == "order" else work.classes
      self.register_buffer(name, torch.zeros(size, dtype=torch.int64))

  def _drawn(self, labels: torch.Tensor) -> torch.Tensor:
    """Negatives [B, k], drawn on the device."""
    start = self.class_start[labels][:, None]
    count = self.class_count[labels][:, None]
    shape = (len(labels), self._k)
    uniform = torch.rand(shape, device=labels.device)
    r = (uniform * (self._examples - count)).long()
    return self.order[torch.where(r >= start, r + count, r)]

  def _scores(
    self,
    v: torch.Tensor,
    bank: torch.Tensor,
    indices: torch.Tensor,
    whole: bool,
  ) -> torch.Tensor:
    if whole:
      return (v @ bank.T).gather(1, indices) / self._tau
    drawn = bank[indices.flatten()].view(*indices.shape, -1)
    return torch.bmm(drawn, v[:, :, None])[:, :, 0] / self._tau

  def _contrast(self, scores: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    noise = (scores.shape[1] - 1) / self._examples
    x = scores.exp() / z
    positive = torch.log(x[:, :1] / (x[:, :1] + noise + _EPSILON))
    negative = torch.log(noise / (x[:, 1:] + noise + _EPSILON))
    return -(positive.sum() + negative.sum()) / len(scores)

  def forward(self, student, teacher, teacher_head, labels, index, negatives):
    """See `Method`; the reference gathers vectors that a loader drew."""
    del teacher_head
    on_device = negatives is None
    if on_device:
      negatives = self._drawn(labels)
    indices = torch.cat([index[:, None], negatives], dim=1)
    v_s, v_t = self.embed_s(student.pooled), self.embed_t(teacher.pooled)
    with torch.autocast(v_s.device.type, enabled=False):
      scores_s = self._scores(v_s, self.bank_t, indices, on_device)
      scores_t = self._scores(v_t, self.bank_s, indices, on_device)
      first = [s.detach().exp().mean() for s in (scores_s, scores_t)]
      z_s, z_t = (
        torch.where(z > 0, z, self._examples * mean)
        for z, mean in zip((self.z_s, self.z_t), first)
      )
      term = self._contrast(scores_s, z_s) + self._contrast(scores_t, z_t)
    loss = self.logit_loss(student, teacher, labels)
    found = (v_s.detach(), v_t.detach(), z_s, z_t, index)
    return loss + self._weights["crd"] * term, student.logits, found

  @torch.no_grad()
  def remember(self, found: Any) -> None:
    """See `Method`."""
    v_s, v_t, z_s, z_t, index = found
    self.z_s.copy_(z_s)
    self.z_t.copy_(z_t)
    for bank, v in ((self.bank_s, v_s), (self.bank_t, v_t)):
      rows = self._momentum * bank[index] + (1 - self._momentum) * v
      bank[index] = F.normalize(rows)


def create(work: work_lib.Work, *outputs: Output) -> Method:
  """The method of a work; `outputs` are the student's and the teacher's."""
  makers = {"crd": CRD, "semckd": SemCKD, "simkd": SimKD}
  make = makers.get(work.method)
  return make(work, *outputs) if make else Method(work)
