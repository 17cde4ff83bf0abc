"""Patched Hugging Face models that expose `layer_indices`: what the offline search runs.

They have no routers and save nothing. What a path means is defined by the code of `train_models`, so a label found here
means the same at training and inference.
"""

from data_models.loading import load_path_model, path_model_class

__all__ = ["load_path_model", "path_model_class"]
