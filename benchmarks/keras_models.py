"""The five models with Keras' public layers, as a user of Keras would write them.

They give the same logits as ours: `tests/test_keras_models.py` compares them with the golden ones,
and `compare_keras.py` with ours before it times anything. Layers have the canonical names of
`mlp_models.keras_weights`, with dots instead of slashes.
"""

import keras
from flax import linen as nn
from keras import layers, ops

_EPSILON = 1e-6


def make(name: str, model: nn.Module, augmentation: dict, mean, variance) -> keras.Model:
  """Builds the Keras model: raw images [B, 32, 32, 3] -> logits [B, C].

  Args:
    name: one of `mlp_models.MODELS`.
    model: ours; gives the sizes and dropout rates.
    augmentation: flip, zoom and rotation, active in training.
    mean, variance: [3], of the training images, in pixel units.
  """
  size = model.image_size
  images = keras.Input((32, 32, 3))
  x = layers.Normalization(mean=mean, variance=variance)(images)
  x = layers.Resizing(size, size)(x)
  if augmentation["flip"]:
    x = layers.RandomFlip("horizontal")(x)
  if augmentation["rotation"]:
    x = layers.RandomRotation(augmentation["rotation"])(x)
  if augmentation["zoom"]:
    x = layers.RandomZoom(augmentation["zoom"], augmentation["zoom"])(x)
  side = size // model.patch_size
  x = layers.Reshape((side, model.patch_size, side, model.patch_size, 3))(x)
  x = layers.Permute((1, 3, 2, 4, 5))(x)
  x = layers.Reshape((side**2, model.patch_size**2 * 3))(x)
  x = layers.Dense(model.width, name="patch_embed")(x)
  return keras.Model(images, _MODELS[name](model, x))


def variables(model: keras.Model) -> dict[str, keras.Variable]:
  """The trainable variables of a model made here, by canonical name."""
  found = {}

  def add(name: str, layer: keras.Layer) -> None:
    if isinstance(layer, layers.MultiHeadAttention):
      parts = ("query", "key", "value", "output")
      for part, ours in zip(parts, ("query", "key", "value", "out"), strict=True):
        add(f"{name}/{ours}", getattr(layer, f"_{part}_dense"))
      return
    for variable in layer.trainable_variables:
      key = {"gamma": "scale", "beta": "bias"}.get(variable.name, variable.name)
      found[f"{name}/{key}" if key != "latents" else key] = variable

  for layer in model.layers:
    for inner in layer.layers if isinstance(layer, keras.Sequential) else [layer]:
      add(inner.name.replace(".", "/"), inner)
  return found


def _norm(name):
  return layers.LayerNormalization(epsilon=_EPSILON, name=name)


def _dense(units, name, activation=None, **kwargs):
  return layers.Dense(units, activation=activation, name=name, **kwargs)


class Position(layers.Layer):
  """Adds a learned row to each token."""

  def __init__(self, initializer, name):
    super().__init__(name=name)
    self.initializer = initializer

  def build(self, shape):
    self.embedding = self.add_weight(
      shape=shape[1:], initializer=self.initializer, name="embedding"
    )

  def call(self, x):
    return x + self.embedding


class Latents(layers.Layer):
  """The learned latents, repeated for each example."""

  def __init__(self, count, width):
    super().__init__(name="latents")
    self.shape_LxD = (count, width)

  def build(self, shape):
    initializer = keras.initializers.RandomNormal(stddev=0.05)
    self.latents = self.add_weight(shape=self.shape_LxD, initializer=initializer, name="latents")

  def call(self, x):
    return ops.broadcast_to(self.latents, (ops.shape(x)[0], *self.shape_LxD))


class FourierMix(layers.Layer):
  """The real part of the discrete Fourier transform over tokens and channels."""

  def call(self, x):
    return ops.fft2((x, ops.zeros_like(x)))[0]


def _mean_head(model, x):
  x = layers.GlobalAveragePooling1D()(x)
  return _dense(model.num_classes, "head")(layers.Dropout(model.dropout_rate)(x))


def _mixer(model, x):
  tokens, width = x.shape[1:]
  for i in range(model.num_blocks):
    norm = _norm(f"block{i}.norm")

    def mlp(x, part, units, i=i):
      x = _dense(tokens, f"block{i}.{part}.in", "gelu")(x)
      x = _dense(units, f"block{i}.{part}.out")(x)
      return layers.Dropout(model.dropout_rate)(x)

    y = mlp(layers.Permute((2, 1))(norm(x)), "token_mlp", tokens)
    x = layers.Add()([x, layers.Permute((2, 1))(y)])
    x = layers.Add()([x, mlp(norm(x), "channel_mlp", width)])
  return _mean_head(model, x)


def _fnet(model, x):
  x = Position("glorot_uniform", "position")(x)
  for i in range(model.num_blocks):
    x = _norm(f"block{i}.norm1")(layers.Add()([x, FourierMix()(x)]))
    y = _dense(model.width, f"block{i}.ffn.in", "gelu")(x)
    y = _dense(model.width, f"block{i}.ffn.out")(layers.Dropout(model.dropout_rate)(y))
    x = _norm(f"block{i}.norm2")(layers.Add()([x, y]))
  return _mean_head(model, x)


def _gmlp(model, x):
  tokens, width = x.shape[1:]
  for i in range(model.num_blocks):
    y = _dense(2 * width, f"block{i}.proj_in", "gelu")(_norm(f"block{i}.norm1")(x))
    u, v = ops.split(layers.Dropout(model.dropout_rate)(y), 2, axis=-1)
    v = layers.Permute((2, 1))(_norm(f"block{i}.norm2")(v))
    v = layers.Permute((2, 1))(_dense(tokens, f"block{i}.spatial", bias_initializer="ones")(v))
    x = layers.Add()([x, _dense(width, f"block{i}.proj_out")(layers.Multiply()([u, v]))])
  return _mean_head(model, x)


def _perceiver(model, x):
  def make_ffn(name, units):
    *hidden, last = units
    dense = [_dense(n, f"{name}.dense{i}", "gelu") for i, n in enumerate(hidden)]
    dense += [_dense(last, f"{name}.dense{len(hidden)}")]
    return keras.Sequential([*dense, layers.Dropout(model.dropout_rate)], name=name)

  x = Position(keras.initializers.RandomUniform(-0.05, 0.05), "position")(x)
  latents = Latents(model.num_latents, model.width)(x)
  norm_latents, norm_data = _norm("cross.norm_latents"), _norm("cross.norm_data")
  query, key, value = (_dense(model.width, f"cross.{n}") for n in ("query", "key", "value"))
  score = layers.Attention(use_scale=True, dropout=model.attention_dropout_rate, name="cross.score")
  norm_out = _norm("cross.norm_out")
  ffn = make_ffn("cross.ffn", model.ffn_units)
  blocks = []
  for i in range(model.num_blocks):
    name = f"latent.block{i}"
    attention = layers.MultiHeadAttention(
      model.num_heads,
      model.width,
      dropout=model.attention_dropout_rate,
      name=f"{name}.attention",
    )
    block_ffn = make_ffn(f"{name}.ffn", model.ffn_units)
    blocks.append((_norm(f"{name}.norm1"), attention, _norm(f"{name}.norm2"), block_ffn))

  data = norm_data(x)
  keys, values = key(data), value(data)
  for _ in range(model.num_iterations):
    latents = norm_latents(latents)
    latents = norm_out(score([query(latents), values, keys]) + latents)
    latents = latents + ffn(latents)
    for norm1, attention, norm2, block_ffn in blocks:
      y = norm1(latents)
      latents = latents + attention(y, y)
      latents = latents + block_ffn(norm2(latents))
  head = make_ffn("head", (*model.ffn_units[:-1], model.num_classes))
  return head(layers.GlobalAveragePooling1D()(latents))


def _vit(model, x):
  x = Position(keras.initializers.RandomUniform(-0.05, 0.05), "position")(x)

  def mlp(x, name, units, rate):
    for i, n in enumerate(units):
      x = layers.Dropout(rate)(_dense(n, f"{name}.dense{i}", "gelu")(x))
    return x

  for i in range(model.num_blocks):
    y = _norm(f"block{i}.norm1")(x)
    attention = layers.MultiHeadAttention(
      model.num_heads,
      model.head_dim,
      dropout=model.attention_dropout_rate,
      name=f"block{i}.attention",
    )
    x = layers.Add()([x, attention(y, y)])
    y = mlp(_norm(f"block{i}.norm2")(x), f"block{i}.mlp", model.mlp_units, model.dropout_rate)
    x = layers.Add()([x, y])
  x = layers.Flatten()(_norm("norm")(x))
  x = layers.Dropout(model.head_dropout_rate)(x)
  x = mlp(x, "head_mlp", model.head_units, model.head_dropout_rate)
  return _dense(model.num_classes, "head")(x)


_MODELS = {"mixer": _mixer, "fnet": _fnet, "gmlp": _gmlp, "perceiver": _perceiver, "vit": _vit}
