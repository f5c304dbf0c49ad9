from .adapt import attach as attach
from .adapt import detach as detach
from .layers.active import adapted_layers as adapted_layers
from .layers.active import evaluation_mode as evaluation_mode
from .models.load import empty_model as empty_model
from .models.load import load_config as load_config
from .models.load import load_for_task as load_for_task
from .models.load import load_tokenizer as load_tokenizer
