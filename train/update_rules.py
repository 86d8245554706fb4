"""From gradients to updates, before weight decay and learning rate: AdamW, LAMB, Lion, Muon, SGD.

Which arrays a rule treats differently is decided by their names, which all families share.
"""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from optax.contrib import MuonDimensionNumbers

Array = jax.Array
# By name, the moments of each parameter, at least: Muon has two for those that AdamW updates.
MOMENTS = {"adamw": 2, "lamb": 2, "muon": 1, "lion": 1, "sgd": 1}
RULES = tuple(MOMENTS)
_ADAM_RMS = 0.2  # root mean square of AdamW's updates, measured by Liu et al., section 2.2


def make_rule(config, sharding: NamedSharding | None = None) -> optax.GradientTransformation:
  """The rule of `config.name`, one of RULES; LAMB's without its trust ratio, which needs the decay.

  Args:
    config: b1, b2 and epsilon (AdamW, LAMB; Lion without epsilon), momentum and nesterov (SGD and
      Muon's matrices).
    sharding: as for `orthogonalize`.
  Muon's momentum is Jordan's, a sum; optax.contrib.muon corrects the bias of an average instead,
  which differs in the first steps.
  Follows You et al., "LAMB" (arXiv:1904.00962, algorithm 2); Chen et al., "Lion" (arXiv:2302.06675,
  algorithm 2); Jordan et al., "Muon", 2024, scaled as in Liu et al. (arXiv:2502.16982, equation 4).
  """
  if config.name == "lamb":
    return optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.epsilon)
  if config.name == "lion":
    return optax.scale_by_lion(b1=config.b1, b2=config.b2)
  momentum = optax.trace(config.momentum, config.nesterov)
  if config.name == "sgd":
    return momentum
  adam = scale_by_keras_adam(b1=config.b1, b2=config.b2, epsilon=config.epsilon)
  if config.name == "adamw":
    return adam
  matrices = optax.chain(momentum, orthogonalize(sharding))
  return optax.partition({"muon": matrices, "adamw": adam}, muon_or_adamw)


def scale_by_keras_adam(b1: float, b2: float, epsilon: float) -> optax.GradientTransformation:
  """`optax.scale_by_adam` with epsilon as in Keras: added to the uncorrected root.

  Step t (from 1) gives m sqrt(1 - b2^t) / (1 - b1^t) / (sqrt(v) + epsilon). In optax's form, which
  corrects both moments, this is an epsilon of epsilon / sqrt(1 - b2^t): 32 times as large at t = 1
  and b2 = 0.999, which matters for the first steps of weights whose gradients are near epsilon.
  Follows Kingma and Ba, "Adam" (arXiv:1412.6980), the reordered form at the end of section 2.
  """

  def update(grads, state, params=None):
    del params
    mu = optax.tree.update_moment(grads, state.mu, b1, 1)
    nu = optax.tree.update_moment_per_elem_norm(grads, state.nu, b2, 2)
    count = optax.safe_increment(state.count)
    correction = jnp.sqrt(1 - b2**count) / (1 - b1**count)
    updates = jax.tree.map(lambda m, v: correction * m / (jnp.sqrt(v) + epsilon), mu, nu)
    return updates, optax.ScaleByAdamState(count=count, mu=mu, nu=nu)

  return optax.GradientTransformation(optax.scale_by_adam().init, update)


def kernels(params: Any) -> Any:
  """A tree of booleans: kernels, and not biases, norms, positions, tokens or latents."""
  return jax.tree.map_with_path(lambda path, _: _name(path).endswith("/kernel"), params)


def muon_or_adamw(params: Any) -> Any:
  """A tree of rules: "muon" for the kernels of blocks, "adamw" for all else.

  Blocks are those of all families, and Perceiver's cross-attentions and decoder. Embeddings,
  positions, norms, biases and heads, hidden layers of theirs included, are AdamW's.
  """
  hidden = re.compile(r"(^|/)(block|cross|decoder)\d*/.*/kernel$")
  return jax.tree.map_with_path(
    lambda path, _: "muon" if hidden.search(_name(path)) else "adamw", params
  )


def orthogonalize(sharding: NamedSharding | None = None) -> optax.GradientTransformation:
  """Replaces each matrix U S V^T by about 0.2 sqrt(its longer side) U V^T.

  So its root mean square is AdamW's, and both can share a learning rate. The kernels of attention,
  [D, N, K] and out's [N, K, D], are the matrices [D, NK] and [NK, D]. Those of equal shape, or of
  a transposed one, are one batch.

  Args:
    sharding: of each batch over the devices, by its first axis; None: every device does all.
  """

  def update(updates, params=None):
    del params
    paths, structure = jax.tree.flatten_with_path(updates)
    batches: dict[tuple[int, ...], list[Array]] = {}
    for path, x in paths:
      matrix = _wide_matrix(_name(path), x)
      batches.setdefault(matrix.shape, []).append(matrix)
    stacked = {shape: jnp.stack(matrices) for shape, matrices in batches.items()}
    if sharding is not None:
      stacked = jax.lax.with_sharding_constraint(stacked, sharding)
    stacked, _ = _NEWTON_SCHULZ.update(stacked, _NEWTON_SCHULZ.init(stacked))
    if sharding is not None:
      replicated = NamedSharding(sharding.mesh, PartitionSpec())
      stacked = jax.lax.with_sharding_constraint(stacked, replicated)
    results = {shape: iter(_ADAM_RMS * math.sqrt(shape[1]) * x) for shape, x in stacked.items()}
    leaves = []
    for path, x in paths:
      rows = _rows(_name(path), x)
      wide = next(results[tuple(sorted((rows, x.size // rows)))])
      leaves.append((wide if len(wide) == rows else wide.T).reshape(x.shape))
    return jax.tree.unflatten(structure, leaves)

  return optax.stateless(update)


# Without momentum, Muon is Newton-Schulz: five steps of a polynomial of fifth degree.
_NEWTON_SCHULZ = optax.contrib.scale_by_muon(
  beta=0.0,
  nesterov=False,
  weight_dimension_numbers=lambda stacked: jax.tree.map(
    lambda _: MuonDimensionNumbers(reduction_axis=1, output_axis=2), stacked
  ),
)


def _wide_matrix(name: str, kernel: Array) -> Array:
  """The kernel as a matrix, turned so that it has no more rows than columns."""
  matrix = kernel.reshape(_rows(name, kernel), -1)
  return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T


def _rows(name: str, kernel: Array) -> int:
  """The inputs of a kernel: its first axis, but all axes except the last in a layer named out."""
  return math.prod(kernel.shape[:-1]) if name.endswith("out/kernel") else kernel.shape[0]


def _name(path: tuple) -> str:
  """The path of a parameter, such as block0/norm/scale."""
  return jax.tree_util.keystr(path, simple=True, separator="/")
