"""What answers are made of: one file per endpoint, over what all share in `answer.py`."""
