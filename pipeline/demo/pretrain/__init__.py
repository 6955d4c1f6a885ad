"""How the embedded model's weights were made; `python -m pipeline.demo.pretrain` makes them again."""
