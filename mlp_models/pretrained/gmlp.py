"""stub"""

from mlp_models.pretrained.rules import Layout

LAYOUTS: tuple[Layout, ...] = ()
