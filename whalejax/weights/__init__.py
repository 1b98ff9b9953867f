"""Hugging Face directories of DeepSeek-V2 and V3 models, read and written."""

from whalejax.weights.config_json import read_config
from whalejax.weights.load import check_pretrained, from_pretrained
from whalejax.weights.save import save_pretrained

__all__ = ["check_pretrained", "from_pretrained", "read_config", "save_pretrained"]
