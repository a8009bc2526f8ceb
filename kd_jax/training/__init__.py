"""What is compiled: the train step and the evaluation step, for every method.

Files: `state` (what training changes), `optim` (schedules, SGD), `loss` (the
total loss of a batch), `step`, `eval_step`, `metrics` (sums and means).

May import distillers, models, losses, `data.augment` and
`distributed.collectives`; nothing from runs, interop or the data sources.

The step is a plain function of arrays. In a loop of your own, on one device:

>>> import jax, jax.numpy as jnp, optax
>>> from kd_jax import distillers, models
>>> from kd_jax.training import loss, state, step
>>> student = models.create("resnet8", num_classes=10)
>>> teacher = models.create("resnet14", num_classes=10)
>>> distiller = distillers.create("kd", temperature=2.0)
>>> images = jnp.ones((4, 16, 16, 3))
>>> batches = [{"image": images, "label": jnp.arange(4)}] * 3
>>> key = jax.random.key(0)
>>> student_variables = student.init(key, images)
>>> teacher_variables = (teacher.init(key, images),)  # or a trained one's
>>> distiller_variables = loss.init_distiller(
...   distiller,
...   key,
...   student=student,
...   student_variables=student_variables,
...   teachers=(teacher,),
...   teacher_variables=teacher_variables,
...   images=images,
...   batch=batches[0],
... )
>>> optimizer = optax.sgd(0.05, momentum=0.9)
>>> train_step = jax.jit(
...   step.make_train_step(
...     student=student,
...     teachers=(teacher,),
...     distiller=distiller,
...     loss_weights={"ce": 1.0, "kd": 1.0},
...     transform=lambda key, batch: batch["image"],
...     steps_per_epoch=len(batches),
...     optimizer=optimizer,
...   )
... )
>>> train_state = state.create(
...   student_variables, distiller_variables, optimizer
... )
>>> for batch in batches:
...   train_state, sums = train_step(
...     train_state, teacher_variables, batch, step.make_seeds(0)
...   )
>>> sorted(sums), int(train_state.step)
(['ce', 'count', 'kd', 'loss', 'top1'], 3)
"""
