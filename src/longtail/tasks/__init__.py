"""What a network is trained to predict: one folder per task.

The ``__init__`` of a folder registers what the task brings along, by name and place; it imports no torch.
"""
