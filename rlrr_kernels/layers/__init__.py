"""The modules that take the place of ``nn.Linear`` and ``nn.LayerNorm``, and the styles that shard them."""
