"""What latent attention remembers: a latent and a rotated key of each token, in the place of key and value."""

from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, STATIC_LAYER_TYPE_MAPPING, StaticLayer

from .cache import GrowingCacheLayer

LATENT = "latent_attention"  # as config.layer_types names it


class LatentCacheLayer(GrowingCacheLayer):
    """Both [batch, 1, length, dim], of as many dims as each has."""


class StaticLatentCacheLayer(StaticLayer):
    """The same at fixed addresses. A config does not tell these sizes by the names of other attention."""

    supports_early_init = False


DYNAMIC_LAYER_TYPE_MAPPING[LATENT] = LatentCacheLayer
STATIC_LAYER_TYPE_MAPPING[LATENT] = StaticLatentCacheLayer
