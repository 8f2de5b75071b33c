"""A study whose runs take a second."""

DEFINITION = """
recipe:
  model:
    class_path: CNNClassifier
    init_args: {input_shape: [1, 8, 8], channels: [4, 6], hidden: [8, 8], momentum: 0.9}
  data:
    class_path: Digits
    init_args: {batch_size: 64, train_limit: 128, split_seed: 0}
  trainer: {max_epochs: 1}
grid:
  model.weight_decay: {prior: 1.0e-3, step: 0.5, points: 3}
  model.lr: {prior: 0.05, step: 0.5, points: 3}
variants:
  - {remaining: 0.5}
seed_keys: [data.seed]
"""
