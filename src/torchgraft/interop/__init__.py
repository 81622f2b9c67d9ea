"""Files of other libraries: reading their adapters, and writing ours for them."""

from .peft import read_peft, write_peft

__all__ = ["read_peft", "write_peft"]
