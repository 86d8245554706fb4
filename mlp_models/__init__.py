"""Attention-free and attention-light image classifiers in Flax.

model = mlp_models.create("mixer", num_classes=10)
params = model.init(jax.random.key(0), images)["params"]
logits = model.apply({"params": params}, images)

Published weights, or one's own:

model, params, preprocessing = mlp_models.load("weights.safetensors", num_classes=10)

`python -m mlp_models` lists all variants.
"""

from mlp_models import keras_weights as keras_weights
from mlp_models.pretrained import Preprocessing as Preprocessing
from mlp_models.pretrained import WeightsError as WeightsError
from mlp_models.pretrained import load as load
from mlp_models.pretrained import save as save
from mlp_models.registry import MODELS as MODELS
from mlp_models.registry import VARIANTS as VARIANTS
from mlp_models.registry import create as create

__version__ = "0.4.0"
